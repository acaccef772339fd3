"""The compiled backend: ``csrc/`` behind torch operators, loaded when it is first needed."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from blur_optim.kernels import foreach

LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"


@functools.cache
def _load() -> str:
    """Load the library; the reason why it cannot be, or an empty string."""
    if not LIBRARY.exists():
        return (
            "the extension is not built. Install from source with a C++ compiler at hand, or a wheel that holds it; "
            "`python -m blur_optim.env` shows what was found."
        )
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the extension does not load: {error}"
    from blur_optim.kernels import schema  # noqa: F401  (fake implementations; they need the operators)

    return ""


def why_not(device: torch.device) -> str:
    """Say why this backend cannot serve ``device``; an empty string where it can."""
    if device.type not in ("cpu", "cuda"):
        return f"the extension has no kernels for {device.type}."
    if device.type == "cuda" and torch.version.cuda is None:
        return "this torch has no CUDA."
    return _load() or (_why_not_cuda(device) if device.type == "cuda" else "")


@functools.cache
def _why_not_cuda(device: torch.device) -> str:
    if not torch._C._dispatch_has_kernel_for_dispatch_key("blur_optim::multi_tensor_dots", "CUDA"):
        return "the extension was built without CUDA. Install from source with nvcc at hand and BLUR_OPTIM_CUDA=1."
    try:  # Whether the device or the driver is too old is known when a kernel is launched, and without waiting for it.
        one = torch.zeros(1, device=device)
        torch.ops.blur_optim.multi_tensor_dots([one], [one], [0], 1)
    except RuntimeError as error:
        return f"its kernels do not run on {device}: {error}"
    return ""


def multi_tensor_dots(forget: Sequence[Tensor], retain: Sequence[Tensor], rows: Sequence[int], num_rows: int) -> Tensor:
    if not forget:
        return torch.zeros(num_rows, 3, dtype=torch.float64)
    pairs = [_alike(f, r) for f, r in zip(forget, retain, strict=True)]
    dots = _op("multi_tensor_dots")([f for f, _ in pairs], [r for _, r in pairs], list(rows), num_rows)
    return cast(Tensor, dots)


def multi_tensor_blend_(
    retain: Sequence[Tensor], forget: Sequence[Tensor], coefficients: Tensor, rows: Sequence[int]
) -> None:
    # A result of unusual layout is written by the other backend: flattening it here would write to a copy.
    dense: list[int] = []
    for i, (r, f) in enumerate(zip(retain, forget, strict=True)):
        if _dense_alike(r, f) if r.numel() and f.numel() else (r if r.numel() else f).is_contiguous():
            dense.append(i)
        else:
            foreach.multi_tensor_blend_([r], [f], coefficients, [rows[i]])
    if dense:
        mine = [retain[i] for i in dense], [forget[i] for i in dense]
        _op("multi_tensor_blend_")(*mine, coefficients.contiguous(), [rows[i] for i in dense])
        increment_version([r if r.numel() else f for r, f in zip(*mine, strict=True)])


def fused_adamw_(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    coefficients: Tensor,
    steps: Tensor,
    lr: Tensor,
    **options: Any,
) -> None:
    _op("fused_adamw_")(
        *(list(tensors) for tensors in (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, forget, retain)),
        list(rows),
        coefficients.contiguous(),
        steps,
        lr,
        **options,
    )
    increment_version([*params, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs])


def fused_sgd_(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    coefficients: Tensor,
    lr: Tensor,
    **options: Any,
) -> None:
    _op("fused_sgd_")(
        *(list(tensors) for tensors in (params, momentum_buffers, forget, retain)),
        list(rows),
        coefficients.contiguous(),
        lr,
        **options,
    )
    increment_version([*params, *momentum_buffers])


def _op(name: str) -> Callable[..., Any]:
    if reason := _load():
        raise ImportError(f"The native backend is not available: {reason}")
    return cast(Callable[..., Any], getattr(torch.ops.blur_optim, name))


def _alike(f: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The pair in one memory order: as it is where both have the same dense layout, else copies."""
    if f.numel() and r.numel() and _dense_alike(f, r):
        return f, r
    return f.contiguous(), r.contiguous()


def _dense_alike(f: Tensor, r: Tensor) -> bool:
    if f.is_contiguous() and r.is_contiguous():
        return True
    return f.stride() == r.stride() and is_dense(f)


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill a block of memory without gap or overlap, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.size(), strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
