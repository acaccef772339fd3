"""Steps in the metric of the retain loss: the base's own state, stepped by kernels that feed v with g_r alone.

By closures the dots and one fused update are all. By phases the blend that writes the update into ``p.grad`` advances v
too, since g_r is gone afterwards, and the step takes v as it is. Such a step may then not be taken (GradScaler finds an
overflow in the update, zero_grad() abandons it): v has seen that retain gradient all the same. What it has seen is
counted where it sees it, so that its bias correction is right: :data:`blur_optim.step.metric.AHEAD`.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from blur_optim.kernels.layout import Contiguous
from blur_optim.optimizer_wrapper import supports_amp_scaling
from blur_optim.parallel.ranks import Ranks, to_local
from blur_optim.step.fused import has_step_hooks
from blur_optim.step.gradients import take_gradients
from blur_optim.step.metric import AHEAD, MEAN, check_metric_base, check_metric_stash, mean_of, solve_in_metric
from blur_optim.step.metric_pairs import MetricPairs, MetricState, init_state
from blur_optim.step.metric_update import metric_blend_, metric_update_, take_metric_dots
from blur_optim.step.pairs import PairedGradients, Pairs
from blur_optim.step.phases import Phase
from blur_optim.step.plan import Rows
from blur_optim.step.projection import Projection
from blur_optim.step.settings import Settings
from blur_optim.step.stash import real
from blur_optim.step.two_phase import OUTSIDE, Amp, TwoPhaseStep


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
        self._state = MetricState(base)
        # What the step on p.grad is to be taken with: the damping of the dots, and the settings.
        self._pending: tuple[Tensor, Settings] | None = None
        self._is_taken = False  # Whether there was such a step.

    def loaded(self, param_groups: Sequence[Mapping[str, Any]]) -> None:
        self._drop_update()
        self._mean, self._looked_at_v = None, False
        if not all(MEAN in group for group in param_groups):
            for group in self.base.param_groups:  # That of before does not belong to what was loaded.
                group[MEAN] = torch.full_like(group[MEAN], torch.nan)
        for state in self.base.state.values():
            if AHEAD in state:  # torch has cast it to the parameter's dtype, in which a count may not go on.
                state[AHEAD] = state[AHEAD].float()

    def _drop_update(self) -> None:
        # It has fed the v of before, which is gone: a step on it would take the loaded v for one that has seen it.
        if self._pending is None or self.phases.current is not Phase.PROJECTED:
            return
        if not self._is_taken and self.has_gradients():
            warnings.warn(
                "load_state_dict() must not come between the retain phase and opt.step() with metric='retain', got an "
                "update in p.grad that was made in the metric of the state before. It has been dropped; run both "
                "phases again.",
                stacklevel=4,
            )
        self.discard()

    # -- The numbers -------------------------------------------------------------------------------------------------

    def solve(self, gradients: PairedGradients, settings: Settings, grad_scale: Tensor | float | None) -> Projection:
        check_metric_base(self.base)
        mean = self._known_mean()
        if mean is None and not self._looked_at_v:
            self._warn_if_v_is_of_the_update()
        self._looked_at_v = True
        with self._state.made_for(gradients.pairs):
            if mean is None:  # The first step: v-hat of this step itself has to be summed beforehand.
                table = self._table(gradients, settings, None, grad_scale)
                mean = mean_of(table, table.new_zeros(()), None)
            table = self._table(gradients, settings, mean, grad_scale)
            projection = solve_in_metric(table, gradients.rows, settings, grad_scale)
        # For the device to decide: the mean of a skipped step is that of the one before.
        self._next_mean = mean_of(table, projection.found_inf, self._mean)
        self._pending, self._is_taken = (mean, settings), False
        return projection

    def _table(
        self, gradients: PairedGradients, settings: Settings, mean: Tensor | None, grad_scale: Tensor | float | None
    ) -> Tensor:
        if gradients.pairs:
            known = gradients.pairs
            pairs = known if isinstance(known, MetricPairs) else self._state.attached(known, gradients.contiguous)
            self._state.fill_in(pairs, mean, settings.damping, grad_scale)
            gradients.use(pairs)
        return gradients.ranks.sum_(take_metric_dots(gradients, self._state, settings), gradients.facts)

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
                stacklevel=OUTSIDE,
            )

    # -- The step ----------------------------------------------------------------------------------------------------

    def apply(self, gradients: PairedGradients, projection: Projection, settings: Settings, amp: Amp) -> None:
        if has_step_hooks(self.base) or "step" in self.base.__dict__:
            self._blend(gradients, projection, settings)
            gradients.clear()
            self.step_base(amp)
            return
        self._update(gradients, projection.coefficients, projection.found_inf, settings.backend)
        self._keep_mean(projection)

    def write_update(self, settings: Settings, grad_scale: GradScaler | Tensor | float | None) -> None:
        gradients, projection = self.project(settings, grad_scale)
        self._blend(gradients, projection, settings)

    def _blend(self, gradients: PairedGradients, projection: Projection, settings: Settings) -> None:
        if gradients.pairs:
            metric_blend_(gradients, projection.coefficients, projection.found_inf, settings.backend)
            self._state.counts(AHEAD).add_(1 - projection.found_inf)
        self._keep_mean(projection)

    def step_base(self, amp: Amp) -> None:
        """Take the step on the update in ``p.grad``, with v as the retain phase left it, within the base's hooks."""
        if self.phases.current is Phase.IDLE or self._pending is None:
            super().step_base(amp)  # Without gradients, or with a rate of 0.
            return
        mean, settings = self._pending

        def update(*args: Any, **kwargs: Any) -> None:
            gradients = self._update_in_grad()
            if not gradients.pairs:
                return
            pairs = self._state.attached(gradients.pairs, gradients.contiguous)
            self._state.fill_in_given(pairs, mean, settings.damping)
            gradients.use(pairs)
            weight = torch.ones((), dtype=torch.float64, device=pairs.device)
            if (scale := amp.get("grad_scale")) is not None:  # A base that unscales by itself.
                weight = weight / scale.to(weight).reshape(())
            coefficients = torch.stack([torch.zeros_like(weight), weight])[None]
            self._update(gradients, coefficients, self._found_on(pairs.device, amp), settings.backend, is_ahead=True)

        hooked: Any = Optimizer.profile_hook_step(update)
        hooked(self.base)
        self._is_taken = True
        if "step" in self.base.__dict__:  # A scheduler on the base watches whether it has stepped.
            self.base._opt_called = True  # type: ignore[attr-defined]

    def _update_in_grad(self) -> PairedGradients:
        """What lies in ``p.grad``, as retain gradients of one row."""
        plan = self.plan
        taken = take_gradients(plan)
        places = [i for i, grad in enumerate(taken.grads) if grad is not None]
        whole = len(places) == len(plan.params)
        params = plan.params if whole else [plan.params[i] for i in places]
        groups = plan.groups if whole else [plan.groups[i] for i in places]
        retain = [real(to_local(cast(Tensor, taken.grads[i]))) for i in places]
        nothing = {
            kind: torch.empty(0, dtype=kind[0], device=kind[1]) for kind in {(r.dtype, r.device) for r in retain}
        }
        forget = [nothing[r.dtype, r.device] for r in retain]
        if taken.contiguous:
            forget, retain = Contiguous(forget), Contiguous(retain)
        rows = Rows(params, [0] * len(params), groups, [1.0], [1.0])
        pairs = Pairs(params, forget, retain, rows.rows, rows.members, groups)
        return PairedGradients(pairs, rows, Ranks(), contiguous=taken.contiguous)

    def _found_on(self, device: torch.device, amp: Amp) -> Tensor:
        found = torch.zeros((), device=device)
        # What was found in the update holds for as long as p.grad is that update.
        for flag in (self._found_inf if self.is_update else None, amp.get("found_inf")):
            if flag is not None:
                found = torch.maximum(found, flag.to(found).reshape(()))
        return found

    def _update(
        self,
        gradients: PairedGradients,
        coefficients: Tensor,
        found_inf: Tensor,
        backend: str | None,
        is_ahead: bool = False,
    ) -> None:
        """Take the step and count it.

        Args:
            is_ahead: v has seen the retain gradient already, and counted it.
        """
        if not gradients.pairs:
            return
        on_device = supports_amp_scaling(self.base)
        if not on_device and found_inf.item():
            return  # Such a base counts its steps on the host, so the host has to know.
        metric_update_(self.base, gradients, coefficients, found_inf, backend, self.fused.lr)
        taken = 1 - found_inf
        self._state.counts("step").add_(taken if on_device else torch.ones(()))
        if is_ahead:
            self._state.counts(AHEAD).add_(-taken)

    # -- Bookkeeping -------------------------------------------------------------------------------------------------

    def end(self) -> None:
        super().end()
        self._pending = None

    def _warn_if_no_phase(self) -> None:
        if self.phases.current is not Phase.IDLE or not self.has_gradients():
            return
        # torch.distributed.checkpoint makes the state so.
        if all(group["lr"] == 0 for group in self.base.param_groups):
            init_state(self.base, [p for p in self.params() if p.grad is not None])
            return
        raise RuntimeError(
            "opt.step() must have phases before it with metric='retain', got none: the base's own step would feed the "
            "second moments of the retain gradient with what is in p.grad. Give it two closures, or compute the "
            "gradients in `with opt.forget()` and `with opt.retain()`."
        )
