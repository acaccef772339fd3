"""What DistributedDataParallel, FSDP and engines keep back from ``p.grad``, found from the parameters alone.

BLUR never sees the model, and with plain training need not: what a backward leaves unreduced, the next one picks up.
Here the next backward is that of another loss, so such a gradient would end in the wrong one without a sign.

Only private attributes tell. Each is read where it exists and passed over where a version of torch lacks it, and no
module is imported for it: what is not loaded wraps nothing.
"""

import gc
import sys
import weakref
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

_COMPOSABLE = "torch.distributed._composable_state"
_FSDP1 = "torch.distributed.fsdp._flat_param"
_ENGINES = ("deepspeed.runtime", "accelerate.utils.deepspeed")
# DeepSpeed's marks on a parameter whose gradients it collects itself: ZeRO-3, and ZeRO-1/2 with their float32 copies.
_ENGINE_MARKS = ("ds_id", "_hp_mapping")


class Wrappers:
    """The wrappers around these parameters, and whether they have reduced what a phase computed."""

    def __init__(self) -> None:
        self._parallel: list[weakref.ref[Any]] | None = None
        self._before: list[tuple[Any, list[int]]] = []

    def begin(self, params: Iterable[Tensor]) -> None:
        """A phase begins.

        Raises:
            RuntimeError: an engine keeps the gradients of ``params``.
        """
        params = list(params)
        if "deepspeed" in sys.modules and any(hasattr(p, mark) for p in params for mark in _ENGINE_MARKS):
            raise RuntimeError(
                "The gradients must be left in p.grad, got parameters that DeepSpeed manages: it collects gradients in "
                "buffers of its own, both phases into one. Use fully_shard, or DistributedDataParallel with "
                "ZeroRedundancyOptimizer as base."
            )
        before = ((ddp, ddp.reducer.get_backward_stats()) for ddp in self._data_parallel(params))
        # The first backward of a static graph leaves no trace. It cannot run under no_sync() anyway.
        self._before = [(ddp, stats) for ddp, stats in before if any(stats) or not ddp.static_graph]

    def end(self, params: Iterable[Tensor], phase: str) -> None:
        """A phase ends.

        Raises:
            RuntimeError: gradients of it are not averaged over the ranks yet.
        """
        params = list(params)
        if holds_back(params):
            raise RuntimeError(
                f"The {phase} phase must end with its gradients reduced, got gradients that FSDP still holds back. "
                f"Before the last backward of the {phase} phase call model.set_requires_gradient_sync(True), and with "
                "HSDP model.set_requires_all_reduce(True)."
            )
        flattened = fsdp1_ids(params)
        if any(id(p) in flattened and p.grad is not None and p.grad.shape != p.shape for p in params):
            self._refuse_no_sync(phase)
        before, self._before = self._before, []
        for ddp, stats in before:
            has_gradients = any(p.grad is not None for p in ddp._module_parameters)
            # These are the times at which gradients became ready for their all-reduce: the same, so none has since.
            if has_gradients and ddp.reducer.get_backward_stats() == stats:
                self._refuse_no_sync(phase)

    def _refuse_no_sync(self, phase: str) -> None:
        raise RuntimeError(
            f"The {phase} phase must end with its gradients reduced, got those of this rank alone. Run forward and "
            "backward of each loss in the phase itself, through the wrapped model, and outside no_sync() for the last "
            "micro-batch of each of the two phases."
        )

    def _data_parallel(self, params: Iterable[Tensor]) -> list[Any]:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return []
        alive = None if self._parallel is None else [ref() for ref in self._parallel]
        if alive is None or None in alive:
            ids = {id(p) for p in params}
            alive = [ddp for ddp in _instances(DistributedDataParallel) if _reduces(ddp, ids)]
            self._parallel = [weakref.ref(ddp) for ddp in alive]
        return alive


