"""The optimizer step through the public API, for the parameters of real models: device and host time apart."""

import gc
from dataclasses import asdict
from typing import NamedTuple

import torch
from harness import Candidate, Clock, compare
from step_bench import MODELS, candidates

from .context import Context, Sheet

RULES = ("blur", "weighted_sum", "normalized")
#: Host time of a step of some 300 tensors, over that of AdamW(fused=True).
HOST_LIMIT, HOST_MODEL = 1.6, "smollm-135m"


class Case(NamedTuple):
    """A list of parameters and their dtype; seconds without which it is not begun."""

    model: str
    dtype: str
    seconds: float = 4.0


CASES = (
    Case("smollm-135m", "float32"),
    Case("tiny", "float32"),
    Case("lora-7b", "float32"),
    Case("llama-1b", "float32"),
    Case("llama-7b", "bfloat16", seconds=8.0),
    Case("llama-1b", "bfloat16"),
    Case("smollm-135m", "bfloat16"),
)


def run(context: Context, sheet: Sheet) -> None:
    device, rows = torch.device(context.device), []
    clock = Clock(device)
    for case in [Case("toy", "float32")] if context.quick else CASES:
        if context.seconds_left < case.seconds:
            sheet.note(f"{case.model}, {case.dtype}: left out, no time was left.")
            continue
        shapes = [(50, 30), (50,)] * 5 if case.model == "toy" else MODELS[case.model]()
        name = f"{case.model}, {len(shapes)} tensors, {sum(map(_numel, shapes)) / 1e6:.0f}M"
        try:
            baseline, others = candidates(shapes, device, getattr(torch, case.dtype), RULES)
            baseline.run()  # Its state is everybody's.
            fitting = [candidate for candidate in others if fits(candidate, name, sheet)]
            source, target = torch.randn(2, 1 << (10 if context.quick else 26), device=device)
            copy = Candidate("copy", lambda source=source, target=target: target.copy_(source), 2 * source.nbytes)
            labels = {"dtype": case.dtype, "size": case.model}
            found = compare("step", fitting, baseline, copy, clock, 3 if context.quick else 7, **labels)
        except torch.OutOfMemoryError as error:
            sheet.note(f"{name}: does not fit: {str(error).splitlines()[0]}")
            continue
        finally:
            baseline = others = fitting = None
            free(device)
        sheet.record([asdict(result) for result in found])
        unit = next(result for result in found if result.candidate == "baseline: AdamW(fused=True)")
        for result in found[:-1]:
            row = {"parameters": f"{name}, {case.dtype}", "candidate": result.candidate.removeprefix("baseline: ")}
            row |= {"device ms": 1e3 * result.seconds, "device / AdamW": result.ratio}
            if result.host_seconds and unit.host_seconds:
                host = result.host_seconds / unit.host_seconds
                row |= {"host ms": 1e3 * result.host_seconds, "host / AdamW": host}
                if case == Case(HOST_MODEL, "float32") and result.candidate == "BLUR, rule='blur'":
                    sheet.limit(f"host time of a step, {name}: AdamW(fused=True) steps", host, most=HOST_LIMIT)
            rows.append(row)
        sheet.table("A step", rows)
        print(name, flush=True)


def fits(candidate: Candidate, name: str, sheet: Sheet) -> bool:
    try:
        candidate.run()
    except torch.OutOfMemoryError:
        sheet.note(f"{name}: {candidate.name} does not fit.")
        torch.cuda.empty_cache()
        return False
    return True


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
