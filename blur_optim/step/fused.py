"""The step of a known base optimizer taken straight from the two gradients, so that the update is never written.

The base keeps its own state, made by its own initialisation: checkpoints move between this path and the base's ``step``
in both directions.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from blur_optim.kernels import FusedBackend, select_backend
from blur_optim.optimizer_wrapper import supports_amp_scaling
from blur_optim.parallel.ranks import to_locals
from blur_optim.step.base_state import BaseState
from blur_optim.step.capturing import is_capturing
from blur_optim.step.fitting import lacks_largest, which_fit
from blur_optim.step.pairs import PairedGradients, Pairs
from blur_optim.step.plan import any_missing
from blur_optim.step.projection import Projection


class FusedStep:
    """The fused step of one base optimizer, and what is kept of it for the next: the places of state and rates."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        self._state: BaseState | None = None
        self._checked: Sequence[Tensor] | None = None  # Of what parameters `_state` is known to be, in this step.
        self._lrs: dict[tuple[float, torch.device], Tensor] = {}

    def why_not(self, gradients: PairedGradients, backend: str | None) -> str:
        """Say why ``base.step()`` has to be taken the plain way; an empty string where it need not."""
        base = self.base
        if type(base) not in _STEPS:
            return f"{type(base).__name__} has no fused update"
        if has_step_hooks(base) or "step" in base.__dict__:
            return "a hook or a wrapper of step may look at p.grad"
        if len(gradients.devices) != 1:
            return "the parameters are on several devices, or none has a gradient"
        chosen = select_backend(backend, gradients.device)
        if not hasattr(chosen, "fused_adamw_"):
            return "the backend has no fused update"
        if any(map(_group_needs_base, base.param_groups)):
            return "a param group is capturable or differentiable, or has tensors for betas or momentum"
        state = self._read_state(gradients)
        if lacks_largest(base, state.entries, gradients.pairs.groups):
            return "a param group has amsgrad, and a state that was made without"  # torch says so, before it counts.
        if not self._fits(gradients, state):
            return "a parameter, gradient or state has an unusual dtype or layout"
        return ""

    def step(self, gradients: PairedGradients, projection: Projection, backend: str | None) -> None:
        """Take the step of ``base`` on the projected update. :meth:`why_not` must have had no objection."""
        if not supports_amp_scaling(self.base) and projection.found_inf.item():
            return  # As on the plain path: such a base counts its steps on the host, so the host has to know.
        kernels = cast(FusedBackend, select_backend(backend, gradients.device))
        for pairs in gradients.batches():
            _STEPS[type(self.base)](self, pairs, projection, kernels)
        self._checked = None

    def lr(self, group: dict[str, Any], device: torch.device) -> Tensor:
        """The learning rate of ``group`` as the kernels take it; the last one where it has not changed."""
        lr = group["lr"]
        if isinstance(lr, Tensor) or is_capturing():
            return learning_rate(group, device)
        if (lr, device) not in self._lrs:
            if len(self._lrs) > 2 * len(self.base.param_groups):  # Those of earlier steps of a schedule.
                self._lrs.clear()
            self._lrs[lr, device] = learning_rate(group, device)
        return self._lrs[lr, device]

    def state_of(self, params: Sequence[Tensor]) -> BaseState:
        """The base's state of ``params``, looked up only where it or they are others than in the last step."""
        if self._state is None or not (self._checked is params or self._state.holds(self.base, params)):
            self._state = BaseState(self.base, params)
        return self._state

    def initialised(self, pairs: Pairs) -> BaseState:
        """The state of ``pairs``, made by Adam itself where it is not there yet."""
        state = self.state_of(pairs.params)
        if not state.entries:
            state.read(_entries(self.base))
        if any_missing(state.entries["step"]):
            for index, _, _ in pairs.spans():
                lists: list[list[Tensor]] = [[] for _ in range(6)]
                cast(Any, self.base)._init_group(self.base.param_groups[index], *lists)
            self._checked = None
            state = self.state_of(pairs.params)
            state.read(_entries(self.base))
        return state

    def _read_state(self, gradients: PairedGradients) -> BaseState:
        self._checked = None
        state = self.state_of(gradients.pairs.params)
        state.read(_entries(self.base))
        self._checked = gradients.pairs.params  # Nothing of the user's runs from here to the end of the step.
        return state

    def _fits(self, gradients: PairedGradients, state: BaseState) -> bool:
        """Whether one loop over memory visits the same element of each parameter, its state and its gradients."""
        pairs = gradients.pairs
        moments = [state.entries[name] for name in _moments(self.base)]
        return not which_fit(state, to_locals(pairs.params), pairs, moments, gradients.contiguous)


