"""What the compiler makes of the Triton kernels for sm_80 and sm_90: read from the machine code, never run here.

The launches are recorded from calls of the backend on small tensors, and compiled with the arguments that they have.
"""

import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from blur_optim.kernels import triton as backend
from blur_optim.kernels.triton import launch

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces Triton's compiler by its interpreter", allow_module_level=True)

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
for tool in ("ptxas", "cuobjdump", "nvdisasm"):
    if not (TOOLS / tool).exists():
        pytest.skip(f"the installed triton has no {tool}", allow_module_level=True)

F32, F64, BF16, F16, INT8 = torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8
THREADS = 256
COEFFICIENTS, ONE = torch.ones(1, 2, dtype=F64), torch.ones((), dtype=F64)


def gradients(dtype, stash, offset=0):
    """The forget and the retain gradient; ``stash`` where the former is compressed."""
    return [[torch.zeros(8 + offset, dtype=each)[offset:]] for each in (stash or dtype, dtype)]


SCALES = [torch.ones(1)]


def dots(dtype, stash=None, offset=0):
    backend.multi_tensor_dots(*gradients(dtype, stash, offset), [0], 1, SCALES)


def blend(dtype, stash=None):
    backend.multi_tensor_blend_(*reversed(gradients(dtype, stash)), COEFFICIENTS, [0], SCALES)


def adam(dtype, grad_dtype, stash=None, amsgrad=False, decoupled=True, offset=0):
    state = [[torch.zeros(8 + offset, dtype=dtype)[offset:]] for _ in range(4)]
    grads = gradients(grad_dtype, stash, offset)
    numbers = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "maximize": False}
    backend.fused_adamw_(
        *state, *grads, [0], COEFFICIENTS, torch.ones(1), ONE, **numbers,
        amsgrad=amsgrad, decoupled=decoupled, found_inf=torch.zeros(()), scales=SCALES,
    )  # fmt: skip


def sgd(dtype, grad_dtype, stash=None):
    state = [[torch.zeros(8, dtype=dtype)] for _ in range(2)]
    grads = gradients(grad_dtype, stash)
    numbers = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": True, "maximize": False}
    backend.fused_sgd_(
        *state, *grads, [0], COEFFICIENTS, ONE, **numbers,
        first_step=False, found_inf=torch.zeros(()), scales=SCALES,
    )  # fmt: skip


METRIC = torch.tensor([[0.9, 0.1, 1.5, 0.01, 1e-8]], dtype=F64)


def metric_dots(dtype, grad_dtype, stash=None):
    v = [torch.ones(8, dtype=dtype)]
    backend.multi_tensor_metric_dots(*gradients(grad_dtype, stash), v, [], [0], 1, METRIC, SCALES)


def metric_blend(dtype, stash=None):
    lists = *reversed(gradients(dtype, stash)), [torch.ones(8, dtype=dtype)]
    backend.multi_tensor_metric_blend_(*lists, COEFFICIENTS, [0], METRIC, torch.zeros(()), SCALES)


def metric_adam(dtype, stash=None):
    state = [[torch.zeros(8, dtype=dtype)] for _ in range(3)]
    numbers = {"beta1": 0.9, "weight_decay": 0.1, "amsgrad": False, "maximize": False, "decoupled": True}
    backend.metric_adamw_(
        *state, [], *gradients(dtype, stash), [0], COEFFICIENTS, torch.ones(1), ONE, METRIC, **numbers,
        found_inf=torch.zeros(()), scales=SCALES,
    )  # fmt: skip


def metric_sgd(dtype, stash=None):
    state = [[torch.zeros(8, dtype=dtype)] for _ in range(3)]
    numbers = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": True, "maximize": False}
    backend.metric_sgd_(
        *state, *gradients(dtype, stash), [0], COEFFICIENTS, ONE, METRIC, **numbers,
        first_step=False, found_inf=torch.zeros(()), scales=SCALES,
    )  # fmt: skip


def compress(dtype, stash):
    values, grads = gradients(dtype, stash)
    backend.multi_tensor_compress_(values, SCALES if stash is INT8 else [], grads)


class Case(NamedTuple):
    """An operation, and for an element of its main loop: bytes loaded and stored by instructions of each width."""

    kernel: str
    operation: Any
    loads: dict[int, float]
    stores: dict[int, float]


