"""The tuning sweep: the CUDA kernels with other constants, several builds side by side, and Triton's block and chunk.

The build that is the default stands among them, and each is checked before it is timed. A block and a chunk are part of
the definition of a sum, so another default changes bits: the sweep says what that would gain.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from harness import Candidate, Clock, Result, compare
from kernel_bench import EVERY_OPERATION, gradients_of, make_problem
from kernel_metric_operations import dots_error
from kernel_operations import Problem, adamw_error, check, dot_error

from blur_optim.kernels import select_backend
from blur_optim.kernels.select import why_not

from .context import Context, Sheet
from .launchers import Launchers

BLOCK, CHUNK = "-DBLUR_OPTIM_CUDA_BLOCK={}", "-DBLUR_OPTIM_CUDA_CHUNK={}"


def _sizes(block: int, chunk: int) -> tuple[str, str]:
    return BLOCK.format(block), CHUNK.format(chunk)


#: By name: flags of a build. Sums allow no more than 16 additions in a row: a chunk is at most 64 blocks.
VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "block-128-chunk-8192": _sizes(128, 8192),
    "block-256-chunk-8192": _sizes(256, 8192),
    "block-512-chunk-16384": _sizes(512, 16384),
    "block-512-chunk-32768": _sizes(512, 32768),
    "block-1024-chunk-65536": _sizes(1024, 65536),
    "unroll-2": ("-DBLUR_OPTIM_CUDA_UNROLL=2",),
    "unroll-8": ("-DBLUR_OPTIM_CUDA_UNROLL=8",),
    "blocks-6": ("-DBLUR_OPTIM_CUDA_MIN_BLOCKS=6",),
    "blocks-8": ("-DBLUR_OPTIM_CUDA_MIN_BLOCKS=8",),
    "arguments-32k": ("-DBLUR_OPTIM_CUDA_ARGUMENTS=32764",),  # Of a launch: eight times as many tensors in each.
}


class Shape(NamedTuple):
    """What one Triton kernel is compiled with."""

    block: int
    chunk: int
    warps: int

    def __str__(self) -> str:
        return f"block {self.block}, chunk {self.chunk}, {self.warps} warps"


SHAPES = (Shape(2048, 32768, 8), Shape(1024, 16384, 4), Shape(2048, 16384, 8), Shape(4096, 65536, 8))
#: What is worth most first: the time may end.
SWEPT = (
    "dots",
    "AdamW on two gradients",
    "blend",
    "dots in the metric",
    "AdamW in the metric",
    "SGD on two gradients",
    "compress to int8",
    "blend in the metric",
    "SGD in the metric",
)
CASES = (("16x8388608", "float32"), ("16x8388608", "bfloat16"), ("3000x1000", "float32"))
#: Without so much time left, a problem is not begun: for Triton mostly compilation.
SECONDS = 5.0
ROUNDS = 5


def run(context: Context, sheet: Sheet) -> None:
    """Time all variants; the report shows the best by operation beside the default."""
    if context.device != "cuda":
        sheet.note("The tuning sweep needs a GPU.")
        return
    clock, best = Clock(torch.device("cuda")), []
    for sweep in (native, triton):
        for size, dtype in CASES:
            if context.seconds_left < SECONDS:
                sheet.note(f"The tuning sweep of {sweep.__name__} ends before {dtype}, {size}: no time was left.")
                break
            problem = make_problem(size, dtype, "reference", clock.device)
            for results in sweep(problem, context, clock, (size, gradients_of(dtype, "reference"))):
                sheet.record([vars(result) | {"sweep": sweep.__name__} for result in results])
                best.append(best_of(sweep.__name__, results))
                sheet.table("The tuning sweep: time in AdamW(fused=True) steps, the best beside the default", best)


def best_of(sweep: str, results: list[Result]) -> dict[str, Any]:
    tried = [result for result in results if not result.candidate.startswith(("baseline", "copy"))]
    best, default = min(tried, key=lambda result: result.ratio), tried[0]
    return {
        "backend": sweep,
        "operation": best.operation,
        "gradients": best.dtype,
        "elements": best.size,
        "default": default.ratio,
        "best": best.ratio,
        "which": best.candidate,
        "gain": f"{1 - best.ratio / default.ratio:.1%}",
        "spread of the default": f"{(default.ratio_80 - default.ratio_20) / default.ratio:.1%}",
    }


def native(problem: Problem, context: Context, clock: Clock, labels: tuple[str, str]) -> Iterator[list[Result]]:
    libraries = {}
    for name in VARIANTS:
        path = context.variants / f"{name}.so"
        if path.is_file():
            libraries[name] = Launchers(path, problem)
    if "default" not in libraries:
        return
    first = next(iter(libraries.values()))
    calls: dict[str, Callable[[Launchers], object]] = {
        "dots": Launchers.dots,
        "blend": Launchers.blend,
        "AdamW on two gradients": Launchers.adamw,
        "SGD on two gradients": Launchers.sgd,
        "dots in the metric": Launchers.metric_dots,
        "blend in the metric": Launchers.metric_blend,
        "AdamW in the metric": Launchers.metric_adamw,
        "SGD in the metric": Launchers.metric_sgd,
        "compress to int8": Launchers.compress,
    }
    for operation in SWEPT:
        call = calls[operation]
        candidates = [Candidate(name, lambda call=call, each=each: call(each)) for name, each in libraries.items()]
        if operation == "dots":
            check(candidates, lambda c: dot_error(problem, c.run), 1e-6)
        elif operation == "dots in the metric":
            check(candidates, lambda c: dots_error(problem, c.run), 1e-6)
        elif operation == "AdamW on two gradients":
            check(candidates, lambda c: adamw_error(problem, libraries[c.name]), 5e-2)
        yield timed(operation, candidates, first.problem, clock, labels)


def triton(problem: Problem, context: Context, clock: Clock, labels: tuple[str, str]) -> Iterator[list[Result]]:
    if why_not("triton", problem.device):
        return
    from blur_optim.kernels.triton import kernels

    backend = select_backend("triton", problem.device)

    def with_shape(shape: Shape, run: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            options = kernels.OPTIONS | {"num_warps": shape.warps}
            with patch.multiple(kernels, BLOCK_SIZE=shape.block, CHUNK_SIZE=shape.chunk, OPTIONS=options):
                return run()

        return call

    for operation in SWEPT:
        made = EVERY_OPERATION[operation](problem, {"triton": backend}, False)
        (plain,) = (c for c in made if c.name == "triton")
        candidates = [Candidate(str(shape), with_shape(shape, plain.run)) for shape in SHAPES]
        if operation == "dots":
            check(candidates, lambda c: dot_error(problem, c.run), 1e-6)
        yield timed(operation, candidates, problem, clock, labels)
        if context.seconds_left < SECONDS:
            return


def timed(
    operation: str, candidates: list[Candidate], problem: Problem, clock: Clock, labels: tuple[str, str]
) -> list[Result]:
    baseline = Candidate("baseline: AdamW(fused=True)", problem.adamw.step, 28 * problem.numel)
    source, target = torch.randn(2, problem.numel // 2, device=problem.device)
    copy = Candidate("copy", lambda: target.copy_(source), 8 * source.numel())
    size, gradients = labels
    return compare(operation, candidates, baseline, copy, clock, ROUNDS, dtype=gradients, size=size)