def _adam_step(step: FusedStep, pairs: Pairs, projection: Projection, kernels: FusedBackend) -> None:
    base = step.base
    state = step.initialised(pairs)
    params = to_locals(pairs.params)
    exp_avgs, exp_avg_sqs, *others = (to_locals(state.entries[name]) for name in _moments(base))
    # Steps on the device advance there, unless the step is skipped; FusedStep has answered that for those on the host.
    counts = state.counts("step")
    counts.add_(1 - projection.found_inf if supports_amp_scaling(base) else torch.ones(()))
    steps = counts.read(pairs.device, torch.float32)
    coefficients, decoupled = projection.coefficients, isinstance(base, AdamW)
    for index, start, stop in pairs.spans():
        group, part = base.param_groups[index], partial(_part, start, stop)
        beta1, beta2 = group["betas"]
        kernels.fused_adamw_(
            part(params),
            part(exp_avgs),
            part(exp_avg_sqs),
            part(others[0]) if group["amsgrad"] else [],
            part(pairs.forget),
            part(pairs.retain),
            part(pairs.rows),
            coefficients,
            steps[start:stop],
            step.lr(group, pairs.device),
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            decoupled=group.get("decoupled_weight_decay", decoupled),
            found_inf=projection.found_inf,
            scales=part(pairs.scales),
        )


def _sgd_step(step: FusedStep, pairs: Pairs, projection: Projection, kernels: FusedBackend) -> None:
    states = step.state_of(pairs.params).dicts
    stop = 0
    for index, mine in pairs.by_group():
        group, start, stop = step.base.param_groups[index], stop, stop + len(mine)
        if group["momentum"] == 0:
            _sgd_kernel(step, group, mine, [], projection, kernels, first_step=False)
            continue
        buffers: list[Any] = [state.get("momentum_buffer") for state in states[start:stop]]
        new = [i for i, buffer in enumerate(buffers) if buffer is None]
        if new and projection.found_inf.item():
            continue  # A buffer that a skipped step has made would be damped in the next.
        for i in new:
            made = torch.empty_like(mine.params[i], memory_format=torch.preserve_format)
            step.base.state[mine.params[i]]["momentum_buffer"] = buffers[i] = made
        old = sorted(set(range(len(mine))) - set(new)) if new else range(len(mine))
        for first_step, places in ((False, old), (True, new)):
            if places:
                chosen = mine if len(places) == len(mine) else mine.select(places)
                tensors = to_locals(buffers[i] for i in places)
                _sgd_kernel(step, group, chosen, tensors, projection, kernels, first_step=first_step)


def _sgd_kernel(
    step: FusedStep,
    group: dict[str, Any],
    pairs: Pairs,
    momentum_buffers: list[Tensor],
    projection: Projection,
    kernels: FusedBackend,
    first_step: bool,
) -> None:
    kernels.fused_sgd_(
        to_locals(pairs.params),
        momentum_buffers,
        pairs.forget,
        pairs.retain,
        pairs.rows,
        projection.coefficients,
        step.lr(group, pairs.device),
        momentum=group["momentum"],
        dampening=group["dampening"],
        weight_decay=group["weight_decay"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        first_step=first_step,
        found_inf=projection.found_inf,
        scales=pairs.scales,
    )


_STEPS: dict[type[Optimizer], Callable[..., None]] = {AdamW: _adam_step, Adam: _adam_step, SGD: _sgd_step}


def _moments(base: Optimizer) -> tuple[str, ...]:
    """The names of what a step of ``base`` reads and writes beside the parameters."""
    if isinstance(base, SGD):
        return ("momentum_buffer",) if any(group["momentum"] != 0 for group in base.param_groups) else ()
    amsgrad = any(group["amsgrad"] for group in base.param_groups)
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq")


def _entries(base: Optimizer) -> tuple[str, ...]:
    """The names of all that is read of a parameter's state."""
    return _moments(base) if isinstance(base, SGD) else (*_moments(base), "step")


def _part(start: int, stop: int, values: list[Any]) -> list[Any]:
    return values if start == 0 and stop == len(values) else values[start:stop]


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


def learning_rate(group: dict[str, Any], device: torch.device) -> Tensor:
    """0-d float64 on ``device``."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        return lr.to(device, torch.float64)
    return torch.full((), lr, dtype=torch.float64, device=device)
