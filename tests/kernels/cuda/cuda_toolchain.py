"""The compilers and tools of the CUDA tests. What is missing here skips the test, by name."""

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
CUDA_HOME = os.environ.get("CUDA_HOME") or "/usr/local/cuda"

# Kernels access 16 bytes at a time through pointers of other types. The emulator's jumps between stacks would look like
# an attack to _FORTIFY_SOURCE.
EMULATE = [
    "-std=c++17",
    f"-include{HERE / 'emulator.h'}",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
]


def program(name: str, *places: str) -> str:
    path = shutil.which(name) or shutil.which(name, path=os.pathsep.join([f"{CUDA_HOME}/bin", *places]))
    if path is None:
        pytest.skip(f"needs {name}")
    return path


def disassembler(name: str) -> str:
    """Of the CUDA toolkit, which not every distribution of it has, or of the triton wheel."""
    triton = importlib.util.find_spec("triton")
    places = triton.submodule_search_locations if triton and triton.submodule_search_locations else []
    return program(name, *(f"{place}/backends/nvidia/bin" for place in places))


def cuda_headers() -> str:
    """The folder of the CUDA toolkit's headers, complete ones: the triton wheel lacks some."""
    places = [f"{CUDA_HOME}/include"]
    if shutil.which("nvcc"):
        places += re.findall(r'"-I([^"]+)"', run("nvcc", "--dryrun", "-x", "cu", "/dev/null"))
    for place in places:
        if all((Path(place) / header).exists() for header in ("cuda_runtime.h", "cuda_bf16.h", "nv/target")):
            return place
    pytest.skip("needs the headers of the CUDA toolkit")


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, f"{command[0]} exits with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def built(path: Path, build: Callable[[Path], object]) -> Path:
    """``path``, made by ``build(temporary path)`` in the first of the test processes that needs it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_name(path.name + ".new")
            build(unfinished)
            unfinished.rename(path)
    return path


def emulated_object(path: Path, source: Path, *flags: str, csrc: Path = CSRC) -> Path:
    """``source`` compiled by g++ as the emulator sees it."""
    command = [program("g++"), *EMULATE, *flags, f"-I{csrc}", f"-I{cuda_headers()}", "-x", "c++", "-c", source, "-o"]
    return built(path, lambda new: run(*command, new))


def linked(path: Path, *arguments: object) -> Path:
    return built(path, lambda new: run(program("g++"), *arguments, "-o", new))
