"""The compiled CPU kernels: what only they can get wrong. Values are checked beside the other backends'."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from blur_optim.kernels import foreach, native
from blur_optim.kernels.blocks import empty_compressed, quantize
from blur_optim.kernels.layout import in_order_of, is_dense

WHY_NOT = native.why_not(torch.device("cpu"))
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"native backend: {WHY_NOT}")

FLAGS = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
CAPABILITIES = {"generic": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"}}

# Prints the bits of everything the kernels compute, over dtypes, compressed gradients and sizes around the block sizes:
# a line for each number of threads.
PRINT_BITS = """
import hashlib, sys, torch
from blur_optim.kernels import native
from blur_optim.kernels.blocks import empty_compressed, quantize
native.why_not(torch.device("cpu"))
ops = torch.ops.blur_optim
def add(*tensors):
    for t in tensors:
        digest.update(t.contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b"")
def run(dtype, stash):
    sizes = [0, 1, 63, 64, 1023, 1024, 1500, 32768, 70001]
    make = lambda seed: [torch.randn(n, generator=torch.Generator().manual_seed(seed + n)).to(dtype) for n in sizes]
    f, r, rows, scales = make(1), make(2), [0] * len(sizes), []
    f[4] = torch.empty(0, dtype=dtype)
    if stash is torch.int8:
        f, scales = zip(*map(quantize, f))
        f, scales = list(f), list(scales)
    elif stash:
        f = [t.to(stash) for t in f]
    else:
        r[6] = torch.empty(0, dtype=dtype)
    weights = torch.tensor([[0.3, -1.7]], dtype=torch.float64)
    if dtype.itemsize > (stash or torch.int8).itemsize:
        compressed = empty_compressed(r, stash or torch.int8)
        ops.multi_tensor_compress_(*compressed, r)
        add(*compressed[0], *compressed[1])
    add(ops.multi_tensor_dots(f, r, rows, 1, scales))
    p, m, v = make(3), make(4), [x.square() for x in make(5)]
    steps, lr = torch.full((len(sizes),), 3.0), torch.tensor(0.01, dtype=torch.float64)
    adamw = 0.9, 0.99, 0.1, 1e-8, False, False, True, None
    ops.fused_adamw_(p, m, v, [], f, r, rows, weights, steps, lr, *adamw, scales)
    add(*p, *m, *v)
    ops.fused_sgd_(p, m, f, r, rows, weights, lr, 0.9, 0.1, 0.1, True, False, False, None, scales)
    add(*p, *m)
    metric = torch.tensor([[0.9, 0.1, 1.5, 0.01, 1e-8]] * len(sizes)).double()
    largest = [x.square() for x in make(6)]
    for seen in ([], largest):
        add(ops.multi_tensor_metric_dots(f, r, v, seen, rows, 1, metric, scales))
        options = 0.9, 0.1, bool(seen), False, not seen, None, scales
        ops.metric_adamw_(p, m, v, seen, f, r, rows, weights, steps, lr, metric, *options)
        add(*p, *m, *v, *seen)
    ops.metric_sgd_(p, m, v, f, r, rows, weights, lr, metric, 0.9, 0.1, 0.1, True, False, False, None, scales)
    add(*p, *m, *v)
    ops.multi_tensor_metric_blend_(r, f, v, weights, rows, metric, None, scales)
    add(*r, *f, *v)
    ops.multi_tensor_blend_(r, f, weights, rows, scales)
    add(*r, *f)
for threads in sys.argv[1:]:
    torch.set_num_threads(int(threads))
    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        run(dtype, None)
        run(dtype, torch.int8)
        if dtype.itemsize > 2:
            run(dtype, torch.bfloat16)
    print(digest.hexdigest())