def holds_back(params: Iterable[Tensor]) -> bool:
    """Whether FSDP2 holds gradients of ``params`` that are not in ``p.grad`` yet."""
    return any(
        getattr(group, "_partial_reduce_output", None) is not None or any(map(_is_unreduced, group.fsdp_params))
        for group in _fsdp2_groups(params)
    )


def is_gathered(params: Iterable[Tensor]) -> bool:
    """Whether some of ``params`` are FSDP2's copies for one forward, which it drops again."""
    if _COMPOSABLE not in sys.modules:
        return False
    ids = {id(p) for p in params}
    copies = (getattr(f, "_unsharded_param", None) for group in _all_fsdp2_groups() for f in group.fsdp_params)
    return any(id(copy) in ids for copy in copies if copy is not None)


def drop_held_back(params: Iterable[Tensor]) -> None:
    """Drop what FSDP2 holds back, as ``p.grad = None`` drops the rest."""
    for group in _fsdp2_groups(params):
        if getattr(group, "_partial_reduce_output", None) is not None:
            group._partial_reduce_output = None
        for fsdp_param in filter(_is_unreduced, group.fsdp_params):
            fsdp_param.unsharded_accumulated_grad = None
            fsdp_param._unsharded_param.grad = None


def fsdp1_handles(ids: Collection[int]) -> dict[int, Any]:
    """The handle of each parameter, by the ids of parameters that FullyShardedDataParallel shards."""
    found: dict[int, Any] = {}
    for handle in _instances(sys.modules[_FSDP1].FlatParamHandle):
        flat = handle.flat_param
        found |= {id(p): handle for p in [flat, *(flat._params or ()), *(flat._shared_params or ())] if id(p) in ids}
    return found


def fsdp1_ids(params: Iterable[Tensor]) -> frozenset[int]:
    """The ids of those of ``params`` that FullyShardedDataParallel shards: plain tensors with a mark."""
    if _FSDP1 not in sys.modules:
        return frozenset()
    return frozenset(id(p) for p in params if getattr(p, "_fsdp_flattened", False))


def is_engine(base: object) -> bool:
    """Whether ``base`` belongs to an engine that steps by itself."""
    return any(cls.__module__.startswith(_ENGINES) for cls in type(base).__mro__)


def _is_unreduced(fsdp_param: Any) -> bool:
    unsharded = getattr(fsdp_param, "_unsharded_param", None)
    return getattr(fsdp_param, "unsharded_accumulated_grad", None) is not None or (
        unsharded is not None and unsharded.grad is not None
    )


def _fsdp2_groups(params: Iterable[Tensor]) -> Iterator[Any]:
    """The FSDPParamGroups of ``params``."""
    if _COMPOSABLE not in sys.modules:
        return
    ids = {id(p) for p in params if hasattr(p, "to_local")}
    for group in _all_fsdp2_groups() if ids else ():
        if any(id(f.sharded_param) in ids for f in group.fsdp_params):
            yield group


def _all_fsdp2_groups() -> Iterator[Any]:
    for ref in list(sys.modules[_COMPOSABLE]._module_state_mapping.values()):
        state = ref()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # Before there could be several.
            groups = [getattr(state, "_fsdp_param_group", None)]
        yield from (group for group in groups if hasattr(group, "fsdp_params"))


def _reduces(ddp: Any, ids: set[int]) -> bool:
    """Whether this reduces gradients among ``ids`` over several ranks, by the means whose traces are looked at."""
    own = getattr(ddp, "_module_parameters", ())
    replaced = getattr(ddp, "_use_python_reducer", False) or getattr(ddp, "_delay_all_reduce_all_params", False)
    reducer = getattr(ddp, "reducer", None)
    return (
        hasattr(reducer, "get_backward_stats")
        and not replaced
        and ddp.process_group.size() > 1
        and any(id(p) in ids for p in own)
    )


def _instances(cls: type) -> Iterator[Any]:
    # Neither DDP nor FSDP1 keeps a list of what it has wrapped. A scan of 0.1 s, once.
    return (o for o in gc.get_objects() if issubclass(type(o), cls))
