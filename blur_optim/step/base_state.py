"""The base's state as lists, without a look-up for each parameter in each step."""

from collections.abc import Mapping, Sequence
from operator import is_, itemgetter
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
        self._counts: dict[str, Counts] = {}
        self._counts_read: set[str] = set()  # Those that have been looked at since the last read.

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
        self.entries, self._counts_read = {name: self._read(name) for name in names}, set()
        return list(self.entries.values())

    def _read(self, name: str) -> list[Any]:
        try:
            return list(map(itemgetter(name), self.dicts))  # Twice as fast as the look-up that allows for gaps.
        except KeyError:
            return [state.get(name) for state in self.dicts]

    def counts(self, name: str) -> "Counts":
        """The 0-d entries called ``name``, of which each parameter must have one, as :meth:`read` has found them."""
        if name not in self._counts_read:
            entries, known = self.entries[name], self._counts.get(name)
            if known is not None and known.are(entries):
                known.gather()
            else:
                self._counts[name] = Counts(entries)
            self._counts_read.add(name)
        return self._counts[name]

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


class Counts:
    """The step counts of some parameters, which torch keeps as a 0-d tensor for each, advanced and read as one.

    To add to each and to stack them took more of the host than the rest of a small step. On the CPU, where that is, a
    second step on the same ones moves their values into one vector: the tensors stay the same objects, and only their
    memory is shared. Whoever writes to one of them writes to the vector, and one that was given other memory is seen.
    :func:`apart` gives each its own again, for a state dict: pickled by itself, each would carry the whole vector.
    On a GPU they stay where they are, since a captured graph may write there.
    """

    def __init__(self, entries: Sequence[Tensor]) -> None:
        self._entries = list(entries)
        self._vector: Tensor | None = None
        self._addresses: list[int] = []

    def are(self, entries: Sequence[Tensor]) -> bool:
        """Whether these are the same counts, in the same places."""
        return same_objects(entries, self._entries) and (
            self._vector is None or self._addresses == list(map(Tensor.data_ptr, entries))
        )

    def gather(self) -> None:
        """Have them in one vector from here on, where they can be."""
        if self._vector is None and _can_be_one(self._entries):
            self._vector = torch.stack(self._entries)
            for count, place in zip(self._entries, self._vector.unbind(), strict=True):
                count.data = place
            self._addresses = list(map(Tensor.data_ptr, self._entries))

    def add_(self, by: Tensor) -> None:
        """Add the 0-d ``by`` to each."""
        if self._vector is not None:
            self._vector.add_(by)
        elif len(set(map(Tensor.get_device, self._entries))) == 1:
            torch._foreach_add_(self._entries, [by] * len(self._entries))
        else:
            torch._foreach_add_(self._entries, [by.to(count.device, non_blocking=True) for count in self._entries])

    def read(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """``[n]`` on ``device``; not to be written to."""
        if self._vector is not None:
            return self._vector.to(device, dtype, non_blocking=True)
        counts = self._entries
        if len({count.device for count in counts}) > 1:  # Of an unfused base in some groups, or parameters are apart.
            counts = [count.to(device) for count in counts]
        return torch.stack(counts).to(device, dtype, non_blocking=True)


def apart(state: dict[Any, Any]) -> dict[Any, Any]:
    """The state of a state dict with each 0-d tensor in memory of its own; the same objects where it is already."""
    return {key: _apart(entries) if isinstance(entries, dict) else entries for key, entries in state.items()}


def _apart(entries: dict[str, Any]) -> dict[str, Any]:
    shared = {
        name: value.clone()
        for name, value in entries.items()
        if type(value) is Tensor and value.dim() == 0 and value.untyped_storage().nbytes() > value.element_size()
    }
    return {**entries, **shared} if shared else entries


def _can_be_one(counts: Sequence[Tensor]) -> bool:
    return (
        {(type(count), count.device.type, count.dim(), count.requires_grad) for count in counts}
        == {(Tensor, "cpu", 0, False)}
        and len({count.dtype for count in counts}) == 1
        and len(set(map(id, counts))) == len(counts)  # A state that was put together by hand may share one.
        and not any(map(Tensor.is_shared, counts))  # Other processes count there too.
    )