"""


def bits(capability: str, *threads: int) -> list[str]:
    environment = {**os.environ, "BLUR_OPTIM_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", PRINT_BITS, *map(str, threads)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()


@pytest.fixture(scope="module")
def generic_bits():
    return bits("generic", 1)


@pytest.mark.parametrize("capability", [name for name in CAPABILITIES if name != "generic"])
def test_every_instruction_set_and_thread_count_gives_the_same_bits(capability, generic_bits):
    missing = CAPABILITIES[capability] - FLAGS
    if missing:
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    assert bits(capability, 1, 2, 5) == generic_bits * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_are_torchs_for_every_16_bit_pattern(dtype):
    """b * r with b = 1 and no forget gradient: load, multiply by one, store."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(dtype)
    result = values.clone()
    one = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    native.multi_tensor_blend_([result], [torch.empty(0, dtype=dtype)], one, [0])
    finite = ~values.isnan()
    assert torch.equal(result.view(torch.int16)[finite], patterns[finite])
    assert result[~finite].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs(dtype):
    """Products with 1/3 fall between the 16-bit values, below the smallest normal, and beyond the largest."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    for weight in (1 / 3, 3.0, 2.0**-9):
        result = values.clone()
        coefficients = torch.tensor([[0.0, weight]], dtype=torch.float64)
        native.multi_tensor_blend_([result], [torch.empty(0, dtype=dtype)], coefficients, [0])
        assert torch.equal(result, (values.float() * torch.tensor(weight, dtype=torch.float32)).to(dtype))


def arguments(dtype=torch.float32, n=2, quantized=False):
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.rand(3 + i, generator=generator).to(dtype) for i in range(n)] for _ in range(6)]
    params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, forget, retain = lists
    forget, scales = map(list, zip(*map(quantize, forget), strict=True)) if quantized else (forget, [])
    coefficients = torch.tensor([[0.5, 2.0]], dtype=torch.float64)
    steps, lr = torch.full((n,), 2.0), torch.tensor(0.1, dtype=torch.float64)
    rows = [0] * n
    moments, gradients, flag = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs), (forget, retain, rows), torch.zeros(())
    adamw = (0.9, 0.99, 0.1, 1e-8, True, False, True, flag)
    sgd = (0.9, 0.0, 0.1, False, False, False, flag)
    metric = torch.tensor([[0.9, 0.1, 1.5, 0.01, 1e-8]] * n, dtype=torch.float64)
    in_metric = (0.9, 0.1, True, False, True, flag)
    values, blocks = empty_compressed(retain, torch.int8 if quantized or dtype.itemsize == 2 else torch.bfloat16)
    return {
        "multi_tensor_dots": (*gradients, 1, scales),
        "multi_tensor_blend_": (retain, forget, coefficients, rows, scales),
        "fused_adamw_": (params, *moments, *gradients, coefficients, steps, lr, *adamw, scales),
        "fused_sgd_": (params, exp_avgs, *gradients, coefficients, lr, *sgd, scales),
        "multi_tensor_metric_dots": (forget, retain, exp_avg_sqs, max_exp_avg_sqs, rows, 1, metric, scales),
        "multi_tensor_metric_blend_": (retain, forget, exp_avg_sqs, coefficients, rows, metric, flag, scales),
        "metric_adamw_": (params, *moments, *gradients, coefficients, steps, lr, metric, *in_metric, scales),
        "metric_sgd_": (params, exp_avgs, exp_avg_sqs, *gradients, coefficients, lr, metric, *sgd, scales),
        "multi_tensor_compress_": (values, blocks, retain),
    }


# A schema knows no dtype: one with each list of scales.
@pytest.mark.parametrize(
    ("dtype", "quantized"), [(torch.float32, False), (torch.bfloat16, True)], ids=["plain", "int8"]
)
@pytest.mark.parametrize("name", arguments())
def test_opcheck(name, dtype, quantized):
    torch.library.opcheck(getattr(torch.ops.blur_optim, name), arguments(dtype, quantized=quantized)[name])


@pytest.mark.parametrize("name", arguments())
def test_fake_tensors(name):
    with FakeTensorMode():
        result = getattr(torch.ops.blur_optim, name)(*arguments()[name])
    if name.endswith("dots"):
        assert result.shape == (1, 9 if "metric" in name else 3)
        assert result.dtype == torch.float64


def test_compiles_without_a_graph_break():
    ops = torch.ops.blur_optim

    def project(forget, retain):
        dots = ops.multi_tensor_dots(forget, retain, [0, 0], 1, [])
        xi = 1.0 - dots[:, 0] / dots[:, 1]
        ops.multi_tensor_blend_(retain, forget, torch.stack([xi, torch.ones_like(xi)], dim=1), [0, 0], [])
        return retain[0] * 2

    retain, forget, *_ = arguments()[BLEND]
    expected = project([f.clone() for f in forget], [r.clone() for r in retain])
    compiled = torch.compile(project, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(forget, retain), expected)


DOTS, BLEND, ADAMW, SGD, METRIC_DOTS, METRIC_BLEND, METRIC_ADAMW, METRIC_SGD, _COMPRESS = arguments()
BAD = [
    ("lengths", DOTS, 1, lambda r: r[:1], r"`forget`, `retain` and `rows` must have one length, got 2, 1 and 2"),
    ("sizes", DOTS, 1, lambda r: [r[0], r[1][:2]], r"`forget\[1\]` must have as many elements as `retain\[1\]`"),
    (
        "half of bfloat16",
        DOTS,
        0,
        lambda f: [f[0].half(), f[1]],
        r"`forget\[0\]` must have the dtype of `retain\[0\]`, or",
    ),
    (
        "no scales",
        DOTS,
        0,
        lambda f: [f[0].char(), f[1]],
        r"`scales\[0\]` must be .* of 1 elements, one for each block",
    ),
    (
        "alone",
        BLEND,
        0,
        lambda r: [r[0][:0], r[1]],
        r"`forget\[0\]` must not be compressed where `retain\[0\]` is absent",
    ),
    ("dtypes", DOTS, 1, lambda r: [r[0].double(), r[1]], r"`forget\[0\]` must have the dtype of `retain\[0\]`"),
    ("integers", DOTS, 0, lambda f: [f[0].int(), f[1]], r"`forget\[0\]` must be float32, bfloat16"),
    ("row", DOTS, 2, lambda rows: [0, 7], r"`rows\[1\]` must be in \[0, 1\), got 7"),
    ("coefficients", BLEND, 2, lambda c: c.float(), r"`coefficients` must be a contiguous float64 tensor"),
    ("moments", ADAMW, 1, lambda m: [m[0], m[1][:1]], r"`exp_avgs\[1\]` must have 4 elements like its gradient"),
    ("moment dtype", ADAMW, 2, lambda v: [v[0].double(), v[1]], r"`exp_avg_sqs\[0\]` must have the dtype of"),
    ("params", ADAMW, 0, lambda p: [p[0].double(), p[1]], r"`params\[0\]` must have its gradients' dtype"),
    ("steps", ADAMW, 8, lambda steps: steps[:1], r"`steps` must have 2 float32 elements"),
    ("lr", SGD, 6, lambda lr: lr.float(), r"`lr` must have 1 float64 elements"),
    ("flag", SGD, -2, lambda flag: flag.double(), r"`found_inf` must have 1 float32 elements"),
    ("metric", METRIC_DOTS, 6, lambda metric: metric[:1], r"`metric` must be a contiguous float64 .* shape \[2, 5\]"),
    ("metric dtype", METRIC_ADAMW, 10, lambda metric: metric.float(), r"`metric` must be a contiguous float64 tensor"),
    ("moments of dots", METRIC_DOTS, 2, lambda v: v[:1], r"`exp_avg_sqs` must have 2 tensors like `retain`, got 1"),
    ("moment of the blend", METRIC_BLEND, 2, lambda v: [v[0].half(), v[1]], r"`exp_avg_sqs\[0\]` must have its grad"),
    ("largest", METRIC_DOTS, 3, lambda v: [v[0].half(), v[1]], r"`max_exp_avg_sqs\[0\]` must have the dtype of `exp_"),
    ("moments of SGD", METRIC_SGD, 2, lambda v: [v[0][:1], v[1]], r"`exp_avg_sqs\[0\]` must have 3 elements"),
    ("buffers", SGD, 1, lambda b: b[:1], r"`momentum_buffers` must have 2 tensors like `retain`, got 1"),
]


@pytest.mark.parametrize(("name", "position", "change", "message"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_wrong_arguments_are_named(name, position, change, message):
    args = list(arguments(quantized="compressed" in message)[name])
    args[position] = change(args[position])
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.blur_optim, name)(*args)


def test_autograd_notices_what_is_modified():
    p, m, v, f, r = ([torch.ones(3)] for _ in range(5))
    coefficients, lr = torch.tensor([[0.5, 2.0]]).double(), torch.tensor(0.1).double()
    options = {"weight_decay": 0.0, "maximize": False, "found_inf": None}
    adam = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "amsgrad": False, "decoupled": True}
    sgd = {"momentum": 0.9, "dampening": 0.0, "nesterov": False, "first_step": False}
    native.fused_adamw_(p, m, v, [], f, r, [0], coefficients, torch.ones(1), lr, **adam, **options)
    assert [t[0]._version for t in (p, m, v, f, r)] == [1, 1, 1, 0, 0]
    native.fused_sgd_(p, m, f, r, [0], coefficients, lr, **sgd, **options)
    assert [t[0]._version for t in (p, m, f, r)] == [2, 2, 0, 0]
    native.multi_tensor_blend_(r, f, coefficients, [0])
    assert [t[0]._version for t in (f, r)] == [0, 1]


CSRC = Path(__file__).parents[2] / "csrc"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile with sanitizers")
def test_sanitizers(tmp_path):
    """Address and undefined behaviour, on buffers of exactly the size that the kernels may touch."""
    best = next((name for name in ("avx512", "avx2") if CAPABILITIES[name] <= FLAGS), None)
    tables = ["generic", best] if best else ["generic"]
    sources = [Path(__file__).with_name("cpu_driver.cpp"), *(CSRC / f"cpu/kernels_{name}.cpp" for name in tables)]
    program = tmp_path / "driver"
    # Without optimisation: it takes longer to compile than to run.
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    flags += [f"-DBEST=k{best.capitalize()}"] if best else []
    command = ["g++", *flags, *map(str, sources), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr and "asan" in built.stderr:
        pytest.skip("g++ has no sanitizer runtime here")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr


def test_memory_order_of_other_dense_layouts_is_used_without_a_copy(monkeypatch):
    f, r = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    lasts = [t.to(memory_format=torch.channels_last) for t in (f, r)]
    monkeypatch.setattr(foreach, "multi_tensor_blend_", None)
    coefficients = torch.tensor([[0.5, 2.0]], dtype=torch.float64)
    native.multi_tensor_blend_([lasts[1]], [lasts[0]], coefficients, [0])
    torch.testing.assert_close(lasts[1], 0.5 * f + 2 * r)


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.empty(3, 4), True),
        (torch.empty(3, 4).t(), True),
        (torch.empty(2, 1, 4).transpose(0, 2), True),
        (torch.empty(()), True),
        (torch.empty(0), True),
        (torch.empty(3, 4)[:, ::2], False),
        (torch.empty(3, 4)[:, 1:], False),
        (torch.empty(3).expand(4, 3), False),
    ],
)
def test_is_dense(tensor, dense):
    assert is_dense(tensor) is dense


def test_a_copy_in_another_order_stays_on_its_device():
    t, other = torch.empty(3, 4, dtype=torch.bfloat16, device="meta"), torch.empty(4, 3, device="meta").t()
    copy = in_order_of(t, other)
    assert (copy.device, copy.dtype, copy.stride()) == (t.device, t.dtype, other.stride())


def test_every_call_of_an_operator_has_all_its_arguments(monkeypatch):
    """The probe of a GPU runs on none here; without a driver it would only say that it does not run."""
    device = torch.device("cpu")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *key: True)
    assert native._why_not_cuda.__wrapped__(device) == ""


def test_more_elements_than_32_bits_count():
    """Untouched pages of a calloc cost no memory: only the ends of 2 x 4 GiB of bfloat16 are ever written."""
    n = 2**31 + 70_000
    forget, retain = (torch.from_numpy(np.zeros(n, np.uint16)).view(torch.bfloat16) for _ in range(2))
    for t, values in ((forget, (2.0, 3.0)), (retain, (5.0, -1.0))):
        t[7], t[-1] = values
    dots = native.multi_tensor_dots([forget], [retain], [0], 1)
    assert dots.tolist() == [[2 * 5 - 3, 4 + 9, 25 + 1]]
    native.multi_tensor_blend_([retain[-9:]], [forget[-9:]], torch.tensor([[1.0, 2.0]]).double(), [0])
    assert (float(retain[-1]), float(retain[-2])) == (3.0 - 2.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy_on_16_million_heavy_tailed_nearly_orthogonal_elements(dtype):
    # Layers of scales 1e-4 to 1e-1, log-normal within.
    n, layers = 2**24, 16
    scales = torch.logspace(-4, -1, layers)
    generator = torch.Generator().manual_seed(0)

    def gradient():
        t = torch.empty(layers, n // layers, dtype=dtype)
        for row, scale in zip(t, scales, strict=True):
            row.copy_(torch.randn(n // layers, generator=generator) * scale)
            row.mul_(torch.empty(n // layers).log_normal_(0.0, 1.5, generator=generator))
        return t.view(-1)

    forget, retain = gradient(), gradient()
    expected = torch.zeros(3, dtype=torch.float64)
    for f, r in zip(forget.split(2**22), retain.split(2**22), strict=True):
        f, r = f.double(), r.double()
        expected += torch.stack([r @ f, f @ f, r @ r])
    scale = (expected[1] * expected[2]).sqrt()
    assert expected[0].abs() < 1e-2 * scale
    # What the limits do not let through.
    simple = torch.dot(forget, forget) if dtype is torch.float32 else (forget * forget).sum()
    assert (simple.double() - expected[1]).abs() > 2e-8 * expected[1]
    error = (native.multi_tensor_dots([forget], [retain], [0], 1)[0] - expected).abs()
    assert error[0] < 2e-10 * scale
    assert error[1] < 2e-8 * expected[1]
    assert error[2] < 2e-8 * expected[2]
