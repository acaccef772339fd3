"""Every operation by backend, gradients' dtype and stash, and the tuning sweep; what is worth most comes first."""

import gc
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from harness import Clock, Result
from kernel_bench import EVERY_OPERATION, gradients_of, make_problem, measure
from kernel_operations import OPERATIONS

from blur_optim.kernels import BACKENDS
from blur_optim.kernels.select import why_not

from . import tuning
from .context import Context, Sheet


class Case(NamedTuple):
    """One problem: tensors x elements, the gradients' dtype, what the forget gradients wait in."""

    size: str
    dtype: str
    stash: str = "reference"
    compiled: bool = False
    seconds: float = 4.0  # Without so much time left it is not begun.
    operations: Collection[str] = OPERATIONS  # For Triton each is a kernel more to compile.


LARGE, HUGE, MANY, LORA = "16x8388608", "16x75000000", "3000x1000", "448x65536"
CASES = (
    Case(LARGE, "float32", operations=EVERY_OPERATION),
    Case(LARGE, "bfloat16", operations=EVERY_OPERATION),
    Case(LARGE, "float32", "int8"),
    Case(MANY, "float32"),
)
#: After the sweep.
MORE = (
    Case(LARGE, "bfloat16", "int8"),
    Case(LARGE, "float32", "bfloat16"),
    Case(LARGE, "float16"),
    Case(LARGE, "float16", "int8"),
    Case(LORA, "float32"),
    Case(LORA, "bfloat16", "int8"),
    Case(MANY, "bfloat16"),
    Case(HUGE, "float32", seconds=6.0),
    Case(HUGE, "bfloat16", seconds=6.0),
    Case(LARGE, "float32", compiled=True, seconds=25.0),
    Case(LARGE, "bfloat16", compiled=True, seconds=25.0),
)
QUICK = (Case("4x5000", "float32", operations=EVERY_OPERATION), Case("4x5000", "bfloat16", "int8"))
NAMES = {LARGE: "128M", HUGE: "1.2G", MANY: "3000 tensors of 1000", LORA: "LoRA, 448 tensors of 65536"}
LIMITED = ("dots", "blend", "AdamW on two gradients", "SGD on two gradients")
LIMITED_IN_METRIC = ("blend in the metric", "AdamW in the metric", "SGD in the metric")
#: Of the copy's bandwidth, at 128M elements and above.
LEAST_OF_COPY = dict.fromkeys((*LIMITED, *LIMITED_IN_METRIC), 0.9)
#: With float32 gradients alone: with shorter ones arithmetic decides, as docs/kernels.md expects.
LEAST_OF_COPY_FLOAT32 = {"dots in the metric": 0.8}
#: Of AdamW(fused=True) steps, by the gradients' dtype. Bytes alone are 1.43 and 1.23, in the metric 1.57 and 1.38.
MOST_OF_ADAMW = {
    "whole update": {"float32": 1.5, "bfloat16": 1.3, "float16": 1.3},
    "whole update in the metric": {"float32": 1.65, "bfloat16": 1.5, "float16": 1.5},
}


def run(context: Context, sheet: Sheet) -> None:
    device = torch.device(context.device)
    names = [name for name in BACKENDS if name != "reference" and not why_not(name, device)]
    for name in ("native", "triton"):
        if reason := why_not(name, device):
            sheet.note(f"{name} is left out: {reason}")
    clock, wide = Clock(device), []
    for case in QUICK if context.quick else CASES:
        run_case(case, names, clock, context, sheet, wide)
    tuning.run(context, sheet)
    for case in () if context.quick else MORE:
        run_case(case, names, clock, context, sheet, wide)


def run_case(
    case: Case, names: Sequence[str], clock: Clock, context: Context, sheet: Sheet, wide: list[dict[str, Any]]
) -> None:
    """Time every operation on one problem; ``wide`` are the rows of the report's table."""
    size, gradients = NAMES.get(case.size, case.size), gradients_of(case.dtype, case.stash)
    if context.seconds_left < case.seconds:
        sheet.note(f"{size}, {gradients}{', torch.compile' * case.compiled}: left out, no time was left.")
        return
    try:
        problem = make_problem(case.size, case.dtype, case.stash, clock.device)
        rounds = 3 if context.quick else 7
        options = case.compiled, clock, rounds, gradients, case.size, case.operations
        for results in measure(problem, names, *options):
            sheet.record([asdict(result) for result in results])
            wide.append(line(results, size))
            sheet.table("Time in AdamW(fused=True) steps, share of the copy's and the read's bandwidth", wide)
            hold_against_limits(results, case, sheet)
            print(results[0].operation, gradients, size, flush=True)
    except torch.OutOfMemoryError as error:
        sheet.note(f"{size}, {gradients}: does not fit: {str(error).splitlines()[0]}")
    finally:
        problem = None
        gc.collect()
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()


def line(results: Sequence[Result], size: str) -> dict[str, Any]:
    """All candidates of an operation in one row."""
    first = results[0]
    row: dict[str, Any] = {"operation": first.operation, "gradients": first.dtype, "elements": size}
    for result in results:
        shares = [f"{share:.0%}" for share in (result.copy_share, result.read_share) if share]
        speed = f"{result.gb_per_s:.0f} GB/s" if result.candidate in ("copy", "read") and result.gb_per_s else None
        row[result.candidate.removeprefix("baseline: ")] = speed or " ".join([f"{result.ratio:.2f}", *shares])
    return row


def hold_against_limits(results: Sequence[Result], case: Case, sheet: Sheet) -> None:
    """Hold native and Triton against what they are to reach, where the problem is large enough to say so."""
    if case.size not in (LARGE, HUGE) or case.compiled:
        return
    least = LEAST_OF_COPY | (LEAST_OF_COPY_FLOAT32 if case.dtype == "float32" else {})
    for result in results:
        if result.candidate not in ("native", "triton"):
            continue
        what = f"{result.operation}, {result.candidate}, {result.dtype}, {NAMES[case.size]}"
        if most := MOST_OF_ADAMW.get(result.operation):
            sheet.limit(f"{what}: AdamW(fused=True) steps", result.ratio, most=most[case.dtype])
        elif result.copy_share and (share := least.get(result.operation)):
            sheet.limit(f"{what}: share of the copy", result.copy_share, least=share)
