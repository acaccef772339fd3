"""What the tests on a GPU share: tensors there, backends, a small problem, and the reference's update."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import Problem
from test_backends import BLEND_TOLERANCE, DOT_TOLERANCE, LAYOUTS
from torch import Tensor

from blur_optim.kernels import BACKENDS
from blur_optim.kernels.blocks import quantize
from blur_optim.kernels.select import why_not

DTYPES: list[torch.dtype] = list(DOT_TOLERANCE)
#: Of the retain gradients, and in what the forget gradients wait beside them.
GRADIENTS = [
    (dtype, stash)
    for dtype in DTYPES
    for stash in (dtype, torch.bfloat16, torch.int8)
    if stash == dtype or stash.itemsize < dtype.itemsize
]
#: Of parameters and their gradients.
PARAMS = [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, d) for d in (torch.bfloat16, torch.float16)]

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "odd and empty": [(7,), (4, 0), (3, 5), (), (1,), (1, 1, 2), (257,)],
    "around chunks": [(16384,), (16383,), (16385,), (32768 + 5,), (65537,)],
    "large": [(3_000_001,), (1 << 20,)],
    "10000 tensors": [(3,)] * 10_000,
}


def backend_params() -> list[Any]:
    """native and triton; one that is not there is skipped, and says why."""
    place = torch.device(os.environ.get("BLUR_OPTIM_GPU_TEST_DEVICE", "cuda"))
    here = place.type == "cpu" or torch.cuda.is_available()
    reasons = {name: why_not(name, place) if here else "" for name in ("native", "triton")}
    skips = {name: [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else [] for name, reason in reasons.items()}
    return [pytest.param(name, marks=skips[name]) for name in reasons]


backends = pytest.mark.parametrize("backend", backend_params())
cuda_only = pytest.mark.cuda_only


def make(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int, device: torch.device, layout: str = "contiguous"
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    change: Callable[[Tensor], Tensor] = LAYOUTS[layout]
    return [change(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def stashed(tensors: Sequence[Tensor], stash: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors as a stash of this dtype keeps them, and their scales."""
    if stash is not torch.int8:
        return [t.to(stash) for t in tensors], []
    values, scales = zip(*map(quantize, tensors), strict=True)
    return list(values), list(scales)


def restored(tensors: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:
    """What the reference sees of them."""
    from blur_optim.kernels import reference

    return list(reference._in_float64(tensors, scales))


def kernels(backend: str) -> Any:
    return BACKENDS[backend]


def problem_on(device: torch.device, dtype: torch.dtype = torch.float32) -> Problem:
    """The small problem of the optimizer's tests, there."""
    problem = Problem(dtype)
    problem.model.to(device)
    problem.forget_inputs, problem.retain_inputs = problem.forget_inputs.to(device), problem.retain_inputs.to(device)
    problem.params = list(problem.model.parameters())
    return problem


__all__ = [
    "BLEND_TOLERANCE",
    "DOT_TOLERANCE",
    "DTYPES",
    "GRADIENTS",
    "LAYOUTS",
    "PARAMS",
    "SHAPES",
    "backends",
    "cuda_only",
    "kernels",
    "make",
    "problem_on",
    "restored",
    "stashed",
]
