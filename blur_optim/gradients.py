"""The gradients of a step, paired by parameter, in the form that the kernels take."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blur_optim.stash import ReferenceStash


@dataclass(frozen=True)
class Pair:
    """The two gradients of one parameter, as real tensors of one shape; an absent one has 0 elements.

    Args:
        param: the parameter.
        group: the index of its param group.
        row: the row of the dots and of the coefficients that it belongs to.
    """

    param: Tensor
    forget: Tensor
    retain: Tensor
    group: int
    row: int

    @property
    def device(self) -> torch.device:
        return self.forget.device


@dataclass
class PairedGradients:
    """All pairs of a step in the order of the param groups, with gamma and alpha of each row."""

    pairs: list[Pair] = field(default_factory=list)
    gammas: list[float] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where the rows' results are computed."""
        return self.pairs[0].device if self.pairs else torch.device("cpu")

    def by_device(self) -> dict[torch.device, list[Pair]]:
        devices: dict[torch.device, list[Pair]] = {}
        for pair in self.pairs:
            devices.setdefault(pair.device, []).append(pair)
        return devices


def check_gradients(param_groups: Sequence[dict[str, Any]]) -> None:
    """Refuse gradients that the kernels cannot take, before anything is done with them.

    Raises:
        TypeError: a gradient is sparse or a DTensor.
    """
    for group_index, group in enumerate(param_groups):
        for index, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            name = f'param_groups[{group_index}]["params"][{index}]'
            if p.grad.layout != torch.strided:
                raise TypeError(
                    f"The gradient of {name} must be dense, got {p.grad.layout}. Use sparse=False in the embedding."
                )
            if hasattr(p.grad, "to_local"):
                raise TypeError(
                    f"The gradient of {name} must be a plain tensor, got a DTensor, which BLUR does not take yet."
                )


def pair_gradients(
    param_groups: Sequence[dict[str, Any]], stash: ReferenceStash, per_parameter: bool
) -> PairedGradients:
    """Take the forget gradients out of ``stash`` and pair them with the retain gradients in ``p.grad``.

    Afterwards ``p.grad`` is, for every parameter with a gradient in either phase, the tensor that will hold the update:
    the retain gradient, or the forget gradient where there is no other.

    Raises:
        RuntimeError: a retain gradient lies in the memory of a stashed one.
    """
    result = PairedGradients()
    for group_index, group in enumerate(param_groups):
        first = len(result.pairs)
        for p in group["params"]:
            forget, retain = stash.pop(p), p.grad
            if forget is None and retain is None:
                continue
            if retain is None:
                p.grad = forget
            elif _overlaps_itself(retain):
                p.grad = retain = retain.clone(memory_format=torch.contiguous_format)
            row = len(result.pairs) if per_parameter else group_index
            result.pairs.append(_make_pair(p, forget, retain, group_index, row))
        rows = len(result.pairs) - first if per_parameter else 1
        result.gammas += [float(group["gamma"])] * rows
        result.alphas += [float(group["retain_weight"])] * rows
    _check_distinct(result.pairs)
    return result


def _make_pair(param: Tensor, forget: Tensor | None, retain: Tensor | None, group: int, row: int) -> Pair:
    present = forget if retain is None else retain
    assert present is not None
    absent = present.new_empty(0)
    forget, retain = (_real(absent if grad is None else grad) for grad in (forget, retain))
    return Pair(param, forget, retain, group, row)


def _real(grad: Tensor) -> Tensor:
    """A complex gradient as its real and imaginary parts: the inner product of the method is the real one."""
    return torch.view_as_real(grad) if grad.is_complex() else grad


def _check_distinct(pairs: Sequence[Pair]) -> None:
    stashed = {pair.forget.untyped_storage().data_ptr() for pair in pairs if pair.forget.numel()}
    if any(pair.retain.untyped_storage().data_ptr() in stashed for pair in pairs if pair.retain.numel()):
        raise RuntimeError(
            "A retain gradient was written over a stashed forget gradient: something keeps the memory of p.grad and "
            "writes to it again. Under DistributedDataParallel pass gradient_as_bucket_view=False."
        )


def _overlaps_itself(grad: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(grad.size(), grad.stride(), strict=True))
