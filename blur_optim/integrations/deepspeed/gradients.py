"""Where DeepSpeed keeps the gradients of a phase: one class for each of its kinds of optimizer.

Here what they share, and those whose gradients are whole on every rank; ``zero12`` and ``zero3`` have the others.
Everything that DeepSpeed does not document is named in :attr:`EngineGradients.names`, looked for when an engine is
given, and nothing outside these three modules touches it. As of DeepSpeed 0.19.8.

Each parameter of the engine has one *piece* on each rank: what this rank keeps of its gradient, perhaps nothing. The
pieces of all ranks are the gradient, padded with zeros; ZeRO-0 keeps all of it on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

#: What is used of every engine.
ENGINE_NAMES = (
    *("basic_optimizer", "optimizer", "device", "step", "global_steps", "get_global_grad_norm", "fp16_enabled"),
    "set_gradient_accumulation_boundary",
)


class EngineGradients:
    """The gradients of one engine, for a phase whose number of micro-batches is not known beforehand.

    Args:
        engine: what ``deepspeed.initialize`` returns.

    Raises:
        ImportError: this version of DeepSpeed lacks something that is needed.
    """

    #: What is used of the engine and of its optimizer.
    engine_names: Sequence[str] = ENGINE_NAMES
    names: Sequence[str] = ()
    #: Each phase leaves its gradients in memory of its own, so that those of the forget phase can stay where they are.
    fresh = False

    def __init__(self, engine: Any) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        _check_names(engine, self.engine_names)
        _check_names(self.optimizer, self.names)
        self.groups: list[list[Tensor]] = [list(group) for group in self._groups()]

    @property
    def params(self) -> Iterator[Tensor]:
        """The engine's parameters, by param group, in an order that is the same on all ranks."""
        return (p for group in self.groups for p in group)

    @property
    def device(self) -> torch.device:
        """Where the pieces are."""
        return torch.device(self.engine.device)

    @property
    def process_group(self) -> Any:
        """The ranks whose pieces make up the gradients; None where each has all of them."""
        return None

    @property
    def loss_scale(self) -> float:
        """What the engine multiplies losses with."""
        return float(getattr(self.optimizer, "loss_scale", 1.0) or 1.0) if self.engine.fp16_enabled() else 1.0

    def begin(self) -> None:
        """Make ready for the backward passes of a phase: nothing is left, and none of them is the last."""
        self.clear()
        self.engine.set_gradient_accumulation_boundary(False)

    def end(self) -> None:
        """Have everything averaged over the ranks and in its final place."""
        raise NotImplementedError

    def read(self) -> list[Tensor]:
        """The piece of each of :attr:`params`, as the engine has it: writing to it writes to the engine's."""
        raise NotImplementedError

    def written(self) -> None:
        """Let the engine know of what was written to the pieces."""

    def clear(self) -> None:
        """Leave the engine as if no backward had run since its last step."""
        raise NotImplementedError

    def is_clear(self) -> bool:
        """Whether no backward has run since."""
        raise NotImplementedError

    def step(self) -> None:
        """Let the engine step on the pieces."""
        self.engine.set_gradient_accumulation_boundary(True)
        try:
            self.engine.step()
        finally:
            self.release()

    def release(self) -> None:
        """Let the engine count its micro-batches itself again."""
        self.engine.set_gradient_accumulation_boundary(None)

    def _groups(self) -> Iterator[Sequence[Tensor]]:
        raise NotImplementedError


class UnshardedGradients(EngineGradients):
    """ZeRO-0: in ``p.grad`` of every rank, averaged at the end of a phase."""

    engine_names = (*ENGINE_NAMES, "allreduce_gradients")
    names: Sequence[str] = ("param_groups",)
    fresh = True

    def end(self) -> None:
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.allreduce_gradients()
        self.engine.set_gradient_accumulation_boundary(False)

    def read(self) -> list[Tensor]:
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.params if p.grad is not None]

    def clear(self) -> None:
        for p in self.params:
            p.grad = None

    def is_clear(self) -> bool:
        return all(p.grad is None for p in self.params)

    def _groups(self) -> Iterator[Sequence[Tensor]]:
        # In float32 the optimizer is the client's; in bfloat16 it has float32 copies in its own groups.
        groups = getattr(self.optimizer, "fp16_groups", None)
        yield from groups or ([p for p in g["params"] if p.requires_grad] for g in self.optimizer.param_groups)


class Bfloat16Zero1Gradients(EngineGradients):
    """ZeRO-1 of bfloat16 with float32 accumulation: whole on every rank, in buffers that every phase writes to.

    The norm for clipping is taken over the whole buffers, so the update belongs in all of them, not in the rank's part.
    """

    engine_names = (*ENGINE_NAMES, "allreduce_gradients")
    names: Sequence[str] = ("bf16_groups", "fp32_groups_gradients", "fp32_groups_has_gradients", "zero_grad")

    end = UnshardedGradients.end

    def read(self) -> list[Tensor]:
        return [grad for group in self.optimizer.fp32_groups_gradients for grad in group]

    def written(self) -> None:
        self._mark(True)

    def clear(self) -> None:
        self.optimizer.zero_grad()
        self._mark(False)

    def is_clear(self) -> bool:
        return not any(map(any, self.optimizer.fp32_groups_has_gradients))

    def _mark(self, value: bool) -> None:
        for group in self.optimizer.fp32_groups_has_gradients:
            group[:] = [value] * len(group)

    def _groups(self) -> Iterator[Sequence[Tensor]]:
        yield from self.optimizer.bf16_groups


class ShardedGradients(EngineGradients):
    """Each element of a gradient is on one rank."""

    @property
    def process_group(self) -> Any:
        """Those of the engine."""
        return self.optimizer.dp_process_group


def _check_names(owner: Any, names: Sequence[str]) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        import deepspeed

        raise ImportError(
            f"`deepspeed` must be a version whose {type(owner).__name__} has {missing}, got {deepspeed.__version__}. "
            "0.19.8 has them."
        )


def synchronize() -> None:
    """Wait for the copies that the engine has under way."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()
