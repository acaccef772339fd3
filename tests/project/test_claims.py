"""What is claimed of torch and Triton stands in one way everywhere, and in what a release has to pass."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
OLDEST_TORCH = re.search(r'"torch>=([\d.]+)"', PYPROJECT)[1]
OLDEST_TRITON = re.search(r'triton = \["triton>=([\d.]+)', PYPROJECT)[1]


def test_the_oldest_torch_is_the_same_everywhere():
    setup = (ROOT / "setup.py").read_text()
    major, minor = OLDEST_TORCH.split(".")
    assert re.search(r'TORCH_TARGET_VERSION = "(\w+)"', setup)[1] == f"0x{int(major):02x}{int(minor):02x}000000000000"
    assert f'"torch >= {OLDEST_TORCH} was not found' in setup
    assert f"torch ≥ {OLDEST_TORCH}" in (ROOT / "README.md").read_text()
    assert f"torch ≥ {OLDEST_TORCH}" in (ROOT / "docs/gpu.md").read_text()


def test_a_release_passes_with_the_oldest_and_the_newest():
    checklist = (ROOT / "CONTRIBUTING.md").read_text().partition("## Before a release")[2]
    commands = re.findall(r"`make test VENV=(\S+) TORCH=(\"[^\"]+\"|\S+)`", checklist)
    assert len(commands) == 2
    assert commands[0][1].strip('"').split()[0] == f"torch=={OLDEST_TORCH}.0"
    assert commands[1][1] == "torch"
    assert commands[0][0] != commands[1][0]
    assert f"its own Triton, {OLDEST_TRITON}" in checklist
    # The tests' own environment must be one that the oldest torch can be in.
    dev = PYPROJECT.partition("dev = [")[2].partition("\n]")[0]
    assert f'"triton>={OLDEST_TRITON};' in dev


def test_no_call_in_a_triton_kernel_has_starred_arguments():
    """Triton 3.6 does not compile them; it came to light only where every kernel was compiled with it."""
    jitted = [
        node
        for file in (ROOT / "blur_optim/kernels/triton/kernels").glob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.dump(d) for d in node.decorator_list)
    ]
    assert len(jitted) > 10
    calls = [call for function in jitted for call in ast.walk(function) if isinstance(call, ast.Call)]
    starred = [ast.unparse(call) for call in calls if any(isinstance(a, ast.Starred) for a in call.args)]
    assert starred == []
