"""The base's state as lists, without a look-up for each parameter in each step."""

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from blur_optim.step.plan import same_objects

_NOTHING: Mapping[str, Any] = {}


class BaseState:
    """The state of some parameters, in their order.

    torch looks every parameter up by its hash. Here the dictionaries are kept, and it is enough to know that the base
    has the same ones still. What is in them is read anew: a tensor that was replaced there is seen.

    Attributes:
        dicts: what the base keeps of each parameter.
        entries: what :meth:`read` has read last.
    """

    def __init__(self, base: Optimizer, params: Sequence[Tensor]) -> None:
        self._all = base.state
        self._keys, self._values = list(base.state.keys()), list(base.state.values())
        self._params = list(params)
        self.dicts: list[Mapping[str, Any]] = [base.state.get(p, _NOTHING) for p in params]
        self.entries: dict[str, list[Any]] = {}
        self._fitting: tuple[Any, list[list[Any]]] | None = None

    def holds(self, base: Optimizer, params: Sequence[Tensor]) -> bool:
        """Whether this is the state of ``params`` still."""
        return (
            base.state is self._all
            and len(self._all) == len(self._keys)
            and all(map(is_, self._all.keys(), self._keys))
            and all(map(is_, self._all.values(), self._values))
            and same_objects(params, self._params)
        )

    def read(self, names: Sequence[str]) -> list[list[Any]]:
        """Fill ``entries`` anew: of each name its value for each parameter, None where there is none."""
        self.entries = {name: [state.get(name) for state in self.dicts] for name in names}
        return list(self.entries.values())

    def known_to_fit(self, dtypes: set[torch.dtype], moments: list[list[Any]]) -> bool:
        """Whether :meth:`remember_to_fit` was told so of these tensors."""
        return (
            self._fitting is not None
            and self._fitting[0] == dtypes
            and len(moments) == len(self._fitting[1])
            and all(map(same_objects, moments, self._fitting[1]))
        )

    def remember_to_fit(self, dtypes: set[torch.dtype], moments: list[list[Any]]) -> None:
        """One loop over memory visits the same element of each parameter and of ``moments``, all of ``dtypes``."""
        self._fitting = dtypes, moments
