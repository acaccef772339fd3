"""What nvcc makes of the CUDA source, as setup.py calls it: no spills, wide accesses, no byte read or written twice.

Static evidence only: nothing here runs on a GPU, unless there is one.
"""

import os
import re
import runpy
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cuda_toolchain import CSRC, HERE, built, disassembler, linked, program, run

from blur_optim.kernels import native

#: The suite compiles for the one that matters most; before a release it is "80 90 100": most of the time is nvcc's.
ARCHITECTURES = os.environ.get("BLUR_OPTIM_TEST_CUDA_ARCHITECTURES", "90").split()
SIZES = {"float": 4, "double": 8, "__nv_bfloat16": 2, "__half": 2, "signed char": 1}
# Tensors of the parameters' dtype that are read and written; each of these kernels also reads the two gradients.
STATE = {
    "adam_kernel": (3, 3),
    "adam_kernel amsgrad": (4, 4),
    "sgd_kernel": (1, 1),
    "sgd_kernel momentum": (2, 2),
    "metric_dots_kernel": (1, 0),
    "metric_dots_kernel amsgrad": (2, 0),
    "metric_blend_kernel": (1, 1),
}
# Bytes per element that docs/kernels.md names, reads and writes, without the scales of int8: one for each block.
BYTES = {
    "dots_kernel<float, float>": 2 * 4,
    "dots_kernel<__nv_bfloat16, __nv_bfloat16>": 2 * 2,
    "dots_kernel<float, __nv_bfloat16>": 4 + 2,
    "dots_kernel<float, signed char>": 4 + 1,
    "dots_kernel<__nv_bfloat16, signed char>": 2 + 1,
    "blend_kernel<float, float>": 3 * 4,
    "blend_kernel<__nv_bfloat16, __nv_bfloat16>": 3 * 2,
    "blend_kernel<float, __nv_bfloat16>": 2 * 4 + 2,
    "blend_kernel<float, signed char>": 2 * 4 + 1,
    "blend_kernel<__nv_bfloat16, signed char>": 2 * 2 + 1,
    "compress_kernel<float, __nv_bfloat16>": 4 + 2,
    "metric_dots_kernel<float, float, float, false>": 3 * 4,
    "metric_dots_kernel<float, __nv_bfloat16, __nv_bfloat16, false>": 4 + 2 * 2,
    "metric_dots_kernel<float, float, signed char, false>": 2 * 4 + 1,
    "metric_blend_kernel<float, float, float>": 5 * 4,
    "adam_kernel<float, float, float, false, true>": 8 * 4,
    "adam_kernel<float, float, signed char, false, true>": 7 * 4 + 1,
    "sgd_kernel<float, float, float, true, true>": 8 * 4,
    "adam_kernel<float, float, float, false, false>": 8 * 4,
    "adam_kernel<float, __nv_bfloat16, __nv_bfloat16, false, false>": 6 * 4 + 2 * 2,
    "adam_kernel<float, float, __nv_bfloat16, false, false>": 7 * 4 + 2,
    "adam_kernel<float, float, signed char, false, false>": 7 * 4 + 1,
    "adam_kernel<float, __nv_bfloat16, signed char, false, false>": 6 * 4 + 2 + 1,
    "sgd_kernel<float, float, float, true, false>": 6 * 4,
    "sgd_kernel<float, __nv_bfloat16, __nv_bfloat16, true, false>": 4 * 4 + 2 * 2,
    "sgd_kernel<float, float, __nv_bfloat16, true, false>": 5 * 4 + 2,
    "sgd_kernel<float, float, signed char, true, false>": 5 * 4 + 1,
    "sgd_kernel<float, __nv_bfloat16, signed char, true, false>": 4 * 4 + 2 + 1,
}


