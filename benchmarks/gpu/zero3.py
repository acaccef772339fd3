"""A step of a 1B Llama under ZeRO-3, on one rank: DeepSpeedBLUR against the weighted sum on the same engine."""

import importlib.util
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
from memory_methods import Problem, settings_of

from .context import Context, Sheet

#: Importing DeepSpeed, making the engine, and the steps.
SECONDS = 40.0
STASHES = ("reference", "int8")
WARM, TIMED = 2, 3
GIB = 2**30


def why_not(context: Context) -> str:
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed."
    if context.device != "cuda":
        return "DeepSpeed's engine needs a GPU here; tests/parallel/test_deepspeed.py has it on CPUs."
    if context.seconds_left < SECONDS:
        return "no time was left."
    return ""


def run(context: Context, sheet: Sheet) -> None:
    """Add the table to the sheet of the stage ``seven``, or a note on why there is none."""
    if reason := why_not(context):
        sheet.note(f"ZeRO-3 at 1B is left out: {reason}")
        return
    try:
        measure(context.device, sheet, "tiny" if context.quick else "llama-1b")
    except Exception as error:  # Another's engine must not take the stage's other results with it.
        sheet.note(f"ZeRO-3 at 1B failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def measure(device: str, sheet: Sheet, model: str) -> None:
    from blur_optim.integrations.deepspeed import DeepSpeedBLUR

    problem = Problem(settings_of(model, dtype="bfloat16", device=device, checkpointing=True))
    engine = make_engine(problem, device)
    rows = [{"method": "weighted sum"} | timed(lambda: weighted_sum(engine, problem), device)]
    for stash in STASHES:
        for owner in (engine.basic_optimizer.defaults, *engine.basic_optimizer.param_groups):
            for name in ("gamma", "retain_weight"):  # Of the one before.
                owner.pop(name, None)
        opt = DeepSpeedBLUR(engine, stash=stash)
        rows.append({"method": f"BLUR, {stash}"} | timed(lambda opt=opt: blur(opt, engine, problem), device))
    for row in rows:
        row["time / weighted sum"] = row["seconds"] / rows[0]["seconds"]
    numel = sum(getattr(p, "ds_numel", p.numel()) for p in problem.params)
    sheet.table(f"A step under ZeRO-3 on one rank, {numel / 1e9:.2f}G parameters in bfloat16", rows)


def make_engine(problem: Problem, device: str) -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "overlap_comm": False},
    }
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo")
    optimizer = torch.optim.AdamW(problem.params, lr=1e-5)
    return deepspeed.initialize(model=problem.model, optimizer=optimizer, config=config)[0]


def weighted_sum(engine: Any, problem: Problem) -> None:
    engine.backward(problem.forget_loss() + problem.retain_loss())
    engine.step()


def blur(opt: Any, engine: Any, problem: Problem) -> None:
    for phase, loss in ((opt.forget, problem.forget_loss), (opt.retain, problem.retain_loss)):
        with phase():
            engine.backward(loss(), scale_wrt_gas=False)
    opt.step()


def timed(step: Callable[[], None], device: str) -> dict[str, float | None]:
    seconds = []
    for i in range(WARM + TIMED):
        if device == "cuda":
            torch.cuda.synchronize()
            if i == WARM:
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None
    return {"peak GiB": peak, "seconds": sorted(seconds[WARM:])[TIMED // 2]}
