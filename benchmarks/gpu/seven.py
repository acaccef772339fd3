"""A training step of Llama-2-7B's shapes: random weights, bfloat16, AdamW, checkpointed activations. Does it fit?

By every way to unlearn that memory_bench knows, timed in turn in one process; 2048 tokens for each of the two losses.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from memory_methods import BASELINE, METHODS, METRIC, Problem, settings_of
from memory_tracker import process_peak

from . import zero3
from .context import Context, Sheet

ROUNDS = 4
#: What is worth most, for the time may end.
FIRST = (BASELINE, "two_backwards", "reference", METRIC)
LEFT_OUT = ("dots_in_hooks", "torchjd", "torchjd_lean", "pcgrad")
#: Of the step's time over the weighted sum's, and GiB of the int8 stash above it.
MOST_TIME, MOST_GIB = 1.03, 3.5
#: GiB of the metric above the plain step: it has nine sums of a chunk for three, of 0.4M chunks, and no state more.
MOST_METRIC_GIB = 0.1
GIB = 2**30


def run(context: Context, sheet: Sheet) -> None:
    train(context, sheet)
    gc.collect()  # Nothing of it is left: the card is free for the next.
    if context.device == "cuda":
        torch.cuda.empty_cache()
    zero3.run(context, sheet)


def train(context: Context, sheet: Sheet) -> None:
    model = "tiny" if context.quick else "llama-7b"
    settings = settings_of(model, dtype="bfloat16", device=context.device, checkpointing=True)
    start = time.perf_counter()
    problem = Problem(settings)
    sheet.note(
        f"{sum(p.numel() for p in problem.params) / 1e9:.2f}G parameters, made in {time.perf_counter() - start:.0f} s; "
        f"{settings.batch} x {settings.length} tokens for each loss."
    )
    sets = problem.unit / GIB
    sheet.note(
        f"On paper BLUR holds five sets of {sets:.3g} GiB at its peak, parameters, two moments and two gradients: "
        f"{5 * sets:.3g} GiB and one layer's activations, in the metric of the retain loss as without it."
    )
    names = sorted((name for name in METHODS if name not in LEFT_OUT), key=lambda name: name not in FIRST)
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name in names:
        rows[name] = {"method": METHODS[name].title} | first_steps(name, problem, steps, sheet)
        sheet.table("A training step", list(rows.values()))
        print(rows[name], flush=True)
        if context.seconds_left < 15 and not context.quick:
            sheet.note("What is not in the table was not begun: no time was left.")
            break
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(2 if context.quick else ROUNDS):  # In turn: a card that warms up slows all of them alike.
        for name, step in steps.items():
            if context.seconds_left > 4:
                times[name].append(seconds(step, context.device))
        fill(rows, times, settings.batch * settings.length)
        sheet.table("A training step", list(rows.values()))
    sheet.record(list(rows.values()))
    hold_against_limits(rows, sheet, context)


def first_steps(
    name: str, problem: Problem, steps: dict[str, Callable[[], object]], sheet: Sheet
) -> dict[str, float | str | None]:
    """Take two steps: the first makes what is kept, the second shows the peak. ``steps`` gets those that fit."""
    device = problem.params[0].device
    try:
        step = METHODS[name].make(problem)
        step()
        peak = peak_gib(step, device)
    except (TypeError, ValueError) as error:  # A stash that does not go with this dtype says so.
        return {"peak GiB": f"refused: {error}"}
    except torch.OutOfMemoryError:
        for p in problem.params:
            p.grad = None
        gc.collect()
        torch.cuda.empty_cache()
        return {"peak GiB": f"does not fit in {torch.cuda.get_device_properties(device).total_memory / GIB:.0f} GiB"}
    steps[name] = step
    return {"peak GiB": peak}


def peak_gib(step: Callable[[], object], device: torch.device) -> float | None:
    """Everything that is allocated at the peak; on the CPU what the process rose by."""
    if device.type != "cuda":
        risen = process_peak(step)
        return None if risen is None else risen / GIB
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / GIB


def seconds(step: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fill(rows: dict[str, dict[str, Any]], times: dict[str, list[float]], tokens: int) -> None:
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    for name, median in medians.items():
        rows[name] |= {"seconds": median, "tokens/s": 2 * tokens / median}
        for base in (BASELINE, "two_backwards"):
            if base in medians:
                rows[name][f"time / {METHODS[base].title}"] = median / medians[base]


def hold_against_limits(rows: dict[str, dict[str, Any]], sheet: Sheet, context: Context) -> None:
    """Against the weighted sum that costs least: of one or of two backward passes."""
    if context.quick:
        return
    sums = [rows[name] for name in (BASELINE, "two_backwards") if "seconds" in rows.get(name, {})]
    if not sums:
        sheet.note("The weighted sum does not fit: there is nothing to hold BLUR against.")
        return
    fastest, smallest = min(row["seconds"] for row in sums), min(row["peak GiB"] for row in sums)
    if "seconds" in rows.get("reference", {}):
        ratio = rows["reference"]["seconds"] / fastest
        sheet.limit("BLUR's training step at 7B over the weighted sum's", ratio, most=MOST_TIME)
    if "seconds" in rows.get("reference", {}) and "seconds" in rows.get(METRIC, {}):
        more = rows[METRIC]["peak GiB"] - rows["reference"]["peak GiB"]
        what = "GiB of BLUR in the metric of the retain loss above BLUR without it, 7B in bfloat16"
        sheet.limit(what, more, most=MOST_METRIC_GIB)
    if "seconds" in rows.get("int8", {}):
        more = rows["int8"]["peak GiB"] - smallest
        sheet.limit("GiB of BLUR with the int8 stash above the weighted sum, 7B in bfloat16", more, most=MOST_GIB)
        sheet.note(
            "One byte for each of 6.74G parameters is 6.3 GiB: it can cost less only where the weighted sum's peak is "
            "not at the end of its backward pass."
        )
