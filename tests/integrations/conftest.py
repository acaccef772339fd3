"""Small matrices are no work for several threads."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
    # Older transformers leave the precision of one run here, for all that follow in the process.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
