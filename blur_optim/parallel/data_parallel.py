"""DistributedDataParallel: whether it has reduced what a phase computed."""

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from blur_optim.parallel.instances import instances

# Wrappers made since somebody has begun to count.
_made = 0


class DataParallel:
    """The DistributedDataParallel wrappers around these parameters, found at the first phase and when one is made."""

    def __init__(self) -> None:
        self._wrappers: list[weakref.ref[Any]] | None = None
        self._seen = 0
        self._params: Iterable[Tensor] = ()
        self._before: list[tuple[Any, list[int]]] = []

    def begin(self, params: Iterable[Tensor]) -> None:
        """A phase begins."""
        before = ((ddp, ddp.reducer.get_backward_stats()) for ddp in self._around(params))
        # The first backward of a static graph leaves no trace. It cannot run under no_sync() anyway.
        self._before = [(ddp, stats) for ddp, stats in before if any(stats) or not ddp.static_graph]

    def end(self) -> bool:
        """A phase ends: whether it leaves gradients that are not averaged over the ranks."""
        before, self._before = self._before, []
        # These are the times at which gradients became ready for their all-reduce: the same, so none has since.
        return any(
            ddp.reducer.get_backward_stats() == stats and any(p.grad is not None for p in ddp._module_parameters)
            for ddp, stats in before
        )

    def _around(self, params: Iterable[Tensor]) -> list[Any]:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return []
        alive = None if self._wrappers is None else [ref() for ref in self._wrappers]
        if alive is None or None in alive or self._seen != _made or self._params is not params:
            _begin_to_count()
            self._seen, self._params = _made, params
            ids = {id(p) for p in params}
            alive = [ddp for ddp in instances(DistributedDataParallel) if _reduces(ddp, ids)]
            self._wrappers = [weakref.ref(ddp) for ddp in alive]
        return alive


def _count(module: nn.Module, name: str, submodule: nn.Module) -> None:
    """Count a wrapper where it takes the module that it wraps. It is not made yet, so that all is looked at later."""
    global _made
    if isinstance(module, DistributedDataParallel):
        _made += 1


@functools.cache
def _begin_to_count() -> None:
    register_module_module_registration_hook(_count)


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
