"""The doors at which torch.compile leaves a region that it compiles: what is behind them runs as it is.

A step is bookkeeping around a few operators that are compiled already. Traced, it would break the graph at every second
line and gain nothing. torch keeps its own optimizers' bookkeeping out of graphs in the same way.
"""

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Generic, TypeVar

from torch._compile import _disable_dynamo as outside  # Unlike torch.compiler.disable it does not import the compiler.

__all__ = ["OutsideGraphs", "outside"]

T = TypeVar("T")


class OutsideGraphs(AbstractContextManager[T], Generic[T]):
    """A context that is entered and left outside of graphs; what runs within it may be compiled."""

    def __init__(self, context: AbstractContextManager[T]) -> None:
        self._context = context

    @outside
    def __enter__(self) -> T:
        return self._context.__enter__()

    @outside
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._context.__exit__(kind, error, traceback)
