"""Steps in the metric of the retain loss: the base's own state, stepped by kernels that feed v with g_r alone.

By closures the dots and one fused update are all. By phases the blend that writes the update into ``p.grad`` advances v
too, since g_r is gone afterwards, and the step takes v as it is. Such a step may then not be taken (GradScaler finds an
overflow in the update, zero_grad() abandons it): v has seen that retain gradient all the same.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW, Optimizer

from blur_optim.kernels import Backend
from blur_optim.optimizer_wrapper import supports_amp_scaling
from blur_optim.parallel.ranks import to_local
from blur_optim.step.fused import has_step_hooks, learning_rate
from blur_optim.step.gradients import Pair, PairedGradients
from blur_optim.step.metric import (
    MEAN,
    block_scales,
    by_kernels,
    check_metric_base,
    check_metric_stash,
    given,
    init_state,
    largest_moments,
    mean_of,
    moments,
    numbers,
    solve_in_metric,
    take_metric_dots,
)
from blur_optim.step.phases import Phase
from blur_optim.step.projection import Projection
from blur_optim.step.settings import Settings
from blur_optim.step.stash import real
from blur_optim.step.two_phase import Amp, TwoPhaseStep


class MetricStep(TwoPhaseStep):
    """The steps of one BLUR with ``metric="retain"``.

    Raises:
        TypeError, ValueError: the base, or one of its param groups, cannot be stepped in the metric.
    """

    def __init__(self, base: Optimizer, stash: str, backend: str | None = None) -> None:
        check_metric_stash(stash)
        check_metric_base(base)
        super().__init__(base, stash, backend)
        #: The mean of v-hat that damps the next step, 0-d; None where the param groups have to be asked.
        self._mean: Tensor | None = None
        self._looked_at_v = False
        # What the step on p.grad is to be taken with: the damping of the dots, and the settings.
        self._pending: tuple[Tensor, Settings] | None = None

    def loaded(self, param_groups: Sequence[Mapping[str, Any]]) -> None:
        self._mean, self._looked_at_v = None, False
        if not all(MEAN in group for group in param_groups):
            for group in self.base.param_groups:  # That of before does not belong to what was loaded.
                group[MEAN] = torch.full_like(group[MEAN], torch.nan)

    # -- The numbers -------------------------------------------------------------------------------------------------

    def solve(self, gradients: PairedGradients, settings: Settings, grad_scale: Tensor | float | None) -> Projection:
        check_metric_base(self.base)
        mean = self._known_mean()
        if mean is None and not self._looked_at_v:
            self._warn_if_v_is_of_the_update()
        self._looked_at_v = True
        with self._new_state(gradients.pairs.params):
            if mean is None:  # The first step: v-hat of this step itself has to be summed beforehand.
                table = self._table(gradients, settings, None, grad_scale)
                mean = mean_of(table, table.new_zeros(()), None)
            table = self._table(gradients, settings, mean, grad_scale)
            projection = solve_in_metric(table, gradients.rows, settings, grad_scale)
        # For the device to decide: the mean of a skipped step is that of the one before.
        self._next_mean = mean_of(table, projection.found_inf, self._mean)
        self._pending = mean, settings
        self._numbers = partial(_numbers, self.base, mean, settings.damping, grad_scale)
        return projection

    @contextmanager
    def _new_state(self, params: Sequence[Tensor]) -> Iterator[None]:
        """With the state that the dots read; what is new of it is gone again where they, or the rule, fail."""
        before = {p: dict(self.base.state[p]) if p in self.base.state else None for p in params}
        try:
            init_state(self.base, params)
            yield
        except BaseException:
            for p, state in before.items():
                if state is None:
                    self.base.state.pop(p, None)
                else:
                    self.base.state[p] = state
            raise

    def _table(
        self, gradients: PairedGradients, settings: Settings, mean: Tensor | None, grad_scale: Tensor | float | None
    ) -> Tensor:
        return gradients.ranks.sum_(take_metric_dots(self.base, gradients, settings, mean, grad_scale), gradients.facts)

    def _known_mean(self) -> Tensor | None:
        """The mean that the step before left, here or in a checkpoint. Reads it on the host where it is new to us."""
        if self._mean is None:
            for group in self.base.param_groups:
                mean = group.get(MEAN)
                if mean is not None and (active_fake_mode() is not None or bool(mean.isfinite())):
                    self._mean = mean
                    break
        return self._mean

    def _keep_mean(self, projection: Projection) -> None:
        if self._mean is None and active_fake_mode() is None and projection.found_inf.item():
            return  # Still unknown: the next step sums it beforehand again.
        self._mean = self._next_mean
        for group in self.base.param_groups:
            group[MEAN] = self._mean

    def _warn_if_v_is_of_the_update(self) -> None:
        if any("exp_avg_sq" in state for state in self.base.state.values()):
            warnings.warn(
                "`exp_avg_sq` in this optimizer's state is not the second moment of the retain gradient, as far as is "
                "known: it comes from a run without metric='retain'. It is used and forgotten at the rate of beta2; to "
                "start from the retain gradient alone, load no optimizer state.",
                stacklevel=2,
            )

    # -- The step ----------------------------------------------------------------------------------------------------

    def apply(self, gradients: PairedGradients, projection: Projection, settings: Settings, amp: Amp) -> None:
        if has_step_hooks(self.base) or "step" in self.base.__dict__:
            self._blend(gradients, projection, settings)
            gradients.clear()
            self.step_base(amp)
            return
        batches = (pairs.each() for pairs in gradients.batches())
        self._update(batches, projection.coefficients, projection.found_inf, settings.backend, self._numbers)
        self._keep_mean(projection)

    def write_update(self, settings: Settings, grad_scale: GradScaler | Tensor | float | None) -> None:
        gradients, projection = self.project(settings, grad_scale)
        self._blend(gradients, projection, settings)

    def _blend(self, gradients: PairedGradients, projection: Projection, settings: Settings) -> None:
        for batch in gradients.batches():
            device = batch.device
            for kernels, pairs in by_kernels(self.base, batch.each(), settings.backend):
                kernels.multi_tensor_metric_blend_(
                    [pair.retain for pair in pairs],
                    [pair.forget for pair in pairs],
                    moments(self.base, pairs, "exp_avg_sq"),
                    projection.coefficients.to(device, non_blocking=True),
                    [pair.row for pair in pairs],
                    self._numbers(pairs),
                    projection.found_inf.to(device, non_blocking=True),
                    block_scales(pairs),
                )
        self._keep_mean(projection)

    def step_base(self, amp: Amp) -> None:
        """Take the step on the update in ``p.grad``, with v as the retain phase left it, within the base's hooks."""
        if self.phases.current is Phase.IDLE or self._pending is None:
            super().step_base(amp)  # Without gradients, or with a rate of 0.
            return
        mean, settings = self._pending

        def update(*args: Any, **kwargs: Any) -> None:
            batches = self._batches_of_update()
            if not batches:
                return
            device = batches[0][0].device
            weight = torch.ones((), dtype=torch.float64, device=device)
            if (scale := amp.get("grad_scale")) is not None:  # A base that unscales by itself.
                weight = weight / scale.to(weight).reshape(())
            self._update(
                batches,
                torch.stack([torch.zeros_like(weight), weight])[None],
                self._found_on(device, amp),
                settings.backend,
                lambda pairs: given(numbers(self.base, pairs, mean, settings.damping)),
            )

        hooked: Any = Optimizer.profile_hook_step(update)
        hooked(self.base)
        if "step" in self.base.__dict__:  # A scheduler on the base watches whether it has stepped.
            self.base._opt_called = True  # type: ignore[attr-defined]

    def _batches_of_update(self) -> list[list[Pair]]:
        """What lies in ``p.grad``, as retain gradients with a weight of 1, by device."""
        by_device: dict[torch.device, list[Pair]] = {}
        for index, group in enumerate(self.base.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    update = real(to_local(p.grad))
                    pair = Pair(p, update.new_empty(0), update, 0, index)
                    by_device.setdefault(pair.device, []).append(pair)
        return list(by_device.values())

    def _found_on(self, device: torch.device, amp: Amp) -> Tensor:
        found = torch.zeros((), device=device)
        # What was found in the update holds for as long as p.grad is that update.
        is_update = self._witness is not None and self._witness[0].grad is self._witness[1]
        for flag in (self._found_inf if is_update else None, amp.get("found_inf")):
            if flag is not None:
                found = torch.maximum(found, flag.to(found).reshape(()))
        return found

    def _update(
        self,
        batches: Iterable[Sequence[Pair]],
        coefficients: Tensor,
        found_inf: Tensor,
        backend: str | None,
        numbers_of: Callable[[Sequence[Pair]], Tensor],
    ) -> None:
        """One pass over parameters, state and gradients, and the step counts."""
        on_device = supports_amp_scaling(self.base)
        if not on_device and found_inf.item():
            return  # Such a base counts its steps on the host, so the host has to know.
        for batch in batches:
            for kernels, pairs in by_kernels(self.base, batch, backend):
                for index, mine in groupby(pairs, key=lambda pair: pair.group):
                    of_group = list(mine)
                    arguments = kernels, of_group, coefficients, found_inf, numbers_of(of_group)
                    step = self._sgd if isinstance(self.base, SGD) else self._adam
                    if not step(self.base.param_groups[index], *arguments):
                        continue
                    steps = [self.base.state[pair.param]["step"] for pair in of_group]
                    torch._foreach_add_(steps, 1 - found_inf.to(steps[0]) if on_device else 1)

    def _adam(
        self,
        group: dict[str, Any],
        kernels: Backend,
        pairs: list[Pair],
        coefficients: Tensor,
        found_inf: Tensor,
        metric: Tensor,
    ) -> bool:
        device = pairs[0].device
        steps = torch.stack([self.base.state[pair.param]["step"] for pair in pairs]).to(device, torch.float32)
        kernels.metric_adamw_(
            [real(to_local(pair.param)) for pair in pairs],
            moments(self.base, pairs, "exp_avg"),
            moments(self.base, pairs, "exp_avg_sq"),
            largest_moments(self.base, pairs),
            [pair.forget for pair in pairs],
            [pair.retain for pair in pairs],
            [pair.row for pair in pairs],
            coefficients.to(device, non_blocking=True),
            steps + 1,
            learning_rate(group, device),
            metric,
            beta1=group["betas"][0],
            weight_decay=group["weight_decay"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            decoupled=group.get("decoupled_weight_decay", isinstance(self.base, AdamW)),
            found_inf=found_inf.to(device, non_blocking=True),
            scales=block_scales(pairs),
        )
        return True

    def _sgd(
        self,
        group: dict[str, Any],
        kernels: Backend,
        pairs: list[Pair],
        coefficients: Tensor,
        found_inf: Tensor,
        metric: Tensor,
    ) -> bool:
        has_momentum = group["momentum"] != 0
        new = [has_momentum and self.base.state[pair.param].get("momentum_buffer") is None for pair in pairs]
        if any(new) and found_inf.item():
            return False  # A buffer that a skipped step has made would be damped in the next.
        device = pairs[0].device
        for first_step in sorted(set(new)):
            index = [i for i, is_new in enumerate(new) if is_new == first_step]
            mine = [pairs[i] for i in index]
            if first_step:
                for pair in mine:
                    buffer = torch.empty_like(pair.param, memory_format=torch.preserve_format)
                    self.base.state[pair.param]["momentum_buffer"] = buffer
            kernels.metric_sgd_(
                [real(to_local(pair.param)) for pair in mine],
                moments(self.base, mine, "momentum_buffer") if has_momentum else [],
                moments(self.base, mine, "exp_avg_sq"),
                [pair.forget for pair in mine],
                [pair.retain for pair in mine],
                [pair.row for pair in mine],
                coefficients.to(device, non_blocking=True),
                learning_rate(group, device),
                metric if len(mine) == len(pairs) else metric[index],
                momentum=group["momentum"],
                dampening=group["dampening"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                first_step=first_step,
                found_inf=found_inf.to(device, non_blocking=True),
                scales=block_scales(mine),
            )
        return True

    # -- Bookkeeping -------------------------------------------------------------------------------------------------

    def end(self) -> None:
        super().end()
        self._pending = None

    def _warn_if_no_phase(self) -> None:
        if self.phases.current is not Phase.IDLE or not self.has_gradients():
            return
        if all(
            group["lr"] == 0 for group in self.base.param_groups
        ):  # torch.distributed.checkpoint makes the state so.
            init_state(self.base, [p for p in self.params() if p.grad is not None])
            return
        raise RuntimeError(
            "opt.step() must have phases before it with metric='retain', got none: the base's own step would feed the "
            "second moments of the retain gradient with what is in p.grad. Give it two closures, or compute the "
            "gradients in `with opt.forget()` and `with opt.retain()`."
        )


def _numbers(
    base: Optimizer, mean: Tensor, damping: float, grad_scale: Tensor | float | None, pairs: Sequence[Pair]
) -> Tensor:
    return numbers(base, pairs, mean, damping, grad_scale)