class Kernel(NamedTuple):
    """The instructions of a kernel; a label is an instruction that ends in a colon."""

    name: str
    instructions: list[str]

    def loops(self) -> list[Counter[str]]:
        """The accesses to global and local memory in each loop: what lies between a label and a jump back to it."""
        labels = {line[:-1]: i for i, line in enumerate(self.instructions) if line.endswith(":")}
        loops = []
        for i, line in enumerate(self.instructions):
            jump = re.search(r"\bBRA\b.*`\((\S+)\)", line)
            if jump and labels.get(jump[1], i) < i:
                accesses = (access_of(inner) for inner in self.instructions[labels[jump[1]] : i])
                loops.append(Counter(access for access in accesses if access))
        return [loop for loop in loops if loop]

    def expected(self) -> tuple[Counter[str], Counter[str], int]:
        """The accesses that handle one pack; of them the one to its scale; and how many elements it has."""
        stem, arguments = re.fullmatch(r"(\w+)<(.*)>", self.name).groups()
        dtypes = [argument for argument in arguments.split(", ") if argument in SIZES]
        pack = 16 // max(SIZES[dtype] for dtype in dtypes)
        scale = Counter({"read 4": 1} if dtypes[-1] == "signed char" else {})
        if stem == "compress_kernel":
            read, write = (SIZES[dtype] * pack for dtype in dtypes)
            return Counter({f"read {read}": 1}) + Counter({f"write {write}": 1}), Counter(), pack
        flags = [argument == "true" for argument in arguments.split(", ") if argument not in SIZES]
        option = {"adam_kernel": " amsgrad", "sgd_kernel": " momentum", "metric_dots_kernel": " amsgrad"}.get(stem, "")
        reads, writes = STATE.get(stem + option * bool(flags and flags[0]), (0, 0))
        if stem == "sgd_kernel" and flags[1]:  # In the metric it has second moments.
            reads, writes = reads + 1, writes + 1
        accesses = Counter(f"read {SIZES[dtype] * pack}" for dtype in dtypes[-2:]) + scale
        accesses += Counter({f"read {SIZES[dtypes[0]] * pack}": reads, f"write {SIZES[dtypes[0]] * pack}": writes})
        if stem.endswith("blend_kernel"):
            accesses[f"write {SIZES[dtypes[-2]] * pack}"] += 1
        return accesses, scale, pack


def access_of(instruction: str) -> str | None:
    """``read 16`` for a load of 16 bytes; ``spill 0`` for a register that did not fit."""
    if re.search(r"\b(LDL|STL)\b", instruction):
        return "spill 0"
    found = re.search(r"\b(LDG?|STG?)\.E(\.\S*)?\s", instruction)
    if not found:
        return None
    width = re.search(r"\.(U8|U16|64|128)\b", found[2] or "")
    size = {"U8": 1, "U16": 2, "64": 8, "128": 16}[width[1]] if width else 4
    return f"{'read' if found[1].startswith('LD') else 'write'} {size}"


