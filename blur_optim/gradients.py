"""The gradients of a step, paired by parameter, in the form that the kernels take."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blur_optim.distributed import Ranks, like, settle_gradient, to_local
from blur_optim.stash import Stash, Stashed, real

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
    """

    param: Tensor
    forget: Tensor
    retain: Tensor
    row: int
    group: int
    scales: Tensor | None = None
    weight: float = 1.0

    @property
    def device(self) -> torch.device:
        return self.retain.device


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
            rows.gammas += [float(group["gamma"])] * count
            rows.alphas += [float(group["retain_weight"])] * count
        return rows


@dataclass
class PairedGradients:
    """All pairs of a step in the order of the param groups, their rows, and the ranks that hold the other shards."""

    pairs: list[Pair]
    rows: Rows
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        """Where the rows' results are computed."""
        return self.pairs[0].device if self.pairs else torch.device("cpu")

    def batches(self, group: int | None = None) -> Iterator[tuple[torch.device, float, list[Pair]]]:
        """The pairs (of one param group) by device and weight, in lists that one kernel call takes.

        Forget gradients that wait elsewhere are on the device of their pair for as long as a list is in use.
        """
        pairs = [pair for pair in self.pairs if group is None or pair.group == group]
        kinds: dict[tuple[torch.device, float], list[Pair]] = {}
        for pair in pairs:
            kinds.setdefault((pair.device, pair.weight), []).append(pair)
        for (device, weight), mine in kinds.items():
            for piece in _pieces(mine):
                yield device, weight, piece


def check_gradients(param_groups: Sequence[dict[str, Any]]) -> None:
    """Refuse gradients that the kernels cannot take, before anything is done with them.

    Raises:
        TypeError: a gradient is sparse.
    """
    for group_index, group in enumerate(param_groups):
        for index, p in enumerate(group["params"]):
            grad = p.grad
            if grad is None or (type(grad) is Tensor and grad.layout == torch.strided):
                continue
            check_dense(grad, f'param_groups[{group_index}]["params"][{index}]')
            settle_gradient(p)


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
    result = PairedGradients([], rows, ranks)
    for p, row, group in rows.members:
        stashed = stash.pop(p)
        if stashed is None and p.grad is None:
            continue
        forget, retain = _two_gradients(p, stashed)
        scales = None if stashed is None or not forget.numel() else stashed.scales
        result.pairs.append(Pair(p, forget, retain, row, group, scales, ranks.weight(p)))
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
    if all(pair.forget.device == pair.device for pair in pairs):
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
    if forget.data_ptr() == retain.data_ptr() and forget.numel():
        raise RuntimeError(
            "A retain gradient was written over a stashed forget gradient: something keeps the memory of p.grad and "
            "writes to it again. Under DistributedDataParallel pass gradient_as_bucket_view=False."
        )


def _overlaps_itself(grad: Tensor) -> bool:
    return not grad.is_contiguous() and any(
        stride == 0 and size > 1 for size, stride in zip(grad.size(), grad.stride(), strict=True)
    )
