"""The compiled backend: ``csrc/`` behind torch operators, loaded when it is first needed."""

import functools
import os
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from blur_optim.kernels.layout import as_list
from blur_optim.kernels.unlike_layouts import (
    blend_the_unusual_,
    in_one_order,
    in_order_of_gradients,
    metric_blend_the_unusual_,
)

#: Environment variable that names another build of the extension than the installed one.
LIBRARY_VARIABLE = "BLUR_OPTIM_LIBRARY"
LIBRARY = Path(os.environ.get(LIBRARY_VARIABLE) or Path(__file__).parents[1] / "_C.abi3.so")


@functools.cache
def _load() -> str:
    """Load the library; the reason why it cannot be, or an empty string."""
    if not LIBRARY.exists():
        if os.environ.get(LIBRARY_VARIABLE):
            return f"`{LIBRARY_VARIABLE}` must name a build of the extension, and {LIBRARY} does not exist."
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
        torch.ops.blur_optim.multi_tensor_dots([one], [one], [0], 1, [])
    except RuntimeError as error:
        return f"its kernels do not run on {device}: {error}"
    return ""


def multi_tensor_dots(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    num_rows: int,
    scales: Sequence[Tensor] = (),
) -> Tensor:
    if not forget:
        return torch.zeros(num_rows, 3, dtype=torch.float64)
    forget, retain = in_one_order(forget, retain)
    return cast(Tensor, _op("multi_tensor_dots")(forget, retain, as_list(rows), num_rows, as_list(scales)))


def multi_tensor_blend_(
    retain: Sequence[Tensor],
    forget: Sequence[Tensor],
    coefficients: Tensor,
    rows: Sequence[int],
    scales: Sequence[Tensor] = (),
) -> None:
    r, f, rows, scales = blend_the_unusual_(retain, forget, coefficients, rows, scales)
    if r:
        _op("multi_tensor_blend_")(r, f, coefficients.contiguous(), rows, scales)
        increment_version([x if x.numel() else y for x, y in zip(r, f, strict=True)])


def multi_tensor_metric_dots(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    rows: Sequence[int],
    num_rows: int,
    metric: Tensor,
    scales: Sequence[Tensor] = (),
) -> Tensor:
    if not forget:
        return torch.zeros(num_rows, 9, dtype=torch.float64)
    forget, retain = in_one_order(forget, retain)
    moments = [in_order_of_gradients(v, forget, retain) for v in (exp_avg_sqs, max_exp_avg_sqs)]
    dots = _op("multi_tensor_metric_dots")
    return cast(Tensor, dots(forget, retain, *moments, as_list(rows), num_rows, metric.contiguous(), as_list(scales)))


def multi_tensor_metric_blend_(
    retain: Sequence[Tensor],
    forget: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    coefficients: Tensor,
    rows: Sequence[int],
    metric: Tensor,
    found_inf: Tensor | None,
    scales: Sequence[Tensor] = (),
) -> None:
    r, f, v, rows, metric, scales = metric_blend_the_unusual_(
        retain, forget, exp_avg_sqs, coefficients, rows, metric, found_inf, scales
    )
    if r:
        blend = _op("multi_tensor_metric_blend_")
        blend(r, f, v, coefficients.contiguous(), rows, metric.contiguous(), found_inf, scales)
        increment_version([*v, *(x if x.numel() else y for x, y in zip(r, f, strict=True))])


def multi_tensor_compress_(values: Sequence[Tensor], scales: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    if grads:
        _op("multi_tensor_compress_")(list(values), as_list(scales), list(grads))
        increment_version([*values, *scales])


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
    *,
    scales: Sequence[Tensor] = (),
    **options: Any,
) -> None:
    _op("fused_adamw_")(
        *map(as_list, (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, forget, retain)),
        as_list(rows),
        coefficients.contiguous(),
        steps,
        lr,
        **options,
        scales=as_list(scales),
    )
    increment_version(chain(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs))


def fused_sgd_(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    coefficients: Tensor,
    lr: Tensor,
    *,
    scales: Sequence[Tensor] = (),
    **options: Any,
) -> None:
    _op("fused_sgd_")(
        *map(as_list, (params, momentum_buffers, forget, retain)),
        as_list(rows),
        coefficients.contiguous(),
        lr,
        **options,
        scales=as_list(scales),
    )
    increment_version(chain(params, momentum_buffers))


def metric_adamw_(
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
    metric: Tensor,
    *,
    scales: Sequence[Tensor] = (),
    **options: Any,
) -> None:
    _op("metric_adamw_")(
        *map(as_list, (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, forget, retain)),
        as_list(rows),
        coefficients.contiguous(),
        steps,
        lr,
        metric.contiguous(),
        **options,
        scales=as_list(scales),
    )
    increment_version(chain(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs))


def metric_sgd_(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    coefficients: Tensor,
    lr: Tensor,
    metric: Tensor,
    *,
    scales: Sequence[Tensor] = (),
    **options: Any,
) -> None:
    _op("metric_sgd_")(
        *map(as_list, (params, momentum_buffers, exp_avg_sqs, forget, retain)),
        as_list(rows),
        coefficients.contiguous(),
        lr,
        metric.contiguous(),
        **options,
        scales=as_list(scales),
    )
    increment_version(chain(params, momentum_buffers, exp_avg_sqs))


def _op(name: str) -> Callable[..., Any]:
    if reason := _load():
        raise ImportError(f"The native backend is not available: {reason}")
    return cast(Callable[..., Any], getattr(torch.ops.blur_optim, name))
