"""DistributedDataParallel: whether it has reduced what a phase computed."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from blur_optim.parallel.instances import instances


class DataParallel:
    """The DistributedDataParallel wrappers around these parameters, found at the first phase and when one is made."""

    def __init__(self) -> None:
        self._wrappers: list[weakref.ref[Any]] | None = None
        self._before: list[tuple[Any, list[int]]] = []

    def begin(self, params: Sequence[Tensor]) -> None:
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

    def _around(self, params: Sequence[Tensor]) -> list[Any]:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return []
        alive = None if self._wrappers is None else [ref() for ref in self._wrappers]
        if self._newly_held(params) or alive is None or None in alive:
            ids = {id(p) for p in params}
            alive = [ddp for ddp in instances(DistributedDataParallel) if _reduces(ddp, ids)]
            self._wrappers = [weakref.ref(ddp) for ddp in alive]
        return alive

    def _newly_held(self, params: Sequence[Tensor]) -> bool:
        """Whether something has taken hold of where ``params`` accumulate since this was asked last.

        Autograd makes the node at which a parameter's gradient is accumulated anew for each graph; a wrapper keeps it.
        The first and the last parameter are asked; a wrapper around a part between them alone is not noticed.
        """
        found, mark = False, f"blur_optim {id(self)}"
        ends = (next(filter(_accumulates, order), None) for order in (params, reversed(params)))
        for p in (p for p in ends if p is not None):
            if mark not in _metadata(p):
                _metadata(p)[mark] = True
                found = found or mark in _metadata(p)
        return found


def _metadata(param: Tensor) -> Any:
    return get_gradient_edge(param).node.metadata


def _accumulates(param: Tensor) -> bool:
    return param.requires_grad and param.is_leaf and not hasattr(param, "to_local")


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
