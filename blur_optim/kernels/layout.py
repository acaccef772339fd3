"""How elements lie in memory: what decides whether one loop can visit several tensors."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Contiguous(list[Tensor]):
    """A list of tensors each of which has been found to be contiguous, so that no kernel asks again.

    A slice or a copy of it is a plain list. What puts a tensor into it answers for its layout.
    """


def are_contiguous(*lists: Sequence[Tensor]) -> bool:
    """Whether every tensor of every list is contiguous."""
    return all(isinstance(tensors, Contiguous) or all(map(Tensor.is_contiguous, tensors)) for tensors in lists)


def as_list(values: Sequence[T]) -> list[T]:
    """What an operator takes as a list, without a copy where it is one."""
    return values if isinstance(values, list) else list(values)


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill a block of memory without gap or overlap, in any order of the dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.size(), strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def dense_alike(t: Tensor, other: Tensor) -> bool:
    """Whether both are dense, with their elements in the same order."""
    if t.is_contiguous() and other.is_contiguous():
        return True
    return t.stride() == other.stride() and is_dense(t)


def in_order_of(t: Tensor, other: Tensor) -> Tensor:
    """``t`` with its elements in the order in which ``other``, which is dense, has its own: itself or a copy."""
    if dense_alike(t, other):
        return t
    return torch.empty_strided(t.shape, other.stride(), dtype=t.dtype, device=t.device).copy_(t)


def memory_order(t: Tensor) -> Tensor:
    """The elements of a dense tensor as a vector, in the order in which they lie in memory; a view."""
    return t.as_strided((t.numel(),), (1,))
