"""Sharded parameters: from a DTensor to its local shard and the weight of what is summed there, and the one all-reduce.

A dot over all parameters is a sum over ranks. In a sum over the W ranks of one group, a tensor that lies whole on every
rank would count W times, and one in n shards W / n times; weighted with n / W, each counts once. That is exact for
FSDP, HSDP, tensor parallelism and their products, for plain tensors among them, and for uneven and empty shards.

The only module that knows torch.distributed. Nothing of it is imported before a DTensor exists.
"""

from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor


def is_dtensor(t: Tensor) -> TypeGuard[Any]:
    # No isinstance: importing DTensor for it would cost every user of the package that import.
    return type(t) is not Tensor and hasattr(t, "to_local")


def to_local(t: Tensor) -> Tensor:
    """The shard of a DTensor that this rank holds, without a copy; any other tensor as it is."""
    return t.to_local() if is_dtensor(t) else t


def like(local: Tensor, param: Tensor) -> Tensor:
    """Wrap a local tensor as ``param`` is wrapped; the inverse of :func:`to_local`."""
    if not is_dtensor(param):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def settle_gradient(param: Tensor) -> None:
    """Bring ``param.grad`` to the placements of ``param``: what is a Partial sum over ranks until now is added up.

    Tensor parallelism with SequenceParallel leaves the gradients of norm weights so. One collective for each of them.
    """
    grad: Any = param.grad
    if grad is not None and is_dtensor(grad) and is_dtensor(param):
        placements = param.placements
        if grad.placements != placements:
            param.grad = grad.redistribute(placements=placements)


class Ranks:
    """The ranks over which the dots of these parameters are summed; a single one where nothing is sharded."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        sharded = next((p for p in params if is_dtensor(p)), None)
        self.group = None if sharded is None else _group_of(sharded.device_mesh)

    @property
    def is_many(self) -> bool:
        return self.group is not None

    def weight(self, param: Tensor) -> float:
        """The share of this rank's sum over the local shard of ``param`` in the sum over all ranks."""
        if self.group is None:
            return 1.0
        shards = 1
        if is_dtensor(param):
            for dim, placement in enumerate(param.placements):
                if placement.is_shard() or type(placement).__name__ == "_StridedShard":
                    shards *= param.device_mesh.size(dim)
        return shards / int(self.group.size())

    def sum_(self, table: Tensor) -> Tensor:
        """Add the tables of all ranks, in place."""
        if self.group is not None:
            torch.distributed.all_reduce(table, group=self.group)
        return table


def _group_of(mesh: Any) -> Any:
    """The process group of all ranks that hold the parameters, of which ``mesh`` may be one dimension."""
    import torch.distributed as dist

    if mesh.ndim == 1 and mesh.size() < dist.get_world_size():
        root = mesh._get_root_mesh()
        if root.size() == dist.get_world_size():
            return dist.group.WORLD
        return mesh.get_group() if root.ndim == 1 else root._flatten().get_group()
    return dist.group.WORLD
