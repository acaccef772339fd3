"""A step from its first forget gradient to the base optimizer's own update: what BLUR's methods run.

:mod:`blur_optim.step` lists the rooms that the data comes through; here is the order.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from blur_optim.parallel.ranks import Ranks
from blur_optim.parallel.wrappers import Wrappers
from blur_optim.step.base import check_differentiable, check_no_scaler, step_base
from blur_optim.step.capture import check_capture
from blur_optim.step.capturing import is_capturing
from blur_optim.step.fused import FusedStep
from blur_optim.step.gradients import pair_gradients, take_gradients
from blur_optim.step.metric import leave_metric
from blur_optim.step.nothing import unreached, why_nothing_moves
from blur_optim.step.pairs import PairedGradients
from blur_optim.step.phases import Phase
from blur_optim.step.plan import any_missing
from blur_optim.step.projection import Projection, blend_, project
from blur_optim.step.recompute import recompute
from blur_optim.step.settings import Settings
from blur_optim.step.stash import STASHES
from blur_optim.step.under_way import UnderWay

OUTSIDE = 9  # How many calls a warning about a step is away from the user's own line, with torch's wrappers; about.

Closure = Callable[[], Any]
Amp = dict[str, Tensor | None]


class TwoPhaseStep(UnderWay):
    """The steps of one BLUR, one after another.

    What takes gradients from elsewhere than ``p.grad`` gives ``wrappers`` and ``ranks`` of its own, with the methods of
    these two classes, and perhaps other :meth:`groups`; what takes the base's step otherwise overrides :meth:`apply`
    and :meth:`step_base`, as :class:`blur_optim.step.metric_step.MetricStep` does.

    Args:
        base: the optimizer that takes the update.
        stash: a key of :data:`blur_optim.step.stash.STASHES`.
        backend: of the kernels that compress what waits there.
        ranks: over which the dots are summed.
        wrappers: asked when a phase begins and ends.

    Attributes:
        last: what the last projection saw.
        skipped: 0-d int64, the steps skipped so far because a gradient was not finite.
    """

    def __init__(
        self,
        base: Optimizer,
        stash: str,
        backend: str | None = None,
        ranks: Ranks | None = None,
        wrappers: Wrappers | None = None,
    ) -> None:
        super().__init__(base, STASHES[stash](backend), Wrappers() if wrappers is None else wrappers)
        self.two_evaluations, self.fused = stash == "recompute", FusedStep(base)
        self.ranks = Ranks() if ranks is None else ranks
        self.last: Projection | None = None
        self.skipped = torch.zeros((), dtype=torch.int64)
        self._warned = self._said_nothing = False

    # -- By closures -------------------------------------------------------------------------------------------------

    def step(self, forget: Closure, retain: Closure, settings: Settings, amp: Amp) -> tuple[Any, Any]:
        """Run both closures and take the step; no gradient is left afterwards."""
        self.drop_zeros()
        with self.abandoning_on_error():
            self.phases.check_closures(self.has_gradients())
            check_no_scaler(amp)
            self._begin_forget(False, settings, by_phases=False)
            forget_loss = self._evaluate(forget, "forget", self.has_gradients)
            self._end_forget()
            self.begin_retain(has_gradients=False)
            if self.two_evaluations:
                retain_loss, gradients, projection = self._recompute(retain, settings)
            else:
                retain_loss = self._evaluate(retain, "retain", self.has_gradients)
                self.end_retain()
                gradients, projection = self.project(settings, None)
            self.apply(gradients, projection, settings, amp)
            del gradients
        self.discard()
        return forget_loss, retain_loss

    def apply(self, gradients: PairedGradients, projection: Projection, settings: Settings, amp: Amp) -> None:
        """Take the base's step on the projected update: in one pass where the base is known, else by way of p.grad."""
        if not self.fused.why_not(gradients, settings.backend):
            self.fused.step(gradients, projection, settings.backend)
            return
        blend_(gradients, projection.coefficients, settings.backend)
        gradients.clear()  # The forget gradients: the base's step must not find them in memory.
        self.step_base(amp)

    def _evaluate(self, closure: Closure, name: str, has_gradients: Callable[[], bool]) -> Any:
        with torch.enable_grad():
            loss = closure()
            missing = loss is not None and not has_gradients() and not self.wrappers.holds_back(self.plan.dtensors)
            if missing and isinstance(loss, Tensor) and loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
                self._check_reached(name, has_gradients)
                missing = False
        if not missing:
            # Detached, so that the graph of the forget loss does not live through the retain phase.
            return loss.detach() if isinstance(loss, Tensor) else loss
        raise RuntimeError(
            f"`{name}` must call backward, or return a differentiable loss, got {loss!r} and no gradient. Return None "
            "where there is nothing to compute in this step."
        )

    def _check_reached(self, name: str, has_gradients: Callable[[], bool]) -> None:
        plan = self.plan
        self.ranks.update(plan.params, plan.dtensors)
        # With many ranks, others may have the parameters that this loss depends on.
        if plan.params and not (self.ranks.are_many or has_gradients() or self.wrappers.holds_back(plan.dtensors)):
            raise unreached(name, plan.params)

    # -- By phases ---------------------------------------------------------------------------------------------------

    @contextmanager
    def forget_phase(self, settings: Settings) -> Iterator[None]:
        """The forget gradients are computed within, and wait in the stash afterwards."""
        self.drop_zeros()
        with self.abandoning_on_error():
            self._begin_forget(self.has_gradients(), settings, by_phases=True)
            yield
            self._end_forget()

    def _begin_forget(self, has_gradients: bool, settings: Settings, by_phases: bool) -> None:
        self.phases.begin_forget(has_gradients)
        check_differentiable(self.base.param_groups)
        if is_capturing():
            check_capture(self.base, self.plan.params, self.stash, settings, by_phases, self.two_evaluations)
        self.wrappers.begin(self.plan.params)

    def _end_forget(self) -> None:
        self.phases.end_forget()
        plan = self.plan
        self.wrappers.end(plan.params, plan.dtensors, "forget")
        plan = self.plan  # An engine may know only now what it has gradients of.
        self.stash.take(plan.params, *take_gradients(plan))

    def begin_retain(self, has_gradients: bool | None = None) -> None:
        self.phases.begin_retain(self.has_gradients() if has_gradients is None else has_gradients)
        self.wrappers.begin(self.plan.params)

    def end_retain(self) -> None:
        self.phases.end_retain()
        plan = self.plan
        self.wrappers.end(plan.params, plan.dtensors, "retain")

    @contextmanager
    def retain_phase(
        self, settings: Callable[[], Settings], grad_scale: GradScaler | Tensor | float | None
    ) -> Iterator[None]:
        """The retain gradients are computed within; afterwards ``p.grad`` holds the update.

        Args:
            settings: asked when the phase ends.
        """
        with self.abandoning_on_error():
            self.begin_retain()
            yield
            self.end_retain()
            with torch.no_grad():
                self.write_update(settings(), grad_scale)

    def write_update(self, settings: Settings, grad_scale: GradScaler | Tensor | float | None) -> None:
        """Leave the update in ``p.grad``."""
        gradients, projection = self.project(settings, grad_scale)
        blend_(gradients, projection.coefficients, settings.backend)

    def step_on_update(self, amp: Amp) -> None:
        """Step on ``p.grad``, which holds the update after the phases."""
        with self.abandoning_on_error():
            self.phases.check_step()
            self._check_is_update()
            self._warn_if_no_phase()
            self.step_base(amp)

    # -- The numbers -------------------------------------------------------------------------------------------------

    def project(
        self, settings: Settings, grad_scale: GradScaler | Tensor | float | None
    ) -> tuple[PairedGradients, Projection]:
        """Take the coefficients from the gradients of both phases; what is left is to apply them."""
        plan = self.plan
        taken = take_gradients(plan)
        self.ranks.update(plan.params, plan.dtensors)
        takes_part = None
        # Every rank needs the same rows, also where a parameter has no gradient on this one.
        if any_missing(taken.grads) and not self.ranks.are_many:
            waiting = self.stash.has(plan.params)
            parts = [f is not None or r is not None for f, r in zip(waiting, taken.grads, strict=True)]
            takes_part = None if all(parts) else parts
        rows = plan.rows(self.groups(), takes_part, settings.row_per_parameter)
        gradients = pair_gradients(rows, self.stash, self.ranks, taken if takes_part is None else None)
        del taken  # For gradients.clear() to be the end of them.
        if isinstance(grad_scale, GradScaler):
            # The scale as a device tensor: get_scale() would read it on the host.
            grad_scale = grad_scale.scale(torch.ones((), device=gradients.device))
        projection = self.solve(gradients, settings, grad_scale)
        self._record(gradients, projection)
        self._scale_needed = grad_scale is None and settings.needs_scale
        return gradients, projection

    def solve(self, gradients: PairedGradients, settings: Settings, grad_scale: Tensor | float | None) -> Projection:
        """The coefficients from the paired gradients."""
        return project(gradients, settings, grad_scale)

    def _recompute(self, retain: Closure, settings: Settings) -> tuple[Any, PairedGradients, Projection]:
        plan = self.plan
        self.ranks.update(plan.params, plan.dtensors)
        loss, gradients, projection, applied = recompute(
            lambda has_gradients: self._evaluate(retain, "retain", has_gradients),
            plan,
            self.groups(),
            self.stash,
            settings,
            self.ranks,
        )
        self.end_retain()
        self._record(gradients, projection)
        return loss, gradients, applied

    def _record(self, gradients: PairedGradients, projection: Projection) -> None:
        self._warn_if_nothing(gradients, projection)
        self.last, self._found_inf = projection, projection.found_inf
        if self.skipped.device != self._found_inf.device:
            self.skipped = self.skipped.to(self._found_inf.device)
        self.skipped += self._found_inf.long()
        # The smallest, for it is kept alive.
        smallest = gradients.smallest
        self._witness = None if smallest is None else (smallest, smallest.grad)

    def step_base(self, amp: Amp) -> None:
        """Take the base's own step on ``p.grad``, unless the update in it is not finite."""
        # What was found in the update holds for as long as p.grad is that update, so also for a second step on it.
        step_base(self.base, self._found_inf if self.is_update else None, amp)

    def check_scale_is_known(self) -> None:
        """Refuse to go on with an update that depends on a loss scale of which nothing was said."""
        if self.phases.current is Phase.PROJECTED and self._scale_needed:
            raise RuntimeError(
                "BLUR must know the loss scale for `max_grad_norm`, `normalize` and rules that depend on the size "
                "of the gradients. Pass the GradScaler to the retain phase: with opt.retain(grad_scale=scaler)."
            )

    # -- What is said of a step that is not what it should be --------------------------------------------------------

    def loaded(self, param_groups: Sequence[Mapping[str, Any]]) -> None:
        """After the state dict with these groups was loaded."""
        leave_metric(self.base, param_groups)

    def _warn_if_nothing(self, gradients: PairedGradients, projection: Projection) -> None:
        # With many ranks, others may have what this one lacks.
        if self._said_nothing or self.ranks.are_many:
            return
        if (why := why_nothing_moves(gradients, projection)) and self.params():
            self._said_nothing = True
            warnings.warn(why, stacklevel=OUTSIDE)

    def _check_is_update(self) -> None:
        # Without a gradient in either phase there is no update: what is in p.grad has come from somewhere else.
        if self.phases.current is Phase.PROJECTED and self._witness is None and self.has_gradients():
            raise RuntimeError(
                "opt.step() must find in p.grad what the phases left there, nothing, got gradients. An engine that "
                "collects gradients in buffers of its own, such as DeepSpeed, has put both phases into one."
            )

    def _warn_if_no_phase(self) -> None:
        # torch.distributed.checkpoint makes the state by such a step, with a rate of 0.
        if self.phases.current is not Phase.IDLE or self._warned or not self.has_gradients():
            return
        if any(group.get("lr", 1.0) != 0 for group in self.base.param_groups):
            self._warned = True
            warnings.warn(
                f"opt.step() had no phases before it: {type(self.base).__name__} stepped on what was in p.grad, not "
                "BLUR. Give it two closures, or compute the gradients in `with opt.forget()` and `with opt.retain()`.",
                stacklevel=OUTSIDE - 2,
            )
