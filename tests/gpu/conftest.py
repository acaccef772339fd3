"""Tests on a GPU: ``pytest -m gpu``. Without one they are skipped, and what needs none of it is rehearsed elsewhere.

BLUR_OPTIM_GPU_TEST_DEVICE=cpu runs those that can run there: it shows that the tests themselves are right, and nothing
of the GPU. tests/benchmarks/test_gpu_bench.py does so.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels")]  # The tolerances are those of the CPU's tests.

DEVICE = torch.device(os.environ.get("BLUR_OPTIM_GPU_TEST_DEVICE", "cuda"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    there = DEVICE.type != "cuda" or torch.cuda.is_available()
    reason = "" if there else "needs an NVIDIA GPU, and torch sees none"
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker("gpu")
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif DEVICE.type != "cuda" and item.get_closest_marker("cuda_only"):
            item.add_marker(pytest.mark.skip(reason="a rehearsal on the CPU: this needs CUDA itself"))


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def _nothing_is_left(device: torch.device) -> Iterator[None]:
    """An error of a kernel shows in the test that launched it."""
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()
