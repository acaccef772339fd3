"""The step of a known base optimizer taken straight from the two gradients, so that the update is never written.

The base keeps its own state, made by its own initialisation: checkpoints move between this path and the base's ``step``
in both directions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from blur_optim.kernels import FusedBackend, select_backend
from blur_optim.kernels.layout import dense_alike, is_dense
from blur_optim.optimizer_wrapper import supports_amp_scaling
from blur_optim.parallel.ranks import to_local
from blur_optim.step.gradients import Pair, PairedGradients
from blur_optim.step.projection import Projection, block_scales

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def why_not_fused(base: Optimizer, gradients: PairedGradients, backend: str | None) -> str:
    """Say why ``base.step()`` has to be taken the plain way; an empty string where it need not."""
    if type(base) not in _STEPS:
        return f"{type(base).__name__} has no fused update"
    if has_step_hooks(base) or "step" in base.__dict__:
        return "a hook or a wrapper of step may look at p.grad"
    if len(gradients.devices) != 1:
        return "the parameters are on several devices, or none has a gradient"
    chosen = select_backend(backend, gradients.device)
    if not hasattr(chosen, "fused_adamw_"):
        return "the backend has no fused update"
    if any(_group_needs_base(group) for group in base.param_groups):
        return "a param group is capturable or differentiable, or has tensors for betas or momentum"
    if not all(fits(pair, base.state.get(pair.param, {})) for pair in gradients.pairs):
        return "a parameter, gradient or state has an unusual dtype or layout"
    return ""


def fused_step(base: Optimizer, gradients: PairedGradients, projection: Projection, backend: str | None) -> None:
    """Take the step of ``base`` on the projected update. ``why_not_fused`` must have had no objection."""
    if not supports_amp_scaling(base) and projection.found_inf.item():
        return  # As on the plain path: such a base counts its steps on the host, so the host has to know.
    kernels = cast(FusedBackend, select_backend(backend, gradients.device))
    for index, group in enumerate(base.param_groups):
        batches = (pairs for _, _, pairs in gradients.batches(index))
        _STEPS[type(base)](base, group, batches, projection, kernels)


def _adam_step(
    base: Optimizer, group: dict[str, Any], batches: Iterable[list[Pair]], projection: Projection, kernels: FusedBackend
) -> None:
    params: list[Tensor] = []
    lists: list[list[Tensor]] = [[] for _ in range(5)]
    cast(Any, base)._init_group(group, params, *lists)
    # Steps on the device advance there, unless the step is skipped; fused_step has answered that for those on the host.
    advance = 1 - projection.found_inf if supports_amp_scaling(base) else torch.ones(())
    torch._foreach_add_(lists[4], [advance] * len(params))
    beta1, beta2 = group["betas"]
    for pairs in batches:
        _, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps = _of_pairs(pairs, params, lists)
        device = pairs[0].device
        kernels.fused_adamw_(
            _locals(pair.param for pair in pairs),
            _locals(exp_avgs),
            _locals(exp_avg_sqs),
            _locals(max_exp_avg_sqs),
            *_gradient_arguments(pairs, projection),
            torch.stack(state_steps).to(device, torch.float32, non_blocking=True),
            learning_rate(group, device),
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            decoupled=group.get("decoupled_weight_decay", isinstance(base, AdamW)),
            found_inf=projection.found_inf,
            scales=block_scales(pairs),
        )


def _sgd_step(
    base: Optimizer, group: dict[str, Any], batches: Iterable[list[Pair]], projection: Projection, kernels: FusedBackend
) -> None:
    has_momentum = group["momentum"] != 0
    for pairs in batches:
        new = [has_momentum and base.state[pair.param].get("momentum_buffer") is None for pair in pairs]
        if any(new) and projection.found_inf.item():
            return  # A buffer that a skipped step has made would be damped in the next.
        for first_step in set(new):
            mine = [pair for pair, is_new in zip(pairs, new, strict=True) if is_new == first_step]
            if first_step:
                for pair in mine:
                    buffer = torch.empty_like(pair.param, memory_format=torch.preserve_format)
                    base.state[pair.param]["momentum_buffer"] = buffer
            kernels.fused_sgd_(
                _locals(pair.param for pair in mine),
                _locals(base.state[pair.param]["momentum_buffer"] for pair in mine) if has_momentum else [],
                *_gradient_arguments(mine, projection),
                learning_rate(group, mine[0].device),
                momentum=group["momentum"],
                dampening=group["dampening"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                first_step=first_step,
                found_inf=projection.found_inf,
                scales=block_scales(mine),
            )


_STEPS: dict[type[Optimizer], Callable[..., None]] = {AdamW: _adam_step, Adam: _adam_step, SGD: _sgd_step}


def _of_pairs(pairs: list[Pair], params: list[Tensor], lists: list[list[Tensor]]) -> list[list[Tensor]]:
    """What the lists, which follow ``params``, hold for these pairs; both are in the order of the group."""
    if len(pairs) == len(params):
        return lists
    index = {id(p): i for i, p in enumerate(params)}
    return [[values[index[id(pair.param)]] for pair in pairs] if values else [] for values in lists]


def _locals(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [to_local(t) for t in tensors]


def _gradient_arguments(
    pairs: Sequence[Pair], projection: Projection
) -> tuple[list[Tensor], list[Tensor], list[int], Tensor]:
    rows = [pair.row for pair in pairs]
    return [pair.forget for pair in pairs], [pair.retain for pair in pairs], rows, projection.coefficients


def learning_rate(group: dict[str, Any], device: torch.device) -> Tensor:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        return lr.to(device, torch.float64)
    return torch.full((), lr, dtype=torch.float64, device=device)


def has_step_hooks(base: Optimizer) -> bool:
    return bool(
        base._optimizer_step_pre_hooks
        or base._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )


def _group_needs_base(group: dict[str, Any]) -> bool:
    numbers = (*group.get("betas", ()), group.get("momentum", 0.0), group["weight_decay"], group.get("eps", 0.0))
    return bool(
        group.get("capturable") or group.get("differentiable") or any(isinstance(value, Tensor) for value in numbers)
    )


def fits(pair: Pair, state: Mapping[str, Any]) -> bool:
    """Whether one loop over memory visits the same element of the parameter, its state and its gradients."""
    p = to_local(pair.param)
    dtype, forget, retain = p.dtype, pair.forget, pair.retain
    # Of a subclass with a dispatch of its own (torchao's weights of 8 bits) the memory is something else.
    if (
        is_traceable_wrapper_subclass(p)
        or dtype not in _FLOATS
        or (retain.dtype != dtype and (dtype != torch.float32 or retain.dtype not in (torch.bfloat16, torch.float16)))
    ):
        return False
    moments = [to_local(state[name]) for name in _MOMENTS if state.get(name) is not None]
    contiguous = p.is_contiguous() and forget.is_contiguous() and retain.is_contiguous()
    for moment in moments:
        if moment.dtype != dtype:
            return False
        contiguous = contiguous and moment.is_contiguous()
    if contiguous:
        return True
    others = [grad for grad in (forget, retain) if grad.numel()] + moments
    return is_dense(p) and all(dense_alike(p, t) for t in others)
