"""The gradients of a step, paired by parameter, in the form that the kernels take."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blur_optim.parallel.ranks import Ranks, is_dtensor, like, settle_gradient, to_local
from blur_optim.step.stash import Stash, Stashed, real

#: Bytes of forget gradients that are brought back from another device at a time; a single larger one is alone.
PIECE_BYTES = 1 << 26


class Pair(NamedTuple):
    """The two gradients of one parameter, as real local tensors of one shape; an absent one has 0 elements.

    Args:
        param: the parameter.
        forget: may be compressed, and with ``stash="cpu"`` in host memory.
        row: the row of the dots and of the coefficients that it belongs to.
        group: the index of its param group.
        scales: of the blocks of ``forget``, where that is int8.
        weight: of its dots in the sum over all ranks.
        member: its place in :attr:`Rows.members`.
    """

    param: Tensor
    forget: Tensor
    retain: Tensor
    row: int
    group: int
    scales: Tensor | None = None
    weight: float = 1.0
    member: int = 0

    @property
    def device(self) -> torch.device:
        return self.retain.device


def check_weight(name: str, value: Any) -> float:
    """Return a gradient's weight as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative or not finite.
    """
    if not isinstance(value, Real | Tensor):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    weight = float(value)
    if not 0 <= weight < float("inf"):
        raise ValueError(f"`{name}` must be finite and >= 0, got {value!r}.")
    return weight


def own_name(name: str, group: Mapping[str, Any]) -> str:
    """Under what key a param group has BLUR's ``gamma`` or ``retain_weight``: with a prefix where its base has one."""
    prefixed = f"blur_{name}"
    return prefixed if prefixed in group else name


@dataclass
class Rows:
    """The rows of the dots and of the coefficients: one per param group, or one per parameter.

    Args:
        members: parameter, its row and the index of its param group, in the order of the param groups.
        gammas, alphas: of each row.
    """

    members: list[tuple[Tensor, int, int]] = field(default_factory=list)
    gammas: list[float] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)

    @classmethod
    def of(
        cls, param_groups: Sequence[dict[str, Any]], takes_part: Callable[[Tensor], bool], per_parameter: bool
    ) -> "Rows":
        rows = cls()
        for index, group in enumerate(param_groups):
            params = [p for p in group["params"] if takes_part(p)]
            first, count = len(rows.gammas), len(params) if per_parameter else 1
            rows.members += [(p, first + (i if per_parameter else 0), index) for i, p in enumerate(params)]
            names = (own_name(name, group) for name in ("gamma", "retain_weight"))
            gamma, alpha = (check_weight(name, group[name]) for name in names)
            rows.gammas += [gamma] * count
            rows.alphas += [alpha] * count
        return rows

    @property
    def params(self) -> list[Tensor]:
        return [p for p, _, _ in self.members]

    def sums(self, table: Tensor) -> Tensor:
        """``[members, 3] -> [rows, 3]``: add what belongs to one row, in an order that no number of threads changes."""
        sizes = [0] * len(self.gammas)
        for _, row, _ in self.members:
            sizes[row] += 1
        if sizes == [1] * len(self.members):
            return table
        # In pieces shorter than what torch shares out to several threads.
        pieces = [torch.split(piece, 4096) for piece in torch.split(table, sizes)]
        return torch.stack([torch.stack([part.sum(0) for part in parts]).sum(0) for parts in pieces])

    @property
    def device(self) -> torch.device:
        """Where a rank computes that has no gradient at all, beside others that have."""
        return to_local(self.members[0][0]).device if self.members else torch.device("cpu")

    def facts(self, ranks: Ranks, has_forget: Callable[[Tensor], bool], has_retain: Callable[[Tensor], bool]) -> str:
        """What has to be the same on all ``ranks``, in words, for :meth:`Ranks.sum_`; empty where there is one rank."""
        if not ranks.are_many:
            return ""
        params = self.params
        weights = f"gamma {sorted(set(self.gammas))}, retain_weight {sorted(set(self.alphas))}"
        if not ranks.see_the_same_gradients:
            return f"{len(params)} parameters, {weights}"
        forget, retain = ([i for i, p in enumerate(params) if has(p)] for has in (has_forget, has_retain))
        size = sum(p.numel() for p in params)
        everywhere = len(forget) == len(retain) == len(params)
        missing = "all of them" if everywhere else f"in the forget phase {forget}, in the retain phase {retain}"
        return f"{len(params)} parameters of {size} elements, gradients of {missing}; {weights}"


