"""``python -m blur_optim.env``: what is installed, built, loaded and chosen, and why. A bug report starts with it."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from blur_optim.kernels import BACKEND_VARIABLE, BACKENDS, native, select_backend

PACKAGES = ("blur_optim", "torch", "triton", "transformers", "accelerate", "peft", "numpy")


def facts() -> Iterator[tuple[str, str]]:
    """Yield pairs of a name and what was found."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        yield package, _version(package)
    yield "processor", f"{_processor()}, {torch.get_num_threads()} threads"
    yield "cuda", _cuda()
    yield "compilers", ", ".join(name for name in ("c++", "g++", "nvcc") if shutil.which(name)) or "none found"
    yield "extension", f"{native.LIBRARY.name}: {native.why_not(torch.device('cpu')) or 'loaded'}"
    yield "extension holds", _kernels()
    for device in _devices():
        for name in BACKENDS:
            yield f"backend {name} on {device.type}", _availability(name, device)
        yield f"chosen on {device.type}", _chosen(device)
    variables = {name: value for name, value in os.environ.items() if name.startswith("BLUR_OPTIM_")}
    yield "environment", ", ".join(f"{name}={value}" for name, value in sorted(variables.items())) or "no BLUR_OPTIM_*"


def main() -> None:
    for name, value in facts():
        print(f"{name:28} {value}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    sets = [name for name in ("avx2", "avx512f") if name in flags]
    return f"{names[0] if names else platform.machine()} ({', '.join(sets) or 'no AVX2'})"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"CUDA {torch.version.cuda}, no device"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"CUDA {torch.version.cuda}, {', '.join(names)}"


def _kernels() -> str:
    if native.why_not(torch.device("cpu")):
        return "nothing"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return ", ".join(key for key in ("CPU", "CUDA") if has("blur_optim::multi_tensor_dots", key)) + " kernels"


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def _availability(name: str, device: torch.device) -> str:
    try:
        select_backend(name, device)
    except ImportError as error:
        return str(error)
    return "available"


def _chosen(device: torch.device) -> str:
    try:
        chosen = select_backend(None, device)
    except (ImportError, ValueError) as error:
        return f"error: {error}"
    name = next(name for name, backend in BACKENDS.items() if backend is chosen)
    return f"{name} ({BACKEND_VARIABLE} is set)" if os.environ.get(BACKEND_VARIABLE) else name


if __name__ == "__main__":
    main()
