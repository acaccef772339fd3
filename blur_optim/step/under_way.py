"""A step that is under way: whose gradients it has, and how it ends, whether it was taken, dropped or broken off."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from operator import is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from blur_optim.parallel.wrappers import Wrappers
from blur_optim.step.gradients import grad_of
from blur_optim.step.phases import Phase, Phases
from blur_optim.step.plan import Plan
from blur_optim.step.stash import Stash


class UnderWay:
    """What a step has until it ends: a phase, the parameters and their gradients, those that wait, and flags of them.

    Args:
        base: the optimizer that takes the update.
        stash: where the forget gradients wait.
        wrappers: asked for gradients that are not in ``p.grad`` yet.
    """

    # What the projection found not finite, and a gradient by which p.grad is known to be that update still.
    _found_inf: Tensor | None
    _witness: tuple[Tensor, Tensor | None] | None
    _scale_needed: bool
    _zeros: list[tuple[Tensor, int]]

    def __init__(self, base: Optimizer, stash: Stash, wrappers: Wrappers) -> None:
        self.base, self.stash, self.wrappers = base, stash, wrappers
        self.phases = Phases()
        self._plan: Plan | None = None
        self.end()

    def groups(self) -> Sequence[dict[str, Any]]:
        """The param groups: in each, parameters with the gradients that are combined, and their weights."""
        return self.base.param_groups

    @property
    def plan(self) -> Plan:
        """The parameters as they are now."""
        groups = self.groups()
        if self._plan is None or not self._plan.holds(groups):
            self._plan = Plan(groups)
        return self._plan

    def params(self) -> list[Tensor]:
        """All parameters as they are now."""
        return self.plan.params

    def has_gradients(self) -> bool:
        plan = self.plan
        return not all(map(is_, map(grad_of, plan.params), repeat(None))) or self.wrappers.holds_back(plan.dtensors)

    @property
    def is_update(self) -> bool:
        """Whether ``p.grad`` is still the update that the last projection left there."""
        return self._witness is not None and self._witness[0].grad is self._witness[1]

    def reset(self) -> None:
        """After zero_grad(): a step that was under way is dropped, unless a phase is open."""
        if self.phases.is_open:
            return
        plan = self.plan
        self.wrappers.drop(plan.dtensors)
        self.end()
        self._zeros = [(grad, grad._version) for p in plan.params if (grad := p.grad) is not None]

    def drop_zeros(self) -> None:
        """Drop what ``zero_grad(set_to_none=False)`` left, unless something has been added to it since."""
        zeros = {id(grad) for grad, version in self._zeros if grad._version == version}
        for p in self.plan.params if zeros else ():
            if id(p.grad) in zeros:
                p.grad = None
        self._zeros = []

    def discard(self) -> None:
        """Drop every gradient, stashed or not, and with them the step."""
        plan = self.plan
        for p in plan.params:
            p.grad = None
        self.wrappers.drop(plan.dtensors)
        self.end()

    def end(self) -> None:
        """The next step can begin."""
        self.stash.clear()
        self.phases.current = Phase.IDLE
        self._found_inf = self._witness = None
        self._scale_needed = False
        self._zeros = []

    @contextmanager
    def abandoning_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.discard()
            raise
