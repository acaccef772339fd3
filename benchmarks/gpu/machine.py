"""What the report says of the machine: device, driver, versions, commit."""

import importlib.metadata
import platform
import shutil
import subprocess
import time
from pathlib import Path

import torch

from .context import ROOT

PACKAGES = ("triton", "transformers", "numpy")


def describe(device: str) -> dict[str, str]:
    """Return names and values, in the order of the report."""
    found = {"device": platform.processor() or platform.machine()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["device"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
            f"{properties.major}.{properties.minor}, {properties.multi_processor_count} multiprocessors, "
            f"{properties.L2_cache_size / 2**20:.0f} MiB of L2"
        )
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda}"
    found |= {name: _version(name) for name in PACKAGES}
    found["nvcc"] = _output(nvidia_program("nvcc") or "nvcc", "--version").rpartition("release ")[2].partition(",")[0]
    found["python"] = f"{platform.python_version()}, {torch.get_num_threads()} threads, {platform.platform()}"
    found["commit"] = commit()
    found["time"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return found


def commit() -> str:
    """The checkout's commit, and whether it was changed since; "unknown" outside of a repository."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return head + (", with changes" if changed and head != "unknown" else "")


def nvidia_program(name: str) -> str | None:
    """A program of the CUDA toolkit, on the PATH or in the toolkit's folders."""
    places = [Path("/usr/local/cuda/bin"), Path("/usr/local/cuda/compute-sanitizer")]
    return shutil.which(name) or next((str(place / name) for place in places if (place / name).is_file()), None)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
