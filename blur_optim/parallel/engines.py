"""Engines: they collect gradients in buffers of their own and step by themselves, inside backward."""

import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from blur_optim.parallel.instances import instances

_MODULES = ("deepspeed.runtime", "accelerate.utils.deepspeed")
# DeepSpeed's marks on a parameter whose gradients it collects itself: ZeRO-3, and ZeRO-1/2 with their float32 copies.
_MARKS = ("ds_id", "_hp_mapping")


def is_engine(base: object) -> bool:
    """Whether ``base`` belongs to an engine that steps by itself."""
    return any(cls.__module__.startswith(_MODULES) for cls in type(base).__mro__)


class WholeGradients:
    """DeepSpeed's engines that leave gradients in ``p.grad`` (ZeRO-0), and average them only where their own
    accumulation ends."""

    def __init__(self) -> None:
        self._engines: list[weakref.ref[Any]] | None = None

    def is_unreduced(self, params: Sequence[Tensor]) -> bool:
        """Whether the last backward of a phase was none of those after which the engine averages over the ranks."""
        module = sys.modules.get("deepspeed.runtime.engine")
        if module is None or all(p.grad is None for p in params):
            return False
        if self._engines is None:
            ids = {id(p) for p in params}
            found = (e for e in instances(module.DeepSpeedEngine) if any(id(p) in ids for p in e.module.parameters()))
            self._engines = [weakref.ref(engine) for engine in found]
        engines = [engine for ref in self._engines if (engine := ref()) is not None]
        return any(e.dp_world_size > 1 and not e.is_gradient_accumulation_boundary() for e in engines)


def check_no_engine(params: Iterable[Tensor]) -> None:
    """Refuse parameters whose gradients an engine keeps.

    Raises:
        RuntimeError: DeepSpeed manages them.
    """
    if "deepspeed" in sys.modules and any(hasattr(p, mark) for p in params for mark in _MARKS):
        raise RuntimeError(
            "The gradients must be left in p.grad, got parameters that DeepSpeed manages: it collects gradients in "
            "buffers of its own, both phases into one. Use fully_shard, or DistributedDataParallel with "
            "ZeroRedundancyOptimizer as base."
        )
