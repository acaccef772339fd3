"""DeepSpeed's engines, which collect gradients or reduce them by a count of their own, found from the parameters alone.

Under ZeRO-1, 2 and 3 no gradient is left in ``p.grad``. Under ZeRO-0 it is, but averaged only in the micro-batch that
the engine takes for its last. :mod:`blur_optim.integrations.deepspeed` works with the engine instead.
"""

import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from blur_optim.parallel.instances import instances

_ENGINE = "deepspeed.runtime.engine"
_MODULES = ("deepspeed.runtime", "accelerate.utils.deepspeed")
# Marks on a parameter whose gradients are collected elsewhere: ZeRO-3, and ZeRO-1/2 with their float32 copies.
_MARKS = ("ds_id", "_hp_mapping")
#: What to do instead.
REMEDY = "Use blur_optim.integrations.deepspeed.DeepSpeedBLUR(engine), BLURTrainer for a Trainer, or fully_shard."


class Engines:
    """The engines around these parameters, found at the first phase."""

    def __init__(self) -> None:
        self._found: list[weakref.ref[Any]] | None = None

    def begin(self, params: Iterable[Tensor]) -> None:
        """A phase begins.

        Raises:
            RuntimeError: DeepSpeed keeps the gradients of ``params``.
        """
        if "deepspeed" in sys.modules and any(hasattr(p, mark) for p in params for mark in _MARKS):
            raise RuntimeError(
                "The gradients must be left in p.grad, got parameters that DeepSpeed manages: it collects gradients in "
                f"buffers of its own, both phases into one. {REMEDY}"
            )

    def end(self, params: Sequence[Tensor]) -> bool:
        """A phase ends: whether an engine leaves gradients that it has not averaged over the ranks."""
        return any(
            engine.dp_world_size > 1 and not engine.is_gradient_accumulation_boundary()
            for engine in self._around(params)
        ) and any(p.grad is not None for p in params)

    def _around(self, params: Sequence[Tensor]) -> list[Any]:
        if _ENGINE not in sys.modules:
            return []
        alive = None if self._found is None else [ref() for ref in self._found]
        if alive is None or None in alive:
            ids = {id(p) for p in params}
            engines = instances(sys.modules[_ENGINE].DeepSpeedEngine)
            alive = [engine for engine in engines if any(id(p) in ids for p in engine.module.parameters())]
            self._found = [weakref.ref(engine) for engine in alive]
        return alive


def is_engine(base: object) -> bool:
    """Whether ``base`` belongs to an engine that steps by itself."""
    return any(cls.__module__.startswith(_MODULES) for cls in type(base).__mro__)


def is_zero3(params: Iterable[Tensor]) -> bool:
    """Whether a forward gathers ``params`` from all ranks, as under ZeRO-3."""
    return "deepspeed" in sys.modules and any(hasattr(p, "ds_id") for p in params)