@dataclass
class PairedGradients:
    """All pairs of a step in the order of the param groups, their rows, and the ranks that hold the other shards.

    Args:
        facts: what has to be the same on all ranks; empty where there is one.
    """

    pairs: list[Pair]
    rows: Rows
    ranks: Ranks
    facts: str = ""

    @property
    def device(self) -> torch.device:
        """Where the rows' results are computed."""
        if self.pairs:
            return self.pairs[0].device
        return self.rows.device

    def batches(self, group: int | None = None) -> Iterator[tuple[torch.device, float, list[Pair]]]:
        """The pairs (of one param group) by device and weight, in lists that one kernel call takes.

        Forget gradients that wait elsewhere are on the device of their pair for as long as a list is in use.
        """
        for (device, weight), pairs in self._kinds.items():
            mine = pairs if group is None else [pair for pair in pairs if pair.group == group]
            for piece in _pieces(mine):
                yield device, weight, piece

    @cached_property
    def _kinds(self) -> dict[tuple[torch.device, float], list[Pair]]:
        kinds: dict[tuple[torch.device, float], list[Pair]] = {}
        for pair in self.pairs:
            kinds.setdefault((pair.device, pair.weight), []).append(pair)
        return kinds

    @property
    def devices(self) -> set[torch.device]:
        return {device for device, _ in self._kinds}

    def clear(self) -> None:
        """Let go of all gradients."""
        self.pairs.clear()
        self._kinds.clear()


def check_gradients(param_groups: Sequence[dict[str, Any]]) -> None:
    """Refuse gradients that the kernels cannot take, before anything is done with them.

    Raises:
        TypeError: a gradient is sparse, or distributed otherwise than its parameter.
    """
    for group_index, group in enumerate(param_groups):
        for index, p in enumerate(group["params"]):
            grad = p.grad
            if grad is None or (type(grad) is Tensor and grad.layout == torch.strided and not is_dtensor(p)):
                continue
            name = f'param_groups[{group_index}]["params"][{index}]'
            check_dense(grad, name)
            settle_gradient(p, name)


def check_dense(grad: Tensor, name: str) -> None:
    if grad.layout != torch.strided:
        raise TypeError(f"The gradient of {name} must be dense, got {grad.layout}. Use sparse=False in the embedding.")


def pair_gradients(rows: Rows, stash: Stash, ranks: Ranks) -> PairedGradients:
    """Take the forget gradients out of ``stash`` and pair them with the retain gradients in ``p.grad``.

    Afterwards ``p.grad`` is, for every parameter with a gradient in either phase, the tensor that will hold the update:
    the retain gradient, or the forget gradient where there is no other.

    Raises:
        RuntimeError: a retain gradient lies in the memory of a stashed one.
    """
    stash.settle()
    facts = rows.facts(ranks, lambda p: stash.get(p) is not None, lambda p: p.grad is not None)
    result = PairedGradients([], rows, ranks, facts)
    for member, (p, row, group) in enumerate(rows.members):
        stashed = stash.pop(p)
        if stashed is None and p.grad is None:
            continue
        forget, retain = _two_gradients(p, stashed)
        scales = None if stashed is None or not forget.numel() else stashed.scales
        result.pairs.append(Pair(p, forget, retain, row, group, scales, ranks.weight(p), member))
    return result


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


def _pieces(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """The pairs as they are where all forget gradients are at hand, else in pieces that are brought to the device."""
    if all(pair.forget.is_cpu == pair.retain.is_cpu for pair in pairs):
        if pairs:
            yield pairs
        return
    bytes_before = 0
    numbers = []
    for pair in pairs:
        numbers.append(bytes_before // PIECE_BYTES)
        bytes_before += pair.forget.nbytes
    for _, piece in groupby(zip(numbers, pairs, strict=True), key=lambda item: item[0]):
        yield [p._replace(forget=p.forget.to(p.device, non_blocking=True)) for _, p in piece]


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
