"""FullyShardedDataParallel: which parameters it shards. They are plain tensors with a mark."""

import sys
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from blur_optim.parallel.instances import instances

_MODULE = "torch.distributed.fsdp._flat_param"


def fsdp1_ids(params: Iterable[Tensor]) -> frozenset[int]:
    """The ids of those of ``params`` that FullyShardedDataParallel shards."""
    if _MODULE not in sys.modules or not torch.distributed.is_initialized():
        return frozenset()
    return frozenset(id(p) for p in params if getattr(p, "_fsdp_flattened", False))


def fsdp1_handles(ids: Collection[int]) -> dict[int, Any]:
    """The handle of each parameter, by the ids of parameters that FullyShardedDataParallel shards."""
    found: dict[int, Any] = {}
    for handle in instances(sys.modules[_MODULE].FlatParamHandle):
        flat = handle.flat_param
        found |= {id(p): handle for p in [flat, *(flat._params or ()), *(flat._shared_params or ())] if id(p) in ids}
    return found


def has_unreduced_fsdp1(params: Collection[Tensor]) -> bool:
    """Whether a gradient is there that a backward under ``no_sync()`` has left whole, and this rank's alone."""
    flattened = fsdp1_ids(params)
    return bool(flattened) and any(
        id(p) in flattened and p.grad is not None and p.grad.shape != p.shape for p in params
    )
