"""The Triton kernels in Triton's interpreter, on the CPU; tests/kernels/test_triton.py runs this folder.

The interpreter replaces the compiler for a whole process, so the tests run in one of their own. It shows that the
kernels compute what they should; it has one thread, no GPU's memory model, and nothing here was ever a result of a GPU.
It takes about a microsecond per element and several milliseconds per launch, hence the small sizes.
"""

import os
import sys
from pathlib import Path

import pytest

from blur_optim.kernels.triton import launch

sys.path.insert(0, str(Path(__file__).parents[1]))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


def pytest_configure(config):
    if INTERPRETED:  # Of the interpreter of Triton 3.6, from NumPy before 2.4; a later one makes it an error.
        ndim = "ignore:Conversion of an array with ndim:DeprecationWarning"
        config.addinivalue_line("filterwarnings", ndim)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched."""
    names, run = [], launch.run

    def recorded(kernel, *args, **constants):
        names.append(kernel.__name__)
        run(kernel, *args, **constants)

    monkeypatch.setattr(launch, "run", recorded)
    return names