@pytest.fixture(scope="session")
def setup() -> dict[str, Any]:
    """The names in setup.py."""
    setuptools = pytest.importorskip("setuptools")
    program("nvcc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: None)
        patch.setenv("BLUR_OPTIM_CUDA", "1")
        patch.delenv("BLUR_OPTIM_BUILD", raising=False)
        return runpy.run_path(str(CSRC.parent / "setup.py"))


@pytest.fixture(scope="session")
def objects(setup: dict[str, Any], build_folder: Path) -> Path:
    """The folder of the objects, and in it a file with the folder of the CUDA runtime."""

    def build(path: Path) -> None:
        path.with_name("nvcc").mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BLUR_OPTIM_CUDA_ARCHITECTURES", " ".join(ARCHITECTURES))
            path.write_text(setup["compile_cuda"](str(path.with_name("nvcc")))[1])

    return built(build_folder / "runtime", build).with_name("nvcc")


@pytest.fixture(scope="session", params=ARCHITECTURES, ids=lambda architecture: f"sm_{architecture}")
def cubins(request: pytest.FixtureRequest, objects: Path) -> list[Path]:
    architecture = f"sm_{request.param}"
    cuobjdump = disassembler("cuobjdump")

    def build(path: Path) -> None:
        path.mkdir()
        for source in objects.glob("*.o"):
            run(cuobjdump, "-xelf", architecture, source, cwd=path)

    return sorted(built(objects.with_name(architecture), build).glob("*.cubin"))


@pytest.fixture(scope="session")
def kernels(cubins: list[Path]) -> dict[str, Kernel]:
    """By their short names: ``dots_kernel<float>``."""
    nvdisasm, demangler = disassembler("nvdisasm"), program("c++filt")
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in "\n".join(run(nvdisasm, "-c", cubin) for cubin in cubins).splitlines():
        if section := re.match(r"\.text\.(\S+):", line):
            lines = found.setdefault(section[1], [])
        elif label := re.match(r"(\.L\S*:)", line):
            lines.append(label[1])
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append(instruction[1])
    names = [short_name(name) for name in run(demangler, *found).splitlines()]
    return {name: Kernel(name, lines) for name, lines in zip(names, found.values(), strict=True)}


def short_name(demangled: str) -> str:
    return re.search(r"(\w+_kernel(<[^>]*>)?)\(", demangled.replace("(anonymous namespace)::", ""))[1]


def test_every_kernel_is_there(kernels):
    vectorised = {name.partition("<")[0] for name in kernels if "<" in name}
    metric = {"metric_dots_kernel", "metric_blend_kernel"}
    assert vectorised == {"dots_kernel", "blend_kernel", "adam_kernel", "sgd_kernel", "compress_kernel", *metric}
    assert kernels.keys() >= {*BYTES, "rows_kernel", "corrections_kernel"}


def test_no_register_is_spilled(cubins):
    usage = "".join(run(disassembler("cuobjdump"), "-res-usage", cubin) for cubin in cubins)
    resources = re.findall(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage)
    assert len(resources) >= 78
    assert all((int(stack), int(local)) == (0, 0) for _, stack, local in resources)
    # So that a multiprocessor has two blocks of 256 threads, one of which loads while the other computes.
    assert max(int(registers) for registers, _, _ in resources) <= 128


def test_main_loops_access_each_element_once_and_widely(kernels):
    wrong = {}
    for kernel in kernels.values():
        # To int8 a warp takes a block of 256 together: neighbours by neighbouring threads, an element each at a time.
        if "<" not in kernel.name or re.fullmatch(r"compress_kernel<\w+, signed char>", kernel.name):
            continue
        pack, scale, elements = kernel.expected()
        wide = [loop for loop in kernel.loops() if max(sizes(loop)) == 16]
        # In the metric's blend ptxas jumps from a rare case (a division of denormal numbers) back into the middle of a
        # loop: what lies between is a part of the loop, and no loop.
        in_parts = kernel.name.startswith("metric_blend_kernel<") and pack in wide
        for loop in wide:
            repeats = loop.total() // pack.total()
            whole = loop == Counter({access: count * repeats for access, count in pack.items()})
            if not (whole or (in_parts and loop < pack)):
                wrong[kernel.name] = wide
        assert wide, f"{kernel.name} has no loop of 16-byte accesses"
        if kernel.name in BYTES:
            assert sum(sizes(pack - scale)) == BYTES[kernel.name] * elements, kernel.name
    assert not wrong


def test_the_loops_of_the_dots_are_unrolled(kernels):
    """Four packs of each gradient are there to be in flight at a time."""
    for name, kernel in kernels.items():
        if name.startswith("dots_kernel<"):
            assert max(loop["read 16"] for loop in kernel.loops()) == 4 * kernel.expected()[0]["read 16"], name


def sizes(loop: Counter[str]) -> list[int]:
    return [int(access.split()[1]) for access in loop.elements()]


def test_a_launch_without_a_device_is_an_error_not_a_crash(objects, build_folder):
    runtime = (build_folder / "runtime").read_text()
    libraries = [f"-L{runtime}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    flags = ["-std=c++17", f"-I{CSRC}"]
    launcher = linked(build_folder / "launch", *flags, HERE / "launch.cpp", *objects.glob("*.o"), *libraries)
    done = subprocess.run([launcher], capture_output=True, text=True, check=True)
    error, message, values = re.fullmatch(r"(\d+) \((.*)\): (.*)\n", done.stdout).groups()
    if error == "0":  # There is a device.
        assert values == "6 4 9"
    else:
        assert message in (
            "CUDA driver version is insufficient for CUDA runtime version",
            "no CUDA-capable device is detected",
        )


def test_native_says_why_it_does_not_serve_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert native.why_not(torch.device("cuda")) == "this torch has no CUDA."
    if native.why_not(torch.device("cpu")):
        pytest.skip("needs the native extension")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda operator, key: False)
    native._why_not_cuda.cache_clear()
    assert "built without CUDA" in native.why_not(torch.device("cuda"))
    native._why_not_cuda.cache_clear()