# Widths in bytes. Beside float32 state, 4 bfloat16 values are loaded at a time: 8 bytes.
CASES = {
    "dots float32": Case("dots_kernel", lambda: dots(F32), {16: 8}, {}),
    "dots bfloat16": Case("dots_kernel", lambda: dots(BF16), {16: 4}, {}),
    "dots float16": Case("dots_kernel", lambda: dots(F16), {16: 4}, {}),
    "dots float64": Case("dots_kernel", lambda: dots(F64), {16: 16}, {}),
    "blend float32": Case("blend_kernel", lambda: blend(F32), {16: 8}, {16: 4}),
    "blend bfloat16": Case("blend_kernel", lambda: blend(BF16), {16: 4}, {16: 2}),
    "adamw float32": Case("adam_kernel", lambda: adam(F32, F32), {16: 20}, {16: 12}),
    "adamw float32 bfloat16": Case("adam_kernel", lambda: adam(F32, BF16), {16: 12, 8: 4}, {16: 12}),
    "adamw bfloat16": Case("adam_kernel", lambda: adam(BF16, BF16), {16: 10}, {16: 6}),
    "adam amsgrad float32": Case(
        "adam_kernel", lambda: adam(F32, F32, amsgrad=True, decoupled=False), {16: 24}, {16: 16}
    ),
    "adamw float64": Case("adam_kernel", lambda: adam(F64, F64), {16: 40}, {16: 24}),
    "sgd float32": Case("sgd_kernel", lambda: sgd(F32, F32), {16: 16}, {16: 8}),
    "sgd float32 bfloat16": Case("sgd_kernel", lambda: sgd(F32, BF16), {16: 8, 8: 4}, {16: 8}),
    # Compressed forget gradients. Beside an int8 pack a thread loads its scale, from a cache: 4 bytes for 2, 4 or 8
    # elements.
    "dots float32, forget bfloat16": Case("dots_kernel", lambda: dots(F32, BF16), {16: 4, 8: 2}, {}),
    "dots float32, forget int8": Case("dots_kernel", lambda: dots(F32, INT8), {16: 4, 4: 1 + 1}, {}),
    "dots bfloat16, forget int8": Case("dots_kernel", lambda: dots(BF16, INT8), {16: 2, 8: 1, 4: 0.5}, {}),
    "dots float64, forget int8": Case("dots_kernel", lambda: dots(F64, INT8), {16: 8, 2: 1, 4: 2}, {}),
    "blend float32, forget bfloat16": Case("blend_kernel", lambda: blend(F32, BF16), {16: 4, 8: 2}, {16: 4}),
    "blend float32, forget int8": Case("blend_kernel", lambda: blend(F32, INT8), {16: 4, 4: 1 + 1}, {16: 4}),
    "adamw float32, forget bfloat16": Case("adam_kernel", lambda: adam(F32, F32, BF16), {16: 16, 8: 2}, {16: 12}),
    "adamw float32, forget int8": Case("adam_kernel", lambda: adam(F32, F32, INT8), {16: 16, 4: 1 + 1}, {16: 12}),
    "adamw float32 bfloat16, forget int8": Case(
        "adam_kernel", lambda: adam(F32, BF16, INT8), {16: 12, 8: 2, 4: 1 + 1}, {16: 12}
    ),
    "sgd float32, forget int8": Case("sgd_kernel", lambda: sgd(F32, F32, INT8), {16: 12, 4: 1 + 1}, {16: 8}),
    "dots misaligned float32, forget int8": Case("dots_kernel", lambda: dots(F32, INT8, 1), {4: 4 + 4, 1: 1}, {}),
    "compress float32 to bfloat16": Case("compress_kernel", lambda: compress(F32, BF16), {16: 4}, {8: 2}),
    # In the metric.
    "metric dots float32": Case("metric_dots_kernel", lambda: metric_dots(F32, F32), {16: 12}, {}),
    "metric dots float32 bfloat16": Case("metric_dots_kernel", lambda: metric_dots(F32, BF16), {16: 4, 8: 4}, {}),
    "metric dots float32, forget int8": Case(
        "metric_dots_kernel", lambda: metric_dots(F32, F32, INT8), {16: 8, 4: 1 + 1}, {}
    ),
    "metric blend float32": Case("metric_blend_kernel", lambda: metric_blend(F32), {16: 12}, {16: 8}),
    "metric adamw float32": Case("adam_kernel", lambda: metric_adam(F32), {16: 20}, {16: 12}),
    "metric adamw float32, forget int8": Case(
        "adam_kernel", lambda: metric_adam(F32, INT8), {16: 16, 4: 1 + 1}, {16: 12}
    ),
    "metric sgd float32": Case("sgd_kernel", lambda: metric_sgd(F32), {16: 20}, {16: 12}),
    # Addresses that are not multiples of 16 must not be accessed as if they were.
    "dots misaligned bfloat16": Case("dots_kernel", lambda: dots(BF16, offset=1), {2: 4}, {}),
    "adamw misaligned float32": Case("adam_kernel", lambda: adam(F32, F32, offset=1), {4: 20}, {4: 12}),
}
# They have no main loop over gradients, or one in which threads share what they find.
SMALL = {
    "compress float32 to int8": Case("compress_kernel", lambda: compress(F32, INT8), {}, {}),
    "sum_rows": Case("sum_rows_kernel", lambda: dots(F32), {}, {}),
    "adam_step_sizes": Case("adam_step_sizes_kernel", lambda: adam(F32, F32), {}, {}),
}


