"""Tests marked ``ranks(n)`` run on n processes at once; see ``launch.py``."""

import pytest
from launch import result_of


def pytest_configure(config):
    config.addinivalue_line("markers", "ranks(n): run the body of this test on each of n processes, gloo between them")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if pyfuncitem.get_closest_marker("ranks") is None:
        return None
    error = result_of(pyfuncitem)
    if error:
        pytest.fail(error, pytrace=False)
    return True
