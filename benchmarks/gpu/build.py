"""Build the extension for this device alone, out of place; beside it the variants of the tuning sweep, and a driver.

Nothing is installed: later stages find the extension by an environment variable, and the variants by their paths.
"""

import functools
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from .context import ROOT, Context, Sheet
from .machine import nvidia_program
from .tuning import VARIANTS

DRIVER = ROOT / "tests/kernels/cuda/driver.cpp"
#: What a plain symbol needs to be found in a variant, which is no torch extension; the later flag wins.
VISIBLE = "-Xcompiler=-fvisibility=default"
RUNTIME = ("-lcudart_static", "-lrt", "-lpthread", "-ldl")


def run(context: Context, sheet: Sheet) -> None:
    on_gpu = context.device == "cuda"
    os.environ["BLUR_OPTIM_BUILD"] = "1"
    os.environ["BLUR_OPTIM_CUDA"] = "1" if on_gpu else "0"
    if on_gpu:
        capability = torch.cuda.get_device_capability()
        os.environ["BLUR_OPTIM_CUDA_ARCHITECTURES"] = f"{capability[0]}{capability[1]}"
        sheet.note(f"The extension is compiled for compute capability {capability[0]}.{capability[1]} alone.")
        setup()  # Before there are threads, which would patch setuptools in each other's way.
    # The extension first, since everything rests on it; the rest beside it where there are cores.
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        jobs: dict[Future[Any], str] = {pool.submit(build_extension, context): "extension"}
        if on_gpu:
            jobs |= {pool.submit(build_variant, context, name, flags): name for name, flags in VARIANTS.items()}
            jobs[pool.submit(build_driver, context)] = "driver"
        failed = list(failures(jobs, sheet))
    environment = subprocess.run(
        [sys.executable, "-m", "blur_optim.env"], capture_output=True, text=True,
        env=os.environ | {"BLUR_OPTIM_LIBRARY": str(context.library)}, cwd=context.work, check=True,
    ).stdout  # fmt: skip
    print(environment)
    wanted = ("extension", "extension holds", "backend", "chosen")
    found = [re.split(r"\s{2,}", line, maxsplit=1) for line in environment.splitlines() if line.startswith(wanted)]
    sheet.table("`python -m blur_optim.env`", [{"what": row[0], "found": row[-1]} for row in found])
    if on_gpu:
        sheet.table("Registers of a thread, for the most used types", list(registers(context)))
    if failed:
        raise SystemExit(f"error: not built: {', '.join(failed)}")


def failures(jobs: dict[Future[Any], str], sheet: Sheet) -> Iterator[str]:
    for job in as_completed(jobs):
        if error := job.exception():
            print(f"{jobs[job]}: {error}")
            sheet.note(f"{jobs[job]} was not built: {str(error).splitlines()[0][:200]}")
            yield jobs[job]


def build_extension(context: Context) -> None:
    library, temporary = context.work / "lib", context.work / "objects"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", library, "--build-temp", temporary]
    _run(command, cwd=ROOT)


def build_variant(context: Context, name: str, flags: Sequence[str]) -> None:
    """The launchers alone, without torch: the tuning sweep calls them by their C names."""
    objects, runtime = setup()["compile_cuda"](str(context.work / "objects" / name), VISIBLE, *flags)
    context.variants.mkdir(exist_ok=True)
    _run(["g++", "-shared", *objects, f"-L{runtime}", *RUNTIME, "-o", context.variants / f"{name}.so"])


def build_driver(context: Context) -> None:
    folder = context.work / "objects/driver"
    objects, runtime = setup()["compile_cuda"](str(folder), "-lineinfo")
    nvcc = nvidia_program("nvcc")
    _run([nvcc, "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", "-x", "cu", "-c", DRIVER, "-o", folder / "driver.o"])
    _run(["g++", folder / "driver.o", *objects, f"-L{runtime}", *RUNTIME, "-o", context.driver])


@functools.cache
def setup() -> dict[str, Any]:
    """The names in setup.py, so that the flags of the kernels stand in one place."""
    with patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def registers(context: Context) -> Iterator[dict[str, Any]]:
    """What the compiler says of the kernels of the types that most people train with."""
    program, demangle = nvidia_program("cuobjdump"), shutil.which("c++filt")
    if program is None or demangle is None:
        return
    found = re.findall(r"Function (\S+):\s+REG:(\d+)", _run([program, "-res-usage", context.library]))
    names = _run([demangle, *(symbol for symbol, _ in found)]).replace("(anonymous namespace)::", "").splitlines()
    for name, (_, count) in zip(names, found, strict=True):
        kernel, types = re.search(r"(\w+_kernel)(<[^>]*>)?\(", name).groups()
        if not re.search(r"half|double", types or ""):
            yield {"kernel": f"{kernel}{types or ''}", "registers": int(count)}


def _run(command: Sequence[Any], cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd)
    print(done.stdout + done.stderr, end="")
    if done.returncode:
        lines = (done.stderr or done.stdout).splitlines()
        reason = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
        raise RuntimeError(f"{command[0]} exits with {done.returncode}: {reason}")
    return done.stdout
