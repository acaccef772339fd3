"""Sharded parameters: from a DTensor to its local shard and the weight of what is summed there, and the one all-reduce.

A dot over all parameters is a sum over ranks. In a sum over the W ranks of one group, a tensor that lies whole on every
rank would count W times, and one in n shards W / n times; weighted with n / W, each counts once. That is exact for
FSDP, HSDP, tensor parallelism and their products, for plain tensors among them, and for uneven and empty shards.

Nothing of torch.distributed is imported before a DTensor exists. What DDP and FSDP hide from ``p.grad`` is the matter
of :mod:`blur_optim.parallel.wrappers`.
"""

import functools
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._guards import active_fake_mode

from blur_optim.parallel.fsdp1 import fsdp1_handles, fsdp1_ids

# Names of mesh dimensions that parameters are neither sharded nor replicated over. Most stages also differ in size and
# fail the comparison of ranks; those of equal size look like replicas.
_PIPELINES = ("pp", "pipe", "pipeline", "stage")
PLAIN = frozenset((Tensor, torch.nn.Parameter))
# Of a fingerprint: its square times the number of ranks stays exact in float64 up to 2^17 ranks.
_BITS = 18


def is_dtensor(t: Tensor) -> TypeGuard[Any]:
    return type(t) is not Tensor and _is_dtensor_type(type(t))


@functools.cache
def _is_dtensor_type(cls: type) -> bool:
    # No issubclass: importing DTensor for it would cost every user of the package that import.
    return hasattr(cls, "to_local")


def to_local(t: Tensor) -> Tensor:
    """The shard of a DTensor that this rank holds, without a copy; any other tensor as it is."""
    if not is_dtensor(t):
        return t
    local: Tensor = t.to_local()
    if type(local) is not Tensor and hasattr(local, "wait"):
        # Behind an asynchronous collective it is a promise, whose memory kernels must not read.
        local = local.wait()
    return local


def to_locals(tensors: Iterable[Tensor]) -> list[Tensor]:
    """:func:`to_local` of each; next to nothing where none is distributed: a list is then returned as it is."""
    tensors = tensors if isinstance(tensors, list) else list(tensors)
    if set(map(type, tensors)) <= PLAIN:
        return tensors
    return [to_local(t) for t in tensors]


def like(local: Tensor, param: Tensor) -> Tensor:
    """Wrap a local tensor as ``param`` is wrapped; the inverse of :func:`to_local`."""
    if not is_dtensor(param):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def settle_gradient(param: Tensor, name: str) -> None:
    """Bring ``param.grad`` to the placements of ``param``: what is a Partial sum over ranks until now is added up.

    Tensor parallelism with SequenceParallel leaves the gradients of norm weights so. One collective for each of them.

    Raises:
        TypeError: the gradient lies on other ranks than the parameter, or one of the two is no DTensor.
    """
    grad: Any = param.grad
    if grad is None or not (is_dtensor(grad) or is_dtensor(param)):
        return
    if not (is_dtensor(grad) and is_dtensor(param) and grad.device_mesh == param.device_mesh):
        raise TypeError(
            f"The gradient of {name} must be a DTensor on the mesh of its parameter, got {_where(grad)} for a "
            f"parameter that is {_where(param)}. Distribute both alike before the phase ends."
        )
    if grad.placements != param.placements:
        param.grad = grad.redistribute(placements=param.placements)


