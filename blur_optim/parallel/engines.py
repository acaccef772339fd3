"""Engines: they collect gradients in buffers of their own and step by themselves, inside backward."""

import sys
from collections.abc import Iterable

from torch import Tensor

_MODULES = ("deepspeed.runtime", "accelerate.utils.deepspeed")
# DeepSpeed's marks on a parameter whose gradients it collects itself: ZeRO-3, and ZeRO-1/2 with their float32 copies.
_MARKS = ("ds_id", "_hp_mapping")


def is_engine(base: object) -> bool:
    """Whether ``base`` belongs to an engine that steps by itself."""
    return any(cls.__module__.startswith(_MODULES) for cls in type(base).__mro__)


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
