"""How lists of tensors are cut into pieces of work, the same way for every backend."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class Bucket(NamedTuple):
    """Neighbouring tensors of one row and one dtype, handled as one flat vector."""

    row: int
    indices: list[int]


def buckets(tensors: Sequence[Tensor], rows: Sequence[int], limit: int) -> Iterator[Bucket]:
    """Group neighbours of one row and one dtype until a bucket holds ``limit`` elements.

    A tensor larger than ``limit`` has a bucket to itself. The grouping depends on shapes alone, so sums over the
    buckets are reproducible.
    """
    bucket: Bucket | None = None
    size = 0
    for i, (t, row) in enumerate(zip(tensors, rows, strict=True)):
        if (
            bucket is None
            or row != bucket.row
            or t.dtype != tensors[bucket.indices[0]].dtype
            or size + t.numel() > limit
        ):
            if bucket is not None:
                yield bucket
            bucket, size = Bucket(row, []), 0
        bucket.indices.append(i)
        size += t.numel()
    if bucket is not None:
        yield bucket
