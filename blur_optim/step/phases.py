"""The order of a step: forget, retain, step. Every way of getting it wrong, with the remedy."""

from enum import Enum
from typing import NoReturn

_UNKNOWN_GRADIENTS = "p.grad already holds gradients, which are part of neither loss. Call opt.zero_grad() first."


class Phase(Enum):
    IDLE = "no phase has begun"
    FORGET = "the forget phase is open"
    STASHED = "the forget gradients wait for their retain phase"
    RETAIN = "the retain phase is open"
    PROJECTED = "p.grad holds the update"


class Phases:
    """Keep track of where in a step we are; each method raises RuntimeError where its transition is out of order."""

    def __init__(self) -> None:
        self.current = Phase.IDLE

    @property
    def is_open(self) -> bool:
        return self.current in (Phase.FORGET, Phase.RETAIN)

    def begin_forget(self, has_gradients: bool) -> None:
        if self.is_open:
            self._refuse("opt.forget()", "Phases do not nest: close it first.")
        if self.current is Phase.STASHED:
            self._refuse(
                "opt.forget()",
                "Run all forget micro-batches in one `with opt.forget()`, then `with opt.retain()`. To abandon a step "
                "on purpose, call opt.zero_grad().",
            )
        if has_gradients and self.current is Phase.PROJECTED:
            self._refuse("opt.forget()", "opt.step() and opt.zero_grad() belong between two steps.")
        if has_gradients:
            self._refuse("opt.forget()", _UNKNOWN_GRADIENTS)
        self.current = Phase.FORGET

    def end_forget(self) -> None:
        self._end(Phase.FORGET, Phase.STASHED)

    def begin_retain(self, has_gradients: bool) -> None:
        if self.current is not Phase.STASHED:
            self._refuse(
                "opt.retain()",
                "Run `with opt.forget()` right before it (an empty one, if there is nothing to forget). No zero_grad() "
                "belongs between the two: it discards the forget gradients.",
            )
        if has_gradients:
            self._refuse(
                "opt.retain()",
                "Gradients were computed outside both phases. Move every backward into one of them.",
            )
        self.current = Phase.RETAIN

    def end_retain(self) -> None:
        self._end(Phase.RETAIN, Phase.PROJECTED)

    def check_step(self) -> None:
        """A step on ``p.grad`` is in order: the update is there, or no phase has begun and it is a plain base step."""
        if self.is_open:
            self._refuse(
                "opt.step()",
                "Step after the phase is closed. An engine that steps inside its backward (DeepSpeed, also under "
                "accelerate) cannot hold the two gradients apart: use fully_shard or DistributedDataParallel.",
            )
        if self.current is Phase.STASHED:
            self._refuse(
                "opt.step()", "Run `with opt.retain()` before it (an empty one, if there is nothing to retain)."
            )

    def check_closures(self, has_gradients: bool) -> None:
        if self.is_open or self.current is Phase.STASHED:
            self._refuse("opt.step(forget, retain)", "Use either closures or phases for a step.")
        if has_gradients:
            self._refuse("opt.step(forget, retain)", _UNKNOWN_GRADIENTS)

    def _end(self, expected: Phase, following: Phase) -> None:
        if self.current is not expected:
            raise RuntimeError(
                "The step was abandoned inside its own phase, because of an error that was caught there."
            )
        self.current = following

    def _refuse(self, call: str, remedy: str) -> NoReturn:
        raise RuntimeError(
            f"{call} cannot run now: {self.current.value}. {remedy} (The gradients of this step have been discarded; "
            "the next one can begin.)"
        )
