"""The gradients of a step, paired by parameter, in the form that the kernels take."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from operator import eq, is_
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from blur_optim.parallel.ranks import Ranks, like, settle_gradient, to_local, to_locals
from blur_optim.step.plan import Plan, Rows, any_missing
from blur_optim.step.stash import Stash, Stashed, Waiting, real

#: Bytes of forget gradients that are brought back from another device at a time; a single larger one is alone.
PIECE_BYTES = 1 << 26


@dataclass
class Pairs:
    """The two gradients of some parameters: lists of one length, as one kernel call takes them.

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

    def select(self, indices: Sequence[int]) -> "Pairs":
        """Those at ``indices``."""
        chosen: dict[str, Any] = {name: [v[i] for i in indices] if v else [] for name, v in self.lists().items()}
        return replace(self, **chosen)

    def part(self, start: int, stop: int) -> "Pairs":
        """Those from ``start`` to ``stop``, all of them without a copy."""
        if start == 0 and stop == len(self):
            return self
        chosen: dict[str, Any] = {name: values[start:stop] for name, values in self.lists().items()}
        return replace(self, **chosen)

    def each(self) -> list["Pair"]:
        """One by one."""
        scales: Sequence[Tensor | None] = self.scales or [None] * len(self)
        return [
            Pair(p, f, r, row, group, scale if f.dtype == torch.int8 else None, member)
            for p, f, r, row, group, scale, member in zip(
                self.params, self.forget, self.retain, self.rows, self.groups, scales, self.members, strict=True
            )
        ]

    def lists(self) -> dict[str, list[Any]]:
        return {name: values for name, values in self.__dict__.items() if name != "weight"}


class Pair(NamedTuple):
    """One of :class:`Pairs`; ``scales`` is None where ``forget`` is not int8."""

    param: Tensor
    forget: Tensor
    retain: Tensor
    row: int
    group: int
    scales: Tensor | None = None
    member: int = 0

    @property
    def device(self) -> torch.device:
        return self.retain.device


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

    def clear(self) -> None:
        """Let go of all gradients."""
        self.pairs = Pairs()
        self.__dict__.pop("kinds", None)


def by_group(pairs: Pairs) -> Iterator[tuple[int, int, int]]:
    """The param groups that have pairs: index, first pair, and the one after the last."""
    start = 0
    while start < len(pairs):
        group = pairs.groups[start]
        stop = bisect_right(pairs.groups, group, start)
        yield group, start, stop
        start = stop


class Taken(NamedTuple):
    """What a phase has left in ``p.grad`` of each parameter of a plan.

    Args:
        contiguous: every one is there, a plain tensor and contiguous; False says nothing.
    """

    grads: list[Tensor | None]
    contiguous: bool


def take_gradients(plan: Plan) -> Taken:
    """Look at what a phase has left in ``p.grad``, once, and refuse what kernels cannot take.

    Raises:
        TypeError: a gradient is sparse, or distributed otherwise than its parameter.
    """
    grads = [p.grad for p in plan.params]
    if set(map(type, grads)) == {Tensor} and not plan.dtensors:
        found = cast(list[Tensor], grads)
        if {grad.layout for grad in found} == {torch.strided} and all(map(Tensor.is_contiguous, found)):
            return Taken(grads, True)
    for index, (p, grad) in enumerate(zip(plan.params, grads, strict=True)):
        if grad is not None:
            check_dense(grad, plan.name(index))
            settle_gradient(p, plan.name(index))
    return Taken([p.grad for p in plan.params], False)


def check_dense(grad: Tensor, name: str) -> None:
    if grad.layout != torch.strided:
        raise TypeError(f"The gradient of {name} must be dense, got {grad.layout}. Use sparse=False in the embedding.")