class Code:
    """The machine code of a kernel, and what ``cuobjdump`` says about its resources."""

    def __init__(self, case, arch, folder):
        self.block_size, cubin = compile_launch(case, arch)
        path = folder / "kernel.cubin"
        path.write_bytes(cubin)
        self.usage = run_tool("cuobjdump", "-res-usage", path)
        self.lines = run_tool("nvdisasm", "-c", path).splitlines()

    @property
    def opcodes(self):
        return Counter(opcode for line in self.lines if (opcode := opcode_of(line)))

    @property
    def main_loop(self):
        """Opcodes of the loop that loads most: from the target of a backward branch to the branch."""
        labels = {match[1]: i for i, line in enumerate(self.lines) if (match := re.match(r"(\.L_\w+):", line))}
        branches = [
            (i, match[1]) for i, line in enumerate(self.lines) if (match := re.search(r"BRA.*\((\.L_\w+)\)", line))
        ]
        loops = [self.lines[labels[label] : i] for i, label in branches if labels[label] < i]
        counts = [Counter(opcode for line in loop if (opcode := opcode_of(line))) for loop in loops]
        return max(counts, key=lambda count: sum(bytes_by_width(count, "LDG").values()))


def compile_launch(case, arch):
    """The block size and the cubin of the launch of ``case.kernel``."""
    launches = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            launch, "run", lambda kernel, grid, *args, **constants: launches.append((kernel, args, constants))
        )
        case.operation()
    kernel, args, constants = next(each for each in launches if each[0].__name__ == case.kernel)
    tensors = dict(zip(kernel.arg_names, args, strict=False))
    # An argument that is None, where there is no metric, is compiled away.
    absent = {name: None for name, t in tensors.items() if t is None}
    signature = {name: triton.runtime.jit.mangle_type(t) for name, t in tensors.items() if name not in absent}
    aligned = (i for i, t in enumerate(tensors.values()) if t is not None and t.data_ptr() % 16 == 0)
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    constants |= absent
    source = triton.compiler.ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, attrs)
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options=launch.device_code().OPTIONS)
    return constants.get("BLOCK_SIZE"), compiled.asm["cubin"]


def run_tool(name, *arguments):
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def opcode_of(line):
    match = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)", line)
    return match and match[1]


def bytes_by_width(opcodes, name):
    """Bytes that a thread moves, by the width of the instruction."""
    result = Counter()
    for opcode, count in opcodes.items():
        parts = opcode.split(".")
        if parts[0] == name:
            width = next(
                (int(part.lstrip("US")) // 8 for part in parts if re.fullmatch(r"[US]?(8|16|64|128)", part)), 4
            )
            result[width] += width * count
    return result


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """``code(name, arch)``, compiled once, not into the user's cache."""
    folder, cache = tmp_path_factory.mktemp("triton"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))

        def get(name, arch):
            if (name, arch) not in cache:
                cache[name, arch] = Code({**CASES, **SMALL}[name], arch, folder)
            return cache[name, arch]

        yield get


