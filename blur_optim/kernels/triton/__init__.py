"""The Triton backend: for GPUs where the compiled extension is not there.

An operation is one launch for all tensors of a kind (dtypes, which gradients are there, alignment), not one per tensor:
launching costs the host 10 us and more, which a list of thousands of biases and norm weights would pay for each. The
kernels therefore read addresses from a table, which goes to the device in one copy from pinned memory, behind the
kernels that are queued already; the host waits for nothing. A step has one kind, or a few. Nothing is autotuned: trial
runs of a kernel that works in place would apply the update again.

The sums have the same bits for the same lists of shapes, dtypes, values and alignments (to 16 bytes). A tensor that
starts elsewhere is read in another order, and its float64 sums may differ in the last bit.

Triton is imported, and each kernel compiled, at its first use.
"""

import functools
import importlib.util
import itertools
import math
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from blur_optim.kernels.triton import launch
from blur_optim.kernels.triton.checks import checked_metric
from blur_optim.kernels.unlike_layouts import (
    blend_the_unusual_,
    in_one_order,
    in_order_of_gradients,
    metric_blend_the_unusual_,
)


def why_not(device: torch.device) -> str:
    """Say why this backend cannot serve ``device``; an empty string where it can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return f"Triton has no kernels for {device.type}, except in its interpreter, for tests: TRITON_INTERPRET=1."
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed. `pip install triton`, or a build of torch that brings it."
    if device.type == "cuda" and not interpreted:
        return _why_not_compile(device)
    return ""


@functools.cache
def _why_not_compile(device: torch.device) -> str:
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton compiles its launcher with a C compiler, and there is none. Install gcc, or set CC."
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels are for NVIDIA GPUs of compute capability 8.0 or more."
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
    code = launch.device_code()
    device = forget[0].device
    plan = launch.make_plan(forget, retain, scales, {}, rows, num_rows)
    partials = torch.empty(plan.num_chunks, 3, dtype=torch.float64, device=device)
    dots = torch.empty(num_rows, 3, dtype=torch.float64, device=device)
    launch.run_plan(code.dots_kernel, plan, partials)
    launch.sum_rows(partials, plan.row_starts, dots)
    return dots


def multi_tensor_blend_(
    retain: Sequence[Tensor],
    forget: Sequence[Tensor],
    coefficients: Tensor,
    rows: Sequence[int],
    scales: Sequence[Tensor] = (),
) -> None:
    r, f, rows, scales = blend_the_unusual_(retain, forget, coefficients, rows, scales)
    if not r:
        return
    plan = launch.make_plan(f, r, scales, {}, rows, len(coefficients))
    increment_version(x if x.numel() else y for x, y in zip(r, f, strict=True))
    launch.run_plan(launch.device_code().blend_kernel, plan, coefficients.contiguous())


def multi_tensor_compress_(values: Sequence[Tensor], scales: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    if grads:
        plan = launch.make_plan(values, grads, scales, {}, [0] * len(grads), 1)
        increment_version([*values, *scales])
        launch.run_plan(launch.device_code().compress_kernel, plan)


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
    state: dict[str, Sequence[Tensor]] = {"exp_avg_sqs": in_order_of_gradients(exp_avg_sqs, forget, retain)}
    if max_exp_avg_sqs:
        state["max_exp_avg_sqs"] = in_order_of_gradients(max_exp_avg_sqs, forget, retain)
    device = forget[0].device
    plan = launch.make_plan(forget, retain, scales, state, rows, num_rows)
    partials = torch.empty(plan.num_chunks, 9, dtype=torch.float64, device=device)
    dots = torch.empty(num_rows, 9, dtype=torch.float64, device=device)
    launch.run_plan(
        launch.device_code().metric_dots_kernel,
        plan,
        partials,
        checked_metric(metric, len(forget)),
        AMSGRAD=len(state) == 2,
    )
    launch.sum_rows(partials, plan.row_starts, dots)
    return dots


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
    if not r:
        return
    plan = launch.make_plan(f, r, scales, {"exp_avg_sqs": v}, rows, len(coefficients))
    increment_version([*v, *(x if x.numel() else y for x, y in zip(r, f, strict=True))])
    arguments = coefficients.contiguous(), checked_metric(metric, len(r)), found_inf
    launch.run_plan(launch.device_code().metric_blend_kernel, plan, *arguments)


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
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    found_inf: Tensor | None,
    scales: Sequence[Tensor] = (),
    metric: Tensor | None = None,
) -> None:
    if not params:
        return
    if steps.shape != (len(params),):
        raise ValueError(f"`steps` must have shape ({len(params)},) like `params`, got {tuple(steps.shape)}.")
    code = launch.device_code()
    state = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if amsgrad:
        state["max_exp_avg_sqs"] = max_exp_avg_sqs
    # In the order in which the kernels read them; float64, which an argument of a Triton kernel cannot be.
    sign = -1.0 if maximize else 1.0
    numbers = [sign, beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, _log(beta1), _log(beta2)]
    plan = launch.make_plan(forget, retain, scales, state, rows, len(coefficients), numbers)
    sizes = torch.empty(len(params), 2, dtype=torch.float64, device=params[0].device)
    launch.run(code.adam_step_sizes_kernel, (len(params),), steps.contiguous(), lr, plan.numbers, sizes)
    arguments = (coefficients.contiguous(), plan.numbers, sizes, lr, found_inf, checked_metric(metric, len(params)))
    increment_version(itertools.chain(*state.values()))
    launch.run_plan(code.adam_kernel, plan, *arguments, AMSGRAD=amsgrad, DECOUPLED=decoupled)


def fused_sgd_(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    coefficients: Tensor,
    lr: Tensor,
    *,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
    found_inf: Tensor | None,
    scales: Sequence[Tensor] = (),
    exp_avg_sqs: Sequence[Tensor] = (),
    metric: Tensor | None = None,
) -> None:
    if not params:
        return
    state = {"params": params}
    if momentum != 0:
        state["momentum_buffers"] = momentum_buffers
    if metric is not None:
        state["exp_avg_sqs"] = exp_avg_sqs
    numbers = [-1.0 if maximize else 1.0, weight_decay, momentum, 1 - dampening]
    plan = launch.make_plan(forget, retain, scales, state, rows, len(coefficients), numbers)
    arguments = (coefficients.contiguous(), plan.numbers, lr, found_inf, checked_metric(metric, len(params)))
    increment_version(itertools.chain(*state.values()))
    flags = {"MOMENTUM": momentum != 0, "NESTEROV": nesterov, "FIRST_STEP": first_step}
    launch.run_plan(launch.device_code().sgd_kernel, plan, *arguments, **flags)


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
    **options: Any,
) -> None:
    state, gradients = (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs), (forget, retain, rows, coefficients)
    fused_adamw_(*state, *gradients, steps, lr, beta2=0.0, eps=0.0, metric=metric, **options)


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
    **options: Any,
) -> None:
    gradients = (forget, retain, rows, coefficients)
    fused_sgd_(params, momentum_buffers, *gradients, lr, exp_avg_sqs=exp_avg_sqs, metric=metric, **options)


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf
