"""A step of BLUR on an engine: its phases begin and end with the engine's, and its base's step is the engine's.

To the rest of BLUR each parameter is a *stand-in*: a tensor without memory, of the shape of the piece that this rank
keeps of its gradient, and with that piece as ``.grad``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from blur_optim.integrations.deepspeed.gradients import EngineGradients
from blur_optim.parallel.ranks import Ranks
from blur_optim.parallel.wrappers import Wrappers
from blur_optim.step.phases import Phase
from blur_optim.step.settings import Settings
from blur_optim.step.two_phase import Amp, TwoPhaseStep

#: How far the norm that the engine reports may be from that of the update, relative to the norms of its two parts. An
#: element is rounded to 6e-8, 4e-3 and 5e-4 of its size; the engine adds up squares in float32.
_NORM_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class EngineStep(TwoPhaseStep):
    """The steps of one :class:`blur_optim.integrations.deepspeed.DeepSpeedBLUR`.

    Args:
        gradients: of the engine.
        base: the engine's basic optimizer, whose groups hold the weights.
        stash, backend: as BLUR takes them.
    """

    def __init__(self, gradients: EngineGradients, base: Optimizer, stash: str, backend: str | None = None) -> None:
        self.gradients, self.engine = gradients, gradients.engine
        self.phase_ends = _EnginePhases(gradients)
        super().__init__(base, stash, backend, EngineRanks(gradients), self.phase_ends)

    def groups(self) -> list[dict[str, Any]]:
        """The stand-ins, by param group of the engine's basic optimizer, with its weights."""
        groups = zip(self.base.param_groups, self.phase_ends.stand_ins, strict=True)
        # A group from a checkpoint that was made without BLUR has no weights.
        return [{**self.base.defaults, **group, "params": stand_ins} for group, stand_ins in groups]

    @contextmanager
    def forget_phase(self, settings: Settings) -> Iterator[None]:
        """The forget gradients are computed within, and the engine has none afterwards."""
        with super().forget_phase(settings):
            yield
        self.gradients.clear()

    def write_update(self, settings: Settings, grad_scale: GradScaler | Tensor | float | None) -> None:
        """Leave the update where the engine's step will find it."""
        super().write_update(settings, grad_scale)
        for stand_in, piece in zip(self.params(), self.gradients.read(), strict=True):
            assert stand_in.grad is not None
            if stand_in.grad.data_ptr() != piece.data_ptr():
                piece.copy_(stand_in.grad)
        self.gradients.written()

    def step_on_update(self, amp: Amp) -> None:
        """Let the engine step on the update. No gradient is left afterwards."""
        with self.abandoning_on_error():
            self.phases.check_step()
            if self.phases.current is not Phase.PROJECTED:
                raise RuntimeError(
                    "opt.step() must follow the two phases, got neither before it. For a step of the engine on "
                    "gradients of its own call engine.step()."
                )
            self.step_base(amp)
        self.discard()

    def step_base(self, amp: Amp) -> None:
        """Let the engine step, unless the update is not finite, and compare its account of it."""
        # Under float16 the engine has to see what is not finite: it lowers the loss scale, and skips by itself.
        if self._found_inf is not None and bool(self._found_inf) and not self.engine.fp16_enabled():
            return
        self.phase_ends.allow_step()
        before = self.engine.global_steps
        self.gradients.step()
        self._check_one_step(before)
        self._check_norm()

    def _check_one_step(self, before: int) -> None:
        if self.engine.global_steps != before + 1:
            raise RuntimeError(
                f"engine.step() must take one step, got {self.engine.global_steps - before}: something has moved its "
                "boundary of gradient accumulation. If there was none, nothing was updated."
            )

    def _check_norm(self) -> None:
        norm, last = self.engine.get_global_grad_norm(), self.last
        if norm is None or last is None or getattr(self.engine.optimizer, "overflow", False):
            return
        parts = last.a.abs() * last.dots.forget_norm_sq.sqrt() + last.b.abs() * last.dots.retain_norm_sq.sqrt()
        expected, scale = torch.stack([last.update_norm, parts.norm()]).tolist()
        tolerance = max((_NORM_TOLERANCE[dtype] for dtype in {s.dtype for s in self.params()}), default=0.0)
        if not abs(float(norm) - expected) <= tolerance * scale:
            raise RuntimeError(
                f"engine.step() must step on the update, of norm {expected:.6g}, got one of {float(norm):.6g}."
                " The parameters are wrong now: load the last checkpoint. This version of DeepSpeed keeps gradients "
                "otherwise than BLUR knows; please report it."
            )


