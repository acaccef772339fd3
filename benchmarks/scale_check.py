"""The simulation against steps that really run: two processes on the CPU, a small model."""

import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from memory_tracker import ALLOCATOR, process_peak
from scale_methods import METHODS, Problem
from scale_models import Case, build
from scale_simulation import Peak, count, simulate
from torch.distributed.device_mesh import init_device_mesh

RANKS = 2
#: In float32, whose matrix products take no scratch memory on a CPU, and so long that buffers of gloo are small.
CASES = tuple(
    Case("tiny", RANKS, method, length=256, compute_dtype="float32")
    for method in ("weighted_sum", "reference", "int8", "recompute", "original")
)


@dataclass(frozen=True)
class Check:
    """Bytes of rank 0.

    Args:
        predicted: by the simulation.
        counted: tensors of the real step.
        process: by how many bytes the process grew, and what it had before; None where the system does not tell.
    """

    case: Case
    predicted: Peak
    counted: Peak
    process: int | None

    @property
    def error(self) -> float:
        return self.predicted.peak / self.counted.peak - 1


def check(cases: Sequence[Case] = CASES) -> list[Check]:
    """Predict and count each case."""
    counted = count_for_real(cases)
    return [Check(case, simulate(case, on_cpu=True), *found) for case, found in zip(cases, counted, strict=True)]


def count_for_real(cases: Sequence[Case]) -> list[tuple[Peak, int | None]]:
    """Run the cases on two processes. Return of each what rank 0 counted, and its process's own peak."""
    # Spawned, for the settings of the allocator: a fork server may run already, with others.
    spawn = get_context("spawn")
    with (
        patch.dict(os.environ, ALLOCATOR),
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(RANKS, mp_context=spawn) as pool,
    ):
        ranks = [pool.submit(_run_rank, cases, rank, Path(folder) / "store") for rank in range(RANKS)]
        return ranks[0].result()


def _run_rank(cases: Sequence[Case], rank: int, store: Path) -> list[tuple[Peak, int | None]]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        # The process first: what comes later finds memory that is free, but not given back.
        rises = [_process_rise(case, mesh) for case in cases]
        return [(count(case, mesh), rise) for case, rise in zip(cases, rises, strict=True)]
    finally:
        dist.barrier()  # A process that left gloo early would take the other down.
        dist.destroy_process_group()


def _process_rise(case: Case, mesh: dist.DeviceMesh) -> int | None:
    problem = Problem(build(case, mesh), case.batch, case.length, lambda: None)
    _, step = METHODS[case.method][1](problem)
    step()
    return process_peak(step)