# Everything for one architecture, and what differs most for the other.
OLDER = ("dots float32", "dots bfloat16", "dots float32, forget int8", "blend float32", "adamw float32 bfloat16")
OLDER += ("adamw float64", "sgd float32, forget int8", "metric dots float32", "metric adamw float32, forget int8")


def architectures(*names):
    cases = [(name, 90) for name in names] + [(name, 80) for name in names if name in OLDER]
    return pytest.mark.parametrize(("name", "arch"), cases)


@architectures(*CASES, *SMALL)
def test_nothing_spills_and_nothing_depends_on_the_order_of_threads(code, name, arch):
    kernel = code(name, arch)
    assert re.search(r"STACK:0 .*LOCAL:0 ", kernel.usage), kernel.usage
    forbidden = ("LDL", "STL", "RED", "ATOM", "ATOMG", "ATOMS")
    assert not [opcode for opcode in kernel.opcodes if opcode.split(".")[0] in forbidden]


@architectures(*CASES)
def test_the_main_loop_moves_the_bytes_of_the_operation_in_wide_accesses(code, name, arch):
    kernel, case = code(name, arch), CASES[name]
    loads, stores = (bytes_by_width(kernel.main_loop, opcode) for opcode in ("LDG", "STG"))
    elements = kernel.block_size // THREADS
    # The compiler may unroll: all counts are the same multiple.
    rounds = sum(loads.values()) // (elements * sum(case.loads.values()))
    assert rounds >= 1
    assert loads == {width: size * elements * rounds for width, size in case.loads.items()}
    assert stores == {width: size * elements * rounds for width, size in case.stores.items()}
    # Elements stay with their threads.
    assert not [
        opcode for opcode in kernel.main_loop if opcode.split(".")[0] in ("LDS", "STS", "SHFL", "BAR", "LDGSTS")
    ]


@architectures(
    "dots float32",
    "dots bfloat16",
    "blend float32",
    "blend float32, forget int8",
    "sgd float32",
    "sgd float32 bfloat16",
)
def test_products_and_sums_are_rounded_apart(code, name, arch):
    """As in the other backends. (Division and square root, in Adam, are made of fused operations.)"""
    opcodes = Counter()
    for opcode, count in code(name, arch).opcodes.items():
        opcodes[opcode.split(".")[0]] += count
    assert opcodes["FFMA"] == 0
    assert opcodes["FMUL"] >= 16
    assert opcodes["FADD"] >= 8


@architectures("blend bfloat16", "adamw bfloat16")
def test_results_are_rounded_to_nearest(code, name, arch):
    """Which Triton's interpreter does not do for bfloat16, so that no other test sees it."""
    conversions = [opcode for opcode in code(name, arch).opcodes if opcode.startswith("F2F")]
    assert conversions
    assert not [opcode for opcode in conversions if re.search(r"\.R[ZMP]", opcode)]


class NoGpu:
    """What Triton asks its driver for before it compiles. No GPU has this number: kernels are cached by device."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 99

    def get_current_stream(self, device):
        return 0


def test_triton_takes_the_arguments_of_every_launch(code, monkeypatch):
    """By its own way of reading them, up to the launch itself."""
    compiled = []

    def warmup(kernel, grid, *args, **constants):
        compiled.append(kernel.warmup(*args, grid=grid, **constants, **launch.device_code().OPTIONS))

    monkeypatch.setattr(launch, "run", warmup)
    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu())
    dots(F32)
    blend(BF16, INT8)
    adam(F32, F16)
    sgd(F16, F16)
    metric_dots(BF16, BF16)
    metric_blend(F16)
    metric_adam(F32)
    compress(F16, INT8)
    metadata = [kernel.metadata for kernel in compiled]
    assert [m.name for m in metadata] == [
        *("dots_kernel", "sum_rows_kernel", "blend_kernel", "adam_step_sizes_kernel", "adam_kernel", "sgd_kernel"),
        *("metric_dots_kernel", "sum_rows_kernel", "metric_blend_kernel", "adam_step_sizes_kernel", "adam_kernel"),
        "compress_kernel",
    ]
    assert {(m.num_warps, m.enable_fp_fusion) for m in metadata} == {(THREADS // 32, False)}