class _EnginePhases(Wrappers):
    """What is to be done where a phase begins and ends: the engine's gradients become those of the stand-ins."""

    def __init__(self, gradients: EngineGradients) -> None:
        super().__init__()
        self.gradients, self.engine = gradients, gradients.engine
        self.stand_ins: list[list[Tensor]] = [[] for _ in gradients.groups]
        self._steps = 0

    def begin(self, params: Sequence[Tensor]) -> None:
        self.gradients.begin()
        self.engine.step = self._refuse_step  # Of this engine alone, until the update is there.
        self._steps = self.engine.global_steps

    def end(self, params: Sequence[Tensor], dtensors: Sequence[Tensor], phase: str) -> None:
        if self.engine.global_steps != self._steps:
            raise RuntimeError(f"The engine must not step in the {phase} phase, got a step of it.")
        self.gradients.end()
        pieces = self.gradients.read()
        self._stand_for(pieces)
        for stand_in, piece in zip(self.all_stand_ins(), pieces, strict=True):
            # Without the base of a view, by which a stash would take it for memory that is written to again.
            stand_in.grad = piece.data if self.gradients.fresh else piece

    def holds_back(self, dtensors: Sequence[Tensor]) -> bool:
        return not self.gradients.is_clear()

    def drop(self, dtensors: Sequence[Tensor]) -> None:
        self.allow_step()
        self.gradients.clear()
        self.gradients.release()

    def allow_step(self) -> None:
        self.engine.__dict__.pop("step", None)

    def all_stand_ins(self) -> list[Tensor]:
        return [stand_in for group in self.stand_ins for stand_in in group]

    def _stand_for(self, pieces: Sequence[Tensor]) -> None:
        """Have a stand-in for each piece: the same as before, where it fits."""
        present = self.all_stand_ins()
        if len(present) == len(pieces) and all(map(_is_like, present, pieces)):
            return
        made = iter([torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape) for p in pieces])
        self.stand_ins = [[next(made) for _ in group] for group in self.gradients.groups]

    def _refuse_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            "engine.step() cannot run between opt.forget() and opt.step(): the two gradients are apart still. Call "
            "opt.step() after both phases. Under accelerate call engine.backward(loss, scale_wrt_gas=False) in them: "
            "accelerator.backward may step."
        )


class EngineRanks(Ranks):
    """The ranks of an engine, each of which has another part of every gradient; one where each has all of it."""

    def __init__(self, gradients: EngineGradients) -> None:
        super().__init__()
        group = gradients.process_group
        if group is not None:
            self._groups, self._size = [group], group.size()
        self._device_type = torch.device(gradients.engine.device).type

    @property
    def see_the_same_gradients(self) -> bool:
        """A rank may have nothing of a parameter."""
        return False

    def update(self, params: Sequence[Tensor], dtensors: Sequence[Any] | None = None) -> None:
        """Look at what is known by now about earlier sums."""
        self._read_verdicts()

    def weight(self, param: Tensor) -> float:
        """1: each element is on one rank."""
        return 1.0


def _is_like(stand_in: Tensor, piece: Tensor) -> bool:
    return (stand_in.shape, stand_in.dtype, stand_in.device) == (piece.shape, piece.dtype, piece.device)