class Ranks:
    """The ranks over which the dots of a step are summed; a single one where nothing is sharded.

    Raises:
        ValueError: the parameters lie on meshes of different ranks, or are neither sharded nor replicated there.
    """

    def __init__(self) -> None:
        self._groups: list[Any] = []
        self._size = 1
        self._device_type = "cpu"
        self._fsdp1: dict[int, Any] = {}
        self._unread: list[tuple[Any, Tensor, str]] = []

    def update(self, params: Sequence[Tensor], dtensors: Sequence[Any] | None = None) -> None:
        """Look at how ``params`` are distributed now, and at what is known by now about earlier sums.

        Args:
            dtensors: those of ``params`` that are DTensors, where that is known.

        Raises:
            RuntimeError: the ranks have not taken the same step.
        """
        self._read_verdicts()
        flattened = fsdp1_ids(params)
        if flattened != self._fsdp1.keys():
            self._fsdp1 = fsdp1_handles(flattened)
            if flattened != self._fsdp1.keys():
                raise ValueError(
                    "The parameters must lie in FullyShardedDataParallel still, got some with its mark alone."
                )
        meshes = {
            id(p.device_mesh): p.device_mesh for p in (filter(is_dtensor, params) if dtensors is None else dtensors)
        }
        self._groups, self._size = [], 1
        if self._fsdp1:
            self._use_fsdp1(bool(meshes))
        elif meshes:
            self._use_meshes(list(meshes.values()))

    @property
    def are_many(self) -> bool:
        return bool(self._groups)

    @property
    def see_the_same_gradients(self) -> bool:
        """Whether a parameter without a gradient on one rank has none on any. Not where FSDP1 leaves out its shard."""
        return not self._fsdp1

    def weight(self, param: Tensor) -> float:
        """The share of this rank's sum over the local shard of ``param`` in the sum over all ranks."""
        if not self._groups:
            return 1.0
        shards = 1
        if id(param) in self._fsdp1:
            shards = self._size
        elif is_dtensor(param):
            for dim, placement in enumerate(param.placements):
                if _is_shard(placement):
                    shards *= param.device_mesh.size(dim)
                elif not placement.is_replicate():
                    raise ValueError(f"A parameter must be sharded or replicated, got {placement}. Redistribute it.")
        return shards / self._size

    def sum_(self, table: Tensor, facts: str) -> Tensor:
        """Add the tables of all ranks, ``[n, 3 or more]`` float64.

        Args:
            facts: what has to be the same on all ranks. A fingerprint of it travels along. Where the ranks disagree the
                result is NaN, so that the step is skipped; the error comes at once where that is free to read (on the
                CPU), else when a later step finds that the device has got that far.

        Raises:
            RuntimeError: the ranks disagree.
        """
        if not self._groups:
            return table
        home = table.device
        # CPU offload: the gradients are in host memory, where the group of a GPU cannot sum.
        if home.type != self._device_type:
            table = table.to(self._device_type)
        own = zlib.crc32(facts.encode()) >> (32 - _BITS)
        sums = torch.cat([table, _row(table, own, own * own, 1)])
        for group in self._groups:
            torch.distributed.all_reduce(sums, group=group)
        # All the same only if the mean and the mean square are as here: a variance of zero. Every rank comes to the
        # same verdict, for where they differ, no rank is at both means.
        agree = (sums[-1:] == _row(table, own * self._size, own * own * self._size, self._size)).all()
        self._judge(agree, facts)
        return torch.where(agree, sums[:-1], torch.nan).to(home)

    def _use_meshes(self, meshes: list[Any]) -> None:
        import torch.distributed as dist
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily():  # A mesh is a tensor of ranks, made before.
            roots = {tuple(sorted(root.mesh.flatten().tolist())): root for root in (m._get_root_mesh() for m in meshes)}
        if len(roots) > 1:
            raise ValueError(
                f"The parameters must lie on slices of one DeviceMesh, got meshes of ranks {sorted(roots)}. Whether "
                "these hold the same parameters or others cannot be told. Make one mesh and slice it."
            )
        ((ranks, root),) = roots.items()
        if any(name in _PIPELINES and root.size(i) > 1 for i, name in enumerate(root.mesh_dim_names or ())):
            raise ValueError(
                f"The parameters must be on all ranks of their mesh, whole or sharded, got {root}. Pipeline stages, "
                "which hold other parameters each, are not supported."
            )
        self._size, self._device_type = len(ranks), root.device_type
        # With a group of all ranks at hand one all-reduce is enough; else one for each dimension.
        self._groups = [dist.group.WORLD] if self._size == dist.get_world_size() else root.get_all_groups()

    def _use_fsdp1(self, has_dtensors: bool) -> None:
        handles = list(self._fsdp1.values())
        groups = {id(handle.process_group): handle.process_group for handle in handles}
        if has_dtensors or len(groups) > 1 or any(handle._fsdp_extension is not None for handle in handles):
            raise ValueError(
                "FullyShardedDataParallel must not be mixed with DTensors or with a second process group. Use "
                "fully_shard, which composes with them."
            )
        (group,) = groups.values()
        self._groups, self._size = [group], group.size()
        self._device_type = handles[0].device.type
        if self._size > 1 and not all(handle.uses_sharded_strategy for handle in handles):
            # Nothing would tell a phase that ends under no_sync() from one that does not.
            raise ValueError(
                "FullyShardedDataParallel must not have NO_SHARD as its strategy. Use DistributedDataParallel."
            )

    def _judge(self, agree: Tensor, facts: str) -> None:
        if active_fake_mode() is not None:
            return  # Fake tensors have no values.
        if agree.device.type == "cpu":
            if not agree:
                _refuse_to_differ(facts)
            return
        verdict = torch.empty_like(agree, device="cpu", pin_memory=True)
        verdict.copy_(agree, non_blocking=True)
        self._unread.append((torch.accelerator.current_stream(agree.device).record_event(), verdict, facts))

    def _read_verdicts(self) -> None:
        while self._unread and self._unread[0][0].query():
            _, verdict, facts = self._unread.pop(0)
            if not verdict:
                _refuse_to_differ(facts)


def _row(table: Tensor, *values: int) -> Tensor:
    """``[1, columns]``, ending in zeros; made of fills: a copy from the host would synchronise."""
    values += (0,) * (table.shape[1] - len(values))
    return torch.stack([table.new_full((), float(value)) for value in values])[None]


def _is_shard(placement: Any) -> bool:
    # A strided one, of FSDP over tensor parallelism, is no Shard by torch's own account.
    return bool(placement.is_shard()) or type(placement).__name__ == "_StridedShard"


def _where(t: Any) -> str:
    return f"{t.placements} on {t.device_mesh}" if is_dtensor(t) else "a plain tensor"


def _refuse_to_differ(facts: str) -> None:
    raise RuntimeError(
        "All ranks must take the same step, got different ones; nothing was updated. Compare this message on the other "
        f"ranks: {facts}. A rank with no data for a loss computes it on other data, times zero: docs/distributed.md."
    )