def pair_gradients(rows: Rows, stash: Stash, ranks: Ranks, taken: Taken | None = None) -> PairedGradients:
    """Take the forget gradients out of ``stash`` and pair them with the retain gradients in ``p.grad``.

    Afterwards ``p.grad`` is, for every parameter with a gradient in either phase, the tensor that will hold the update:
    the retain gradient, or the forget gradient where there is no other.

    Args:
        taken: the retain gradients of the rows' members, where they have been looked at already.

    Raises:
        RuntimeError: a retain gradient lies in the memory of a stashed one.
    """
    stash.settle()
    waiting = stash.hand_out(rows.params)
    retain, contiguous = Taken([p.grad for p in rows.params], False) if taken is None else taken
    facts = rows.facts(ranks, waiting.values, retain)
    found = _all_present(rows, waiting, retain, contiguous)
    if found is not None:
        return PairedGradients(found, rows, ranks, facts, True, stash.may_be_elsewhere)
    pairs = Pairs()
    any_scales = False
    for member, p in enumerate(rows.params):
        stashed = waiting.stashed(member)
        if stashed is None and retain[member] is None:
            continue
        f, r = _two_gradients(p, stashed)
        scale = None if stashed is None or not f.numel() else stashed.scales
        any_scales = any_scales or (scale is not None and f.dtype == torch.int8)
        row = (p, f, r, rows.rows[member], member, rows.groups[member], r if scale is None else scale)
        for values, value in zip(pairs.lists().values(), row, strict=True):
            values.append(value)
    if not any_scales:
        pairs.scales.clear()
    return PairedGradients(pairs, rows, ranks, facts, False, stash.may_be_elsewhere)


def _all_present(rows: Rows, waiting: Waiting, retain: Sequence[Any], contiguous: bool) -> Pairs | None:
    """The pairs as they are, where both gradients of all parameters are plain, contiguous and apart; else None."""
    forget: list[Any] = waiting.values
    if any_missing(forget) or any_missing(retain):
        return None
    if not (contiguous and waiting.contiguous):  # Not known, as for DTensors: their shards may be.
        forget, retain = to_locals(forget), to_locals(retain)
        if not (set(map(type, forget)) == set(map(type, retain)) == {Tensor}):
            return None
        if not (all(map(Tensor.is_contiguous, retain)) and all(map(Tensor.is_contiguous, forget))):
            return None
    if any(dtype.is_complex for dtype in {r.dtype for r in retain}):
        return None
    if any(map(eq, map(Tensor.data_ptr, forget), map(Tensor.data_ptr, retain))):
        for f, r in zip(forget, retain, strict=True):
            _check_distinct(f, r)
    quantized = bool(waiting.scales) and any(f.dtype == torch.int8 for f in forget)
    scales = [r if s is None else s for s, r in zip(waiting.scales, retain, strict=True)] if quantized else []
    return Pairs(rows.params, forget, list(retain), rows.rows, list(range(len(forget))), rows.groups, scales)


def _two_gradients(param: Tensor, stashed: Stashed | None) -> tuple[Tensor, Tensor]:
    """Both gradients as real local tensors, an absent one with 0 elements; ``p.grad`` is then what will be written."""
    if stashed is not None and param.grad is None:
        param.grad = stashed.restore(param)
        forget = real(to_local(param.grad))
        return forget, forget.new_empty(0)
    assert param.grad is not None
    retain = to_local(param.grad)
    if retain.numel() and _overlaps_itself(retain):
        retain = retain.clone(memory_format=torch.contiguous_format)
        param.grad = like(retain, param)
    retain = real(retain)
    if stashed is None:
        return retain.new_empty(0), retain
    forget = to_local(stashed.values)
    _check_distinct(forget, retain)
    return real(forget), retain


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


def _check_distinct(forget: Tensor, retain: Tensor) -> None:
    # A fake tensor, for one, has no address to ask for.
    if type(forget) is type(retain) is Tensor and forget.data_ptr() == retain.data_ptr() and forget.numel():
        raise RuntimeError(
            "A retain gradient was written over a stashed forget gradient: something keeps the memory of p.grad and "
            "writes to it again. Under DistributedDataParallel pass gradient_as_bucket_view=False."
        )


def _overlaps_itself(grad: Tensor) -> bool:
    return not grad.is_contiguous() and any(
        stride == 0 and size > 1 for size, stride in zip(grad.size(), grad.stride(), strict=True)
    )
