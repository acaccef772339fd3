"""Build the native extension where it can be built; everything else about the package is in pyproject.toml.

BLUR_OPTIM_BUILD=0 never compiles, BLUR_OPTIM_BUILD=1 fails where it cannot; by default a missing compiler or torch is
one line of output and the package works on its pure PyTorch backend.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MODE = os.environ.get("BLUR_OPTIM_BUILD", "auto")
# The oldest torch that the binary loads in, 2.10, as torch's stable ABI writes versions.
TORCH_TARGET_VERSION = "0x020a000000000000"


def find_torch() -> Path | None:
    """The torch that the package will run with: pip's isolated build hides it, a plain interpreter shows it."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    code = "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT.anchor
    )
    return Path(found.stdout.strip()) if found.returncode == 0 else None


def why_not() -> str:
    if MODE == "0":
        return "BLUR_OPTIM_BUILD=0"
    if sys.platform != "linux":
        return f"it is built on Linux only, this is {sys.platform}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not (shutil.which(compiler) or shutil.which("g++")):
        return "no C++ compiler was found"
    if TORCH is None or not (TORCH / "include/torch/csrc/stable/library.h").exists():
        return "torch >= 2.10 was not found in this environment; install it first"
    return ""


class Build(build_ext):
    """Compile with the C++ flags that the kernels' reproducibility needs; a failure leaves the package without them."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            if MODE == "1":
                raise
            print(f"blur_optim: the native extension was not built: {error}", file=sys.stderr)
            self.extensions = []


TORCH = find_torch()


def extension() -> Extension:
    lib = TORCH / "lib"
    return Extension(
        "blur_optim._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
        include_dirs=[str(TORCH / "include")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        # No contraction into fused multiply-adds: AVX2 and AVX-512 have to give the same bits. Without -fno-math-errno
        # sqrt is a call, and the loop around it scalar.
        extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-w"],
        library_dirs=[str(lib)],
        libraries=["torch_cpu", "torch"],
        extra_link_args=["-Wl,--no-as-needed"],
        py_limited_api=True,
    )


if reason := why_not():
    if MODE == "1":
        raise SystemExit(f"blur_optim: BLUR_OPTIM_BUILD=1, but the native extension cannot be built: {reason}.")
    print(f"blur_optim: the native extension is not built: {reason}.", file=sys.stderr)
    extensions = []
else:
    extensions = [extension()]

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
