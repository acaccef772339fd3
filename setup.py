"""Build the native extension where it can be built; everything else about the package is in pyproject.toml.

BLUR_OPTIM_BUILD=0 never compiles, BLUR_OPTIM_BUILD=1 fails where it cannot; by default a missing compiler or torch is
one line of output and the package works on its pure PyTorch backend. BLUR_OPTIM_CUDA says the same of its CUDA half,
which by default is compiled where nvcc is found and torch has CUDA. BLUR_OPTIM_CUDA_ARCHITECTURES names the devices
that it is compiled for, such as 90 or "80 90": one takes a third of the time of all.
"""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext

OLDEST_SETUPTOOLS = 77  # pyproject.toml says so too, but without isolation pip does not look there.
if int(__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"blur_optim: setuptools must be {OLDEST_SETUPTOOLS} or newer, got {__version__}. `pip install -U setuptools`, "
        "or build with isolation, which is pip's default."
    )

# The name of this file is relative to the working directory where older backends run it.
ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("BLUR_OPTIM_BUILD", "auto")
CUDA = os.environ.get("BLUR_OPTIM_CUDA", "auto")
# Compiled for those of these that nvcc knows; newer devices take the last as PTX.
CUDA_ARCHITECTURES = "80 90 100"
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


def nvcc(*arguments: str) -> str:
    places = [os.environ.get("CUDA_HOME", "") + "/bin", os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    program = shutil.which("nvcc", path=os.pathsep.join(places))
    if program is None:
        raise RuntimeError("nvcc was not found")
    run = subprocess.run([program, *arguments], capture_output=True, text=True)
    output = run.stdout + run.stderr
    if run.returncode:
        raise RuntimeError(next((line for line in output.splitlines() if "error" in line), f"{program} failed"))
    return output


def cuda_targets() -> list[str]:
    """What nvcc is to compile for: the machine code of each architecture, and the last one's PTX."""
    asked = os.environ.get("BLUR_OPTIM_CUDA_ARCHITECTURES", "")
    names = re.sub(r"[ ,;]+", " ", (asked or CUDA_ARCHITECTURES).replace(".", "")).split()
    known = nvcc("--list-gpu-arch").split()
    unknown = [name for name in names if f"compute_{name}" not in known]
    if (asked and unknown) or len(unknown) == len(names):
        raise RuntimeError(
            "BLUR_OPTIM_CUDA_ARCHITECTURES must be compute capabilities that this nvcc knows, such as 90 or '80 90', "
            f"got {asked or CUDA_ARCHITECTURES!r}. It knows {', '.join(known)}"
        )
    targets = [f"arch=compute_{name},code=sm_{name}" for name in names if name not in unknown]
    return [*targets, targets[-1].replace("sm_", "compute_")]


def compile_cuda(folder: str, *more: str) -> tuple[list[str], str]:
    """The objects of csrc/cuda, made with ``more`` flags, and where the CUDA runtime is that they are linked with."""
    if CUDA == "0" or (CUDA != "1" and not (TORCH / "lib/libtorch_cuda.so").exists()):
        raise RuntimeError("BLUR_OPTIM_CUDA=0" if CUDA == "0" else "this torch has no CUDA")
    codes = [f"-gencode={target}" for target in cuda_targets()]
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    # As for the C++ below no contraction. One thread per core.
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
    os.makedirs(folder, exist_ok=True)
    nvcc(*flags, *more, *codes, "-c", *map(str, sources), f"-odir={folder}")
    libraries = re.findall(r'"-L([^"]+)"', nvcc("--dryrun", "-x", "cu", os.devnull))
    for library in libraries:
        if os.path.exists(f"{library}/libcudart_static.a"):
            return [f"{folder}/{source.stem}.o" for source in sources], library
    raise RuntimeError("libcudart_static.a was not found")


class Build(build_ext):
    """Compile with the C++ flags that the kernels' reproducibility needs; a failure leaves the package without them."""

    def build_extensions(self) -> None:
        without_cuda = copy.deepcopy(self.extensions)
        try:
            self.add_cuda()
            try:
                super().build_extensions()
            except Exception as error:
                if CUDA == "1" or self.extensions[0].sources == without_cuda[0].sources:
                    raise
                print(f"blur_optim: the extension does not build with CUDA kernels: {error}.", file=sys.stderr)
                self.extensions = without_cuda
                super().build_extensions()
        except Exception as error:
            if "1" in (MODE, CUDA):
                raise
            print(f"blur_optim: the native extension was not built: {error}", file=sys.stderr)
            self.extensions = []

    def add_cuda(self) -> None:
        """Link the CUDA half into the extension; a failure leaves the CPU half."""
        try:
            objects, runtime = compile_cuda(self.build_temp)
        except Exception as error:
            if CUDA == "1":
                raise
            print(f"blur_optim: the extension has no CUDA kernels: {error}.", file=sys.stderr)
            return
        for extension in self.extensions:
            extension.sources.append("csrc/cuda/binding.cpp")
            extension.extra_objects += objects
            extension.library_dirs.append(runtime)
            extension.libraries += ["cudart_static", "rt", "pthread", "dl"]


TORCH = find_torch()


def files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def extension() -> Extension:
    return Extension(
        "blur_optim._C",
        sources=["csrc/registration.cpp", *files("csrc/cpu/*.cpp")],
        depends=[*files("csrc/**/*.h"), *files("csrc/cuda/*")],
        include_dirs=[str(TORCH / "include")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        # No contraction into fused multiply-adds: AVX2 and AVX-512 have to give the same bits. Without -fno-math-errno
        # sqrt is a call, and the loop around it scalar.
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-ffp-contract=off",
            "-w",
            "-g0",
        ],
        library_dirs=[str(TORCH / "lib")],
        # In this order, and libtorch without being needed: through it the symbols of libtorch_cuda are found.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch"],
        py_limited_api=True,
    )


if reason := why_not():
    if "1" in (MODE, CUDA):
        name = "BLUR_OPTIM_BUILD" if MODE == "1" else "BLUR_OPTIM_CUDA"
        raise SystemExit(f"blur_optim: {name}=1, but the native extension cannot be built: {reason}.")
    print(f"blur_optim: the native extension is not built: {reason}.", file=sys.stderr)
    extensions = []
else:
    extensions = [extension()]

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
