"""When the Triton backend is chosen, and why it may not be; its kernels in Triton's interpreter, a process of its own.

What those tests are: interpreted/. What the compiled kernels look like: test_triton_compiled.py.
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blur_optim.kernels import BACKEND_VARIABLE, BACKENDS, foreach, native, select_backend, triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def version_of(package):
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


def test_in_the_interpreter():
    for module in ("triton", "numpy"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed, which Triton's interpreter needs")
    if version_of("triton") < (3, 7) and version_of("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 does not work with NumPy 2.4 and later: `numpy==2.3.5`")
    tests = Path(__file__).with_name("interpreted")
    command = [sys.executable, "-m", "pytest", "-q", "--durations=15", "-p", "no:cacheprovider", str(tests)]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 120  # They were collected.


@pytest.mark.parametrize(
    ("native_why_not", "triton_why_not", "expected"),
    [("", "", "native"), ("not built", "", "triton"), ("not built", "not installed", "foreach")],
)
def test_the_choice_for_a_gpu(native_why_not, triton_why_not, expected, monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(native, "why_not", lambda device: native_why_not)
    monkeypatch.setattr(triton, "why_not", lambda device: triton_why_not)
    assert select_backend(None, CUDA) is BACKENDS[expected]


def test_the_cpu_never_gets_the_interpreter_by_itself(monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(native, "why_not", lambda device: "not built")
    assert select_backend(None, CPU) is foreach


def test_why_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton._why_not_compile.cache_clear()
    with pytest.raises(
        ImportError, match=r"`backend` is 'triton', which is not available: .*for cpu.*TRITON_INTERPRET"
    ):
        select_backend("triton", CPU)
    assert "no kernels for mps" in triton.why_not(torch.device("mps"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in triton.why_not(CUDA)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setenv("CC", "gcc")
    assert "capability 8.0" in triton.why_not(CUDA)
    triton._why_not_compile.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert triton.why_not(CUDA) == ""
    triton._why_not_compile.cache_clear()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert "C compiler" in triton.why_not(CUDA)
    triton._why_not_compile.cache_clear()
