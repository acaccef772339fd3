"""The gradients of a step, paired by parameter, in the form that the kernels take."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blur_optim.stash import ReferenceStash


class Pair(NamedTuple):
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
            grad = p.grad
            if grad is None or (type(grad) is Tensor and grad.layout == torch.strided):
                continue
            name = f'param_groups[{group_index}]["params"][{index}]'
            if grad.layout != torch.strided:
                raise TypeError(
                    f"The gradient of {name} must be dense, got {grad.layout}. Use sparse=False in the embedding."
                )
            if hasattr(grad, "to_local"):
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
            if forget is None or retain is None:
                forget, retain = _complete(p, forget, retain)
            else:
                _check_distinct(forget, retain)
            if retain.numel() and _overlaps_itself(retain):
                p.grad = retain = retain.clone(memory_format=torch.contiguous_format)
            row = len(result.pairs) if per_parameter else group_index
            result.pairs.append(Pair(p, _real(forget), _real(retain), group_index, row))
        rows = len(result.pairs) - first if per_parameter else 1
        result.gammas += [float(group["gamma"])] * rows
        result.alphas += [float(group["retain_weight"])] * rows
    return result


def _complete(param: Tensor, forget: Tensor | None, retain: Tensor | None) -> tuple[Tensor, Tensor]:
    """Write the missing one of two gradients as an absent one, and let ``p.grad`` be the one that is there."""
    if retain is None:
        assert forget is not None
        param.grad = forget
        return forget, forget.new_empty(0)
    return retain.new_empty(0), retain


def _real(grad: Tensor) -> Tensor:
    """A complex gradient as its real and imaginary parts: the inner product of the method is the real one."""
    return torch.view_as_real(grad) if grad.is_complex() else grad


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
