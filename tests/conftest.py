"""One thread per test process: two processes on two cores are faster than two threads each."""

import gc
import os

import forking
import pytest
import torch

# Nothing is fetched from a hub. Before the first import of its library, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

_modules_seen: set[str] = set()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What lives when a module begins, libraries above all, stays: spare the collector another look at it.

    Without this each collection, a test's own or Python's, walks the million objects of torch and its compiler.
    """
    module = item.nodeid.partition("::")[0]
    if module not in _modules_seen:
        _modules_seen.add(module)
        gc.collect()
        gc.freeze()


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(item.path.parent.name in ("examples", "integrations") for item in session.items):
        forking.expect_scripts()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _reproducible():
    torch.set_num_threads(1)
    torch.manual_seed(0)
