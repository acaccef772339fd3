"""Peak memory of one rank: counted while a step runs on tensors that have shapes, but no memory and no values."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist
from scale_methods import METHODS, Problem
from scale_models import Case, build
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from blur_optim.kernels import blocks
from blur_optim.parallel.ranks import to_local
from blur_optim.step.stash import STASHES, Stash

_DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Peak:
    """Bytes of one rank.

    Args:
        parameters, state: the shards and the optimizer's state of this rank.
        before: what is there when a step begins; the first two and little else.
        peak: the most that is there at once in the second step.
        seconds: what it took to find out.
    """

    parameters: int
    state: int
    before: int
    peak: int
    seconds: float


class GlooMemTracker(FSDPMemTracker):
    """Count also the copy of its input that gloo makes to reduce-scatter, and NCCL does not."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.c10d._reduce_scatter_base_.default:
            super().__torch_dispatch__(torch.ops.aten.clone.default, types, (args[1],))
        return result


def simulate(case: Case, on_cpu: bool = False) -> Peak:
    """Take the step of rank 0 among ``case.ranks``, none of which exists.

    Args:
        on_cpu: what the step takes on a CPU with gloo, rather than on a GPU.
    """
    tracker, kind = (GlooMemTracker, contextlib.nullcontext) if on_cpu else (FSDPMemTracker, _as_on_a_gpu)
    dist.init_process_group("fake", rank=0, world_size=case.ranks, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (case.ranks,))
        with kind(), FakeTensorMode():
            return count(case, mesh, tracker)
    finally:
        dist.destroy_process_group()


def count(case: Case, mesh: DeviceMesh, tracker_type: type[FSDPMemTracker] = FSDPMemTracker) -> Peak:
    """Count what the second step needs; its tensors may be real ones."""
    began = time.perf_counter()
    model = build(case, mesh)
    tracker = tracker_type(model)
    problem = Problem(model, case.batch, case.length, tracker.reset_mod_stats)
    optimizer, step = METHODS[case.method][1](problem)
    with tracker:
        step()  # Makes the optimizer's state, and FSDP's buffers.
        # The tracker's own peak is that of its whole life.
        tracker._peak_mem_snap = tracker.get_tracker_snapshot()
        tracker._peak_mem = {device: kinds["Total"] for device, kinds in tracker._peak_mem_snap.items()}
        before = tracker._peak_mem[_DEVICE]
        step()
    peak = tracker.get_tracker_snapshot("peak")[_DEVICE]["Total"]
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return Peak(_bytes(model.parameters()), _bytes(state), before, peak, time.perf_counter() - began)


def _bytes(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    return sum(to_local(t).nbytes for t in tensors)


class ElsewhereStash(Stash):
    """Stand for ``stash="cpu"`` where the device is the CPU already: what is on "meta" is not on the device either."""

    may_be_elsewhere = True

    def keep(self, params: Sequence[Tensor], places: Sequence[int]) -> None:
        values = self._waiting.values
        for i in places:
            values[i] = None if values[i] is None else to_local(values[i]).to("meta")


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Let BLUR take the sizes and ways that it takes on a GPU; the fake tensors say that they are on the CPU."""
    with patch.dict(STASHES, {"cpu": ElsewhereStash}), patch.object(blocks, "CPU_SLAB_SIZE", blocks.SLAB_SIZE):
        yield
