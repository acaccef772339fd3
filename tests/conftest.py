"""One thread per test process: two processes on two cores are faster than two threads each."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    torch.set_num_threads(1)
    torch.manual_seed(0)
