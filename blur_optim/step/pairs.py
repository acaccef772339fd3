"""The two gradients of a step, paired by parameter: lists of one length, as one kernel call takes them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blur_optim.parallel.ranks import Ranks
from blur_optim.step.plan import Rows

if TYPE_CHECKING:
    from typing_extensions import Self  # Of typing since 3.11.

#: Bytes of forget gradients that are brought back from another device at a time; a single larger one is alone.
PIECE_BYTES = 1 << 26


@dataclass
class Pairs:
    """The two gradients of some parameters.

    Args:
        params: the parameters.
        forget, retain: real local tensors of one shape; an absent one has 0 elements. ``forget`` may be compressed, and
            with ``stash="cpu"`` in host memory.
        rows: the row of the dots and of the coefficients that each belongs to.
        members: its place in :attr:`Rows.params`.
        groups: the index of its param group.
        scales: of the blocks of ``forget``, in the kernels' form: an entry for each, or empty where nothing is int8.
        weight: of the dots in the sum over all ranks.
    """

    params: list[Tensor] = field(default_factory=list)
    forget: list[Tensor] = field(default_factory=list)
    retain: list[Tensor] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.params)

    @property
    def device(self) -> torch.device:
        return self.retain[0].device

    def select(self, indices: Sequence[int]) -> Self:
        """Those at ``indices``."""
        return self._with({name: [v[i] for i in indices] if v else [] for name, v in self.lists().items()})

    def part(self, start: int, stop: int) -> Self:
        """Those from ``start`` to ``stop``, all of them without a copy."""
        if start == 0 and stop == len(self):
            return self
        return self._with({name: values[start:stop] for name, values in self.lists().items()})

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """The param groups that have pairs: index, first pair, and the one after the last."""
        start = 0
        while start < len(self):
            group = self.groups[start]
            stop = bisect_right(self.groups, group, start)
            yield group, start, stop
            start = stop

    def by_group(self) -> Iterator[tuple[int, Self]]:
        """The index of each param group that has pairs, and its pairs."""
        return ((group, self.part(start, stop)) for group, start, stop in self.spans())

    def lists(self) -> dict[str, list[Any]]:
        """The fields that have an entry for each pair, or are empty."""
        return {name: values for name, values in self.__dict__.items() if isinstance(values, list)}

    def _with(self, lists: dict[str, list[Any]]) -> Self:
        # As dataclasses.replace, which takes longer than a kernel where there are many param groups.
        chosen = object.__new__(type(self))
        chosen.__dict__.update(self.__dict__)
        chosen.__dict__.update(lists)
        return chosen


@dataclass
class PairedGradients:
    """All pairs of a step in the order of the param groups, their rows, and the ranks that hold the other shards.

    Args:
        facts: what has to be the same on all ranks; empty where there is one.
        contiguous: every gradient is known to be; False says nothing.
        may_be_elsewhere: forget gradients may wait on another device than their parameter's.
    """

    pairs: Pairs
    rows: Rows
    ranks: Ranks
    facts: str = ""
    contiguous: bool = False
    may_be_elsewhere: bool = False

    @property
    def device(self) -> torch.device:
        """Where the rows' results are computed."""
        return self.pairs.device if self.pairs else self.rows.device

    def batches(self) -> Iterator[Pairs]:
        """The pairs by device and weight, in lists that one kernel call takes.

        Forget gradients that wait elsewhere are on the device of their pair for as long as a list is in use.
        """
        for pairs in self.kinds:
            yield from _pieces(pairs) if self.may_be_elsewhere else (pairs,)

    @cached_property
    def kinds(self) -> list[Pairs]:
        """The pairs by device and weight in the sum over ranks."""
        pairs = self.pairs
        if not pairs:
            return []
        if not self.ranks.are_many and len(set(map(Tensor.get_device, pairs.retain))) == 1:
            return [pairs]
        kinds: dict[tuple[torch.device, float], list[int]] = {}
        for i, (param, retain) in enumerate(zip(pairs.params, pairs.retain, strict=True)):
            kinds.setdefault((retain.device, self.ranks.weight(param)), []).append(i)
        found = []
        for (_, weight), indices in kinds.items():
            mine = pairs.select(indices)
            mine.weight = weight
            found.append(mine)
        return found

    @property
    def devices(self) -> set[torch.device]:
        return {pairs.device for pairs in self.kinds}

    @property
    def smallest(self) -> Tensor | None:
        """The smallest parameter that has a gradient."""
        if len(self.pairs) == len(self.rows.params):
            return self.rows.smallest
        return min(self.pairs.params, key=lambda p: p.numel(), default=None)

    def use(self, pairs: Pairs) -> None:
        """Have these pairs in the place of those until now."""
        self.pairs = pairs
        self.__dict__.pop("kinds", None)

    def clear(self) -> None:
        """Let go of all gradients."""
        self.use(Pairs())


def _pieces(pairs: Pairs) -> Iterator[Pairs]:
    """The pairs as they are where all forget gradients are at hand, else in pieces that are brought to the device."""
    if all(map(is_, (f.is_cpu for f in pairs.forget), (r.is_cpu for r in pairs.retain))):
        yield pairs
        return
    bytes_before = 0
    numbers = []
    for forget in pairs.forget:
        numbers.append(bytes_before // PIECE_BYTES)
        bytes_before += forget.nbytes
    for _, indices in groupby(range(len(pairs)), key=numbers.__getitem__):
        piece = pairs.select(list(indices))
        piece.forget = [f.to(r.device, non_blocking=True) for f, r in zip(piece.forget, piece.retain, strict=True)]
        yield piece
