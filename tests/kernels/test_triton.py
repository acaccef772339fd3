"""The Triton backend in Triton's interpreter, on the CPU. What the compiled kernels look like: test_triton_compiled.py.

The interpreter replaces the compiler for a whole process, so the tests run in one of their own. It shows that the
kernels compute what they should; it has one thread, no GPU's memory model, and nothing here was ever a result of a GPU.
It takes about a microsecond per element and several milliseconds per launch, hence the small sizes.
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import Problem, assert_params_close, assert_same_bits, snapshot, step_by_closures
from torch import optim

from blur_optim import BLUR
from blur_optim.kernels import BACKEND_VARIABLE, BACKENDS, foreach, native, reference, select_backend, triton
from blur_optim.kernels.blocks import BLOCK_SIZE, empty_compressed, quantize

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Of the interpreter of Triton 3.6, from NumPy before 2.4; a later one makes it an error.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def version_of(package):
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


def test_in_the_interpreter():
    for module in ("triton", "numpy"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed, which Triton's interpreter needs")
    if INTERPRETED:
        pytest.skip("this process is the interpreter's already")
    if version_of("triton") < (3, 7) and version_of("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 does not work with NumPy 2.4 and later: `numpy==2.3.5`")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 100  # The classes below were collected.


# -- The choice of a backend -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("native_why_not", "triton_why_not", "expected"),
    [("", "", "native"), ("not built", "", "triton"), ("not built", "not installed", "foreach")],
)
def test_the_choice_for_a_gpu(native_why_not, triton_why_not, expected, monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(native, "why_not", lambda device: native_why_not)
    monkeypatch.setattr(triton, "why_not", lambda device: triton_why_not)
    assert select_backend(None, CUDA) is BACKENDS[expected]


def test_the_cpu_never_gets_the_interpreter_by_itself(monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(native, "why_not", lambda device: "not built")
    assert select_backend(None, CPU) is foreach


def test_why_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton._why_not_compile.cache_clear()
    with pytest.raises(
        ImportError, match=r"`backend` is 'triton', which is not available: .*for cpu.*TRITON_INTERPRET"
    ):
        select_backend("triton", CPU)
    assert "no kernels for mps" in triton.why_not(torch.device("mps"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in triton.why_not(CUDA)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setenv("CC", "gcc")
    assert "capability 8.0" in triton.why_not(CUDA)
    triton._why_not_compile.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert triton.why_not(CUDA) == ""
    triton._why_not_compile.cache_clear()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert "C compiler" in triton.why_not(CUDA)
    triton._why_not_compile.cache_clear()


# -- In the interpreter ------------------------------------------------------------------------------------------------

CHUNK, BLOCK = 32768, 2048  # Of triton_kernels.py, which cannot be imported where Triton is not.
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Retain gradients with the forget gradients that may be stashed beside them.
COMPRESSED = [
    (dtype, stash) for dtype in DTYPES for stash in (torch.bfloat16, torch.int8) if stash.itemsize < dtype.itemsize
]

# Error of a dot over the product of the norms: as in test_backends.py.
DOT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-7, torch.bfloat16: 1e-7, torch.float16: 1e-7}
# Error of a result, relative and absolute, where inputs and results are of order 1. float32 rounds a few times, the
# 16-bit types once, at the end; the interpreter truncates to bfloat16, where the compiled kernel rounds to nearest.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}

SHAPES = {
    "0-d": [()],
    "0-elements": [(0,)],
    "1-element": [(1,)],
    "small-and-empty": [(7,), (4, 0), (3, 5), (), (1, 1, 2)],
    "around-a-block": [(BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (BLOCK // 2 + 1,)],
    "around-a-chunk": [(CHUNK + BLOCK + 3,), (CHUNK,), (5,)],
    "60-tensors": [(9,)] * 60,
}
AROUND_SCALES = [(BLOCK_SIZE - 1,), (BLOCK_SIZE,), (BLOCK_SIZE + 1,), (2 * BLOCK_SIZE, 3), (CHUNK + BLOCK_SIZE + 1,)]
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "every-second-element": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


def make(shapes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def make_stashed(shapes, stash, seed):
    """Compressed forget gradients and their scales: in each block of another size."""
    grads = make(shapes, torch.float32, seed)
    if stash is not torch.int8:
        return [t.to(stash) for t in grads], []
    grads = [t * (1 + torch.arange(t.numel()).view(t.shape) // BLOCK_SIZE % 5) for t in grads]
    return map(list, zip(*map(quantize, grads), strict=True))


def clones(tensors):
    return [t.clone(memory_format=torch.preserve_format) for t in tensors]


def table(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def assert_dots_close(actual, expected, dtype, rounding=0.0):
    assert actual.dtype == torch.float64
    assert actual.shape == expected.shape
    forget, retain = expected[:, 1].sqrt(), expected[:, 2].sqrt()
    scale = torch.stack([forget * retain, forget**2, retain**2], dim=1)
    assert ((actual - expected).abs() <= (DOT_TOLERANCE[dtype] + rounding) * scale).all()


def assert_close(actual, expected, dtype):
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.dtype == dtype
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance, msg=lambda text, i=i: f"{i}: {text}")


class TestGradients:
    """Dots and blend."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
    def test_dots_and_blend_match_the_equations(self, dtype, shapes):
        forget, retain = make(shapes, dtype, 0), make(shapes, dtype, 1)
        rows = [0] * len(shapes)
        expected = reference.multi_tensor_dots(forget, retain, rows, 1)
        assert_dots_close(triton.multi_tensor_dots(forget, retain, rows, 1), expected, dtype)
        update = [-1.3 * f.double() + 0.7 * r.double() for f, r in zip(forget, retain, strict=True)]
        kept = clones(forget)
        triton.multi_tensor_blend_(retain, forget, table([-1.3, 0.7]), rows)
        assert_close(retain, update, dtype)
        assert all(torch.equal(f, k) for f, k in zip(forget, kept, strict=True))

    @pytest.mark.parametrize(("dtype", "stash"), COMPRESSED, ids=str)
    @pytest.mark.parametrize("shapes", [*SHAPES.values(), AROUND_SCALES], ids=[*SHAPES, "around-scales"])
    def test_compressed_forget_gradients_are_read_as_they_are(self, dtype, stash, shapes):
        (forget, scales), retain = make_stashed(shapes, stash, 0), make(shapes, dtype, 1)
        if len(shapes) > 1:  # One without a forget gradient among them.
            forget[1] = forget[1].new_empty(0)
        rows, exact = [0] * len(shapes), reference._in_float64(forget, scales)
        expected = reference.multi_tensor_dots(exact, retain, rows, 1)
        # The product of an integer and its scale is rounded to float32.
        rounding = 2**-23 if stash is torch.int8 and dtype is not torch.float64 else 0.0
        assert_dots_close(triton.multi_tensor_dots(forget, retain, rows, 1, scales), expected, dtype, rounding)
        update = [0.7 * r.double() + (-1.3 * f if f.numel() else 0) for f, r in zip(exact, retain, strict=True)]
        kept = clones(forget)
        triton.multi_tensor_blend_(retain, forget, table([-1.3, 0.7]), rows, scales)
        assert_close(retain, update, dtype)
        assert all(torch.equal(f, k) for f, k in zip(forget, kept, strict=True))

    # The interpreter's NumPy says so, a GPU does not: 0 / 0 and casts of what is not finite are dealt with.
    @pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
    @pytest.mark.parametrize(("dtype", "stash"), COMPRESSED, ids=str)
    def test_compress_has_the_bits_of_pytorch(self, dtype, stash):
        grads = make([(CHUNK + 300,), (700,), (300,), (1,), (0,), (2,), (3, 5)], dtype, 2)
        grads[1][300], grads[2][7], grads[3][0] = float("nan"), -float("inf"), 0.0
        grads[5][:] = torch.tensor([190.0, -190.0]).double().mul(2.0**-149).to(dtype)
        grads[6] = LAYOUTS["transposed"](grads[6])
        expected, actual = empty_compressed(grads, stash), empty_compressed(grads, stash)
        foreach.multi_tensor_compress_(*expected, grads)
        triton.multi_tensor_compress_(*actual, grads)
        # The interpreter casts to bfloat16 by cutting off: within one unit in the last place. A GPU rounds.
        rtol = 2**-7 if stash is torch.bfloat16 else 0
        for mine, theirs in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=1e-38 if rtol else 0, equal_nan=True)

    @pytest.mark.parametrize("stash", [torch.bfloat16, torch.int8], ids=str)
    @pytest.mark.parametrize("forget_layout", ["contiguous", "transposed", "misaligned"])
    @pytest.mark.parametrize("retain_layout", LAYOUTS)
    def test_layouts_of_compressed_gradients_do_not_matter(self, stash, forget_layout, retain_layout):
        grad = LAYOUTS[forget_layout](make([(31, 17)], torch.float64, 0)[0])
        forget, scales = map(list, zip(quantize(grad), strict=True)) if stash is torch.int8 else ([grad.to(stash)], [])
        if forget_layout == "misaligned":
            forget = [LAYOUTS["misaligned"](f) for f in forget]
        retain = [LAYOUTS[retain_layout](make([(31, 17)], torch.float64, 1)[0])]
        exact = reference._in_float64(forget, scales)
        expected = reference.multi_tensor_dots(exact, retain, [0], 1)
        update = 0.3 * exact[0] - 2 * retain[0]
        assert_dots_close(triton.multi_tensor_dots(forget, retain, [0], 1, scales), expected, torch.float64)
        triton.multi_tensor_blend_(retain, forget, table([0.3, -2]), [0], scales)
        assert_close(retain, [update], torch.float64)

    @pytest.mark.parametrize("forget_layout", LAYOUTS)
    @pytest.mark.parametrize("retain_layout", LAYOUTS)
    def test_layouts_do_not_matter(self, forget_layout, retain_layout):
        forget, retain = make([(31, 17)], torch.float64, 0), make([(31, 17)], torch.float64, 1)
        expected = reference.multi_tensor_dots(forget, retain, [0], 1)
        update = 0.3 * forget[0] - 2 * retain[0]
        f, r = LAYOUTS[forget_layout](forget[0]), LAYOUTS[retain_layout](retain[0])
        assert_dots_close(triton.multi_tensor_dots([f], [r], [0], 1), expected, torch.float64)
        address = r.data_ptr()
        triton.multi_tensor_blend_([r], [f], table([0.3, -2]), [0])
        assert_close([r], [update], torch.float64)
        assert r.data_ptr() == address

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_an_absent_gradient_counts_as_zeros(self, dtype):
        shapes = [(6, 5), (4,), (CHUNK + 9,), (3,)]
        forget, retain = make(shapes, dtype, 0), make(shapes, dtype, 1)
        forget[1] = retain[2] = retain[3] = torch.empty(0, dtype=dtype)
        full_f, full_r = ([t if t.numel() else torch.zeros(s, dtype=dtype) for t, s in zip(ts, shapes, strict=True)]
                          for ts in (forget, retain))  # fmt: skip
        full_f, full_r = clones(full_f), clones(full_r)
        dots = triton.multi_tensor_dots(forget, retain, [0, 1, 2, 2], 3)
        assert torch.equal(dots, triton.multi_tensor_dots(full_f, full_r, [0, 1, 2, 2], 3))
        results = [retain[0], retain[1], forget[2], forget[3]]
        coefficients = table([0.5, -2], [4, 0.25], [1, 2])  # Powers of two: exact in every dtype.
        triton.multi_tensor_blend_(retain, forget, coefficients, [0, 1, 2, 2])
        reference.multi_tensor_blend_(full_r, full_f, coefficients, [0, 1, 2, 2])
        assert all(torch.equal(x, y) for x, y in zip(results[1:], full_r[1:], strict=True))
        assert_close(results[:1], [full_r[0].double()], dtype)

    def test_rows_are_kept_apart(self):
        shapes, rows = [(5,), (3, 3), (2,), (CHUNK + 70,)], [0, 0, 2, 3]
        forget, retain = make(shapes, torch.float32, 0), make(shapes, torch.float32, 1)
        dots = triton.multi_tensor_dots(forget, retain, rows, 5)
        for row in range(5):
            mine = [i for i, r in enumerate(rows) if r == row]
            f, r = [forget[i] for i in mine], [retain[i] for i in mine]
            assert torch.equal(dots[row], triton.multi_tensor_dots(f, r, [0] * len(mine), 1)[0])
        coefficients = table([1, 0], [9, 9], [0, 1], [2, 0], [9, 9])
        expected = [forget[0], forget[1], retain[2].clone(), 2 * forget[3]]
        triton.multi_tensor_blend_(retain, forget, coefficients, rows)
        assert all(torch.equal(r, e) for r, e in zip(retain, expected, strict=True))

    def test_dtypes_and_alignments_in_one_row_are_not_mixed_up(self):
        dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.float64, torch.float32]
        forget = [make([(50,)], dtype, i)[0] for i, dtype in enumerate(dtypes)]
        retain = [make([(50,)], dtype, i + 9)[0] for i, dtype in enumerate(dtypes)]
        forget[3] = LAYOUTS["misaligned"](forget[3])
        forget[4], scale = quantize(forget[4])
        forget[5] = forget[5].bfloat16()
        scales = [*retain[:4], scale, retain[5]]  # Anything where nothing is int8.
        actual = triton.multi_tensor_dots(forget, retain, [0] * 6, 1, scales)
        assert_dots_close(actual, reference.multi_tensor_dots(forget, retain, [0] * 6, 1, scales), torch.float32)
        again = [triton.multi_tensor_dots(clones(forget[:3]), clones(retain[:3]), [0] * 3, 1) for _ in range(3)]
        assert all(torch.equal(dots, again[0]) for dots in again)

    def test_no_tensors(self):
        assert torch.equal(triton.multi_tensor_dots([], [], [], 2), torch.zeros(2, 3, dtype=torch.float64))
        triton.multi_tensor_blend_([], [], torch.ones(2, 2, dtype=torch.float64), [])

    def test_runs_are_short(self, monkeypatch):
        """Half of the roundings in a running sum of squares of bfloat16 values are ties: a long one is biased."""
        x = torch.full((CHUNK,), 1.0).add_(torch.arange(CHUNK) % 128 / 128).bfloat16()
        exact = reference.multi_tensor_dots([x], [x], [0], 1)

        def error():
            return ((triton.multi_tensor_dots([x], [x], [0], 1) - exact).abs() / exact).max()

        assert error() < 1e-7
        monkeypatch.setattr(triton._kernels(), "BLOCK_SIZE", 64)  # Runs of 512 additions.
        assert error() > 2e-7

    def test_nearly_orthogonal_heavy_tailed_gradients(self):
        n = 1 << 17
        generator = torch.Generator().manual_seed(0)
        normal, chi = torch.randn(2, n, generator=generator), torch.randn(2, 3, n, generator=generator)
        scales = torch.logspace(-4, -1, 16).repeat_interleave(n // 16)
        f, r = (normal / chi.square().mean(1).sqrt() * scales).double()
        r = r + (1e-5 * r.norm() / f.norm() - (f @ r) / (f @ f)) * f
        f, r = f.float(), r.float()
        dots, expected = (kernels.multi_tensor_dots([f], [r], [0], 1)[0] for kernels in (triton, reference))
        assert (dots - expected)[0].abs() < 2e-9 * (expected[1] * expected[2]).sqrt()
        assert ((dots - expected)[1:].abs() < 2e-8 * expected[1:]).all()

    def test_offsets_beyond_32_bits(self):
        """The last chunk of a tensor of 2^33 + 5 elements, of which only these 5 exist."""
        kernels, start = triton._kernels(), 1 << 33
        f, r = make([(5,), (5,)], torch.bfloat16, 0)
        expected = 2 * f - r
        first = -(start // CHUNK)
        line = [start + 5, 0, 0, first, first, 0, *(t.data_ptr() - 2 * start for t in (f, r))]
        kind = triton._Kind(torch.bfloat16, torch.bfloat16, torch.bfloat16, True, True, 1)
        constants = {name: v for name, v in triton._constants(kind).items() if name != "PARAM"}
        lines, programs = torch.tensor([line]), torch.zeros(1, dtype=torch.int64)
        partials = torch.zeros(1, 3, dtype=torch.float64)
        triton._run(kernels.dots_kernel, (1,), lines, programs, partials, **constants)
        assert_dots_close(partials, reference.multi_tensor_dots([f], [r], [0], 1), torch.bfloat16)
        triton._run(kernels.blend_kernel, (1,), lines, programs, table([2, -1]), **constants)
        assert_close([r], [expected.double()], torch.bfloat16)

    def test_a_launch_for_all_tensors_of_a_kind(self, launches):
        shapes = [(5,)] * 100
        forget, retain = make(shapes, torch.float32, 0), make(shapes, torch.float32, 1)
        triton.multi_tensor_dots(forget, retain, list(range(100)), 100)
        assert launches == ["dots_kernel", "sum_rows_kernel"]
        retain[3] = torch.empty(0)
        forget[7], retain[7] = forget[7].bfloat16(), retain[7].bfloat16()
        triton.multi_tensor_blend_(retain, forget, torch.ones(1, 2, dtype=torch.float64), [0] * 100)
        assert launches[2:] == ["blend_kernel"] * 3

    def test_the_default_device_does_not_matter(self):
        forget, retain = make([(5,)], torch.float32, 0), make([(5,)], torch.float32, 1)
        expected = triton.multi_tensor_dots(forget, retain, [0], 1)
        with torch.device("meta"):
            assert torch.equal(triton.multi_tensor_dots(forget, retain, [0], 1), expected)

    def test_autograd_learns_of_the_modification(self):
        forget, retain = make([(5,), (3,)], torch.float32, 0), make([(5,), (3,)], torch.float32, 1)
        retain[1] = torch.empty(0)
        triton.multi_tensor_blend_(retain, forget, torch.ones(1, 2, dtype=torch.float64), [0, 0])
        assert [t._version for t in (*forget, *retain)] == [0, 1, 1, 0]


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched."""
    names, run = [], triton._run

    def recorded(kernel, *args, **constants):
        names.append(kernel.__name__)
        run(kernel, *args, **constants)

    monkeypatch.setattr(triton, "_run", recorded)
    return names


# Parameters with their gradients: of their own dtype, or 16-bit beside float32.
DTYPE_PAIRS = [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
# The same with a compressed forget gradient beside each retain gradient that it may stand beside.
STASHES = [(dtype, grad, stash) for dtype, grad in DTYPE_PAIRS for other, stash in COMPRESSED if other == grad]
FUSED_SHAPES = [(5,), (BLOCK + 52,), (0,), (3, 4), (CHUNK + BLOCK + 1,)]
COEFFICIENTS, ROWS = table([-1.3, 0.7], [0.4, 2.0]), [0, 0, 1, 1, 1]
# eps is large enough to be seen, the decay too.
ADAM = {"beta1": 0.8, "beta2": 0.9, "weight_decay": 0.5, "eps": 0.1}
SGD = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.5, "nesterov": False}


class Case:
    """Parameters, both gradients and state of order 1; in float64 with the update of ``a f + b r`` beside them."""

    def __init__(self, dtype=torch.float32, grad_dtype=torch.float32, shapes=FUSED_SHAPES, stash=None):
        self.rows = ROWS[: len(shapes)]
        self.params = make(shapes, dtype, 0)
        self.forget, self.scales = make_stashed(shapes, stash, 1) if stash else (make(shapes, grad_dtype, 1), [])
        self.retain = make(shapes, grad_dtype, 2)
        self.state = {name: make(shapes, dtype, seed) for seed, name in enumerate(("m", "v", "vmax"), start=3)}
        for name in ("v", "vmax"):
            self.state[name] = [t.abs() for t in self.state[name]]
        self.dtype = dtype

    def wide(self):
        """Double copies: the parameters with u as their gradients, and each one's state."""
        params = [p.to(torch.float64, copy=True).requires_grad_() for p in self.params]
        forget = reference._in_float64(self.forget, self.scales)
        for p, f, r, row in zip(params, forget, self.retain, self.rows, strict=True):
            a, b = COEFFICIENTS[row]
            terms = [weight * grad.double() for weight, grad in ((a, f), (b, r)) if grad.numel() or not p.numel()]
            p.grad = sum(terms)
        copies = {name: [t.to(torch.float64, copy=True) for t in tensors] for name, tensors in self.state.items()}
        return params, [{name: tensors[i] for name, tensors in copies.items()} for i in range(len(params))]


def adam(
    case, steps=(1, 2, 7, 50, 3000), *, amsgrad=False, maximize=False, decoupled=True, found_inf=None, lr=0.1, **o
):
    triton.fused_adamw_(
        case.params,
        case.state["m"],
        case.state["v"],
        case.state["vmax"] if amsgrad else [],
        case.forget,
        case.retain,
        case.rows,
        COEFFICIENTS,
        torch.tensor(steps[: len(case.params)], dtype=torch.float32),
        torch.tensor(lr, dtype=torch.float64),
        amsgrad=amsgrad,
        maximize=maximize,
        decoupled=decoupled,
        found_inf=found_inf,
        scales=case.scales,
        **{**ADAM, **o},
    )


def torch_adam(case, steps=(1, 2, 7, 50, 3000), *, amsgrad=False, maximize=False, decoupled=True, lr=0.1, **o):
    """The same by torch's own optimizer, in float64."""
    params, states = case.wide()
    o = {**ADAM, **o}
    betas = (o.pop("beta1"), o.pop("beta2"))
    cls = optim.AdamW if decoupled else optim.Adam
    opt = cls(params, lr=lr, betas=betas, amsgrad=amsgrad, maximize=maximize, foreach=False, **o)
    for p, state, step in zip(params, states, steps, strict=False):
        opt.state[p] = {"step": torch.tensor(step - 1.0), "exp_avg": state["m"], "exp_avg_sq": state["v"]}
        if amsgrad:
            opt.state[p]["max_exp_avg_sq"] = state["vmax"]
    opt.step()
    return [p.detach() for p in params], {name: [s[name] for s in states] for name in ("m", "v", "vmax")}


def sgd(case, *, first_step=False, maximize=False, found_inf=None, lr=0.1, **options):
    options = {**SGD, **options}
    triton.fused_sgd_(
        case.params,
        case.state["m"] if options["momentum"] else [],
        case.forget,
        case.retain,
        case.rows,
        COEFFICIENTS,
        torch.tensor(lr, dtype=torch.float64),
        maximize=maximize,
        first_step=first_step,
        found_inf=found_inf,
        scales=case.scales,
        **options,
    )


def torch_sgd(case, *, first_step=False, lr=0.1, **options):
    params, states = case.wide()
    opt = optim.SGD(params, lr=lr, foreach=False, **{**SGD, **options})
    for p, state in zip(params, states, strict=True):
        if not first_step:
            opt.state[p] = {"momentum_buffer": state["m"]}
    opt.step()
    buffers = [opt.state[p].get("momentum_buffer", state["m"]) for p, state in zip(params, states, strict=True)]
    return [p.detach() for p in params], {"m": buffers}


def assert_case_close(case, expected):
    params, state = expected
    assert_close(case.params, params, case.dtype)
    for name, tensors in state.items():
        assert_close(case.state[name], tensors, case.dtype)


ADAM_CASES = {
    "adamw": {},
    "adam": {"decoupled": False},
    "no-decay": {"weight_decay": 0.0},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "adam-amsgrad-maximize": {"decoupled": False, "amsgrad": True, "maximize": True},
    "no-first-moment": {"beta1": 0.0},
}
SGD_CASES = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "maximize": {"momentum": 0.9, "maximize": True},
    "no-decay": {"weight_decay": 0.0},
    "first-step": {"momentum": 0.9, "dampening": 0.3, "first_step": True},
    "nesterov-first-step": {"momentum": 0.9, "nesterov": True, "first_step": True},
}
SMALL = FUSED_SHAPES[:4]


class TestFused:
    """Adam, AdamW and SGD on the update, against torch's own in float64."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize(
        ("dtype", "grad_dtype", "stash"), [*((*pair, None) for pair in DTYPE_PAIRS), *STASHES], ids=str
    )
    def test_dtypes(self, dtype, grad_dtype, stash):
        for step, torch_step, options in ((adam, torch_adam, {"amsgrad": True}), (sgd, torch_sgd, {"momentum": 0.9})):
            case = Case(dtype, grad_dtype, stash=stash)
            expected = torch_step(case, **options)
            step(case, **options)
            assert_case_close(case, expected)

    @pytest.mark.parametrize("options", ADAM_CASES.values(), ids=ADAM_CASES)
    def test_adam(self, options):
        case = Case(torch.float64, torch.float64, SMALL)
        expected = torch_adam(case, **options)
        adam(case, **options)
        assert_case_close(case, expected)

    @pytest.mark.parametrize("options", SGD_CASES.values(), ids=SGD_CASES)
    def test_sgd(self, options):
        case = Case(torch.float64, torch.float64, SMALL)
        expected = torch_sgd(case, **options)
        if options.get("first_step"):
            for buffer in case.state["m"]:
                buffer.fill_(torch.nan)  # Whatever lies in new memory.
        sgd(case, **options)
        assert_case_close(case, expected)

    @pytest.mark.parametrize("step", [adam, sgd])
    @pytest.mark.parametrize("layout", ["transposed", "misaligned"])
    def test_dense_layouts(self, step, layout):
        case, twin = Case(shapes=[(4, 3), (30, 7)]), Case(shapes=[(4, 3), (30, 7)])
        for tensors in (case.params, case.forget, case.retain, *case.state.values()):
            tensors[:] = [LAYOUTS[layout](t) for t in tensors]
        step(case)
        step(twin)
        assert all(torch.equal(p, q) for p, q in zip(case.params, twin.params, strict=True))

    @pytest.mark.parametrize("step", [adam, sgd])
    def test_absent_gradients(self, step):
        case, twin = Case(shapes=SMALL), Case(shapes=SMALL)
        for side, i in (("forget", 0), ("retain", 1), ("retain", 3)):
            getattr(case, side)[i] = torch.empty(0)
            getattr(twin, side)[i].zero_()
        step(case)
        step(twin)
        # Equal, not the same bits: 0 times a number is added in one of them, which changes the sign of a zero.
        assert_close(case.params, [p.double() for p in twin.params], torch.float32)

    @pytest.mark.parametrize("step", [adam, sgd])
    @pytest.mark.parametrize("found", [0.0, 1.0])
    def test_found_inf(self, step, found):
        case, expected = Case(shapes=SMALL), Case(shapes=SMALL)
        if found:
            case.retain[1][7] = torch.inf
        else:
            step(expected)
        step(case, found_inf=torch.tensor(found))
        for tensors, others in zip(
            (case.params, *case.state.values()), (expected.params, *expected.state.values()), strict=True
        ):
            assert all(torch.equal(t, other) for t, other in zip(tensors, others, strict=True))

    @pytest.mark.parametrize("step", [adam, sgd])
    def test_autograd_learns_of_the_modification(self, step):
        case = Case(shapes=SMALL)
        step(case)
        assert {p._version for p in case.params} == {1}
        assert {g._version for g in (*case.forget, *case.retain)} == {0}

    def test_launches(self, launches):
        case = Case(shapes=[(4,)] * 5)
        adam(case)
        assert launches == ["adam_step_sizes_kernel", "adam_kernel"]
        sgd(case)
        assert launches[2:] == ["sgd_kernel"]

    def test_no_params(self):
        case = Case(shapes=[])
        adam(case)
        sgd(case)


def wrong(stash=None, **changes):
    case = Case(shapes=SMALL, stash=stash)
    for name, change in changes.items():
        setattr(case, name, change(getattr(case, name)))
    return case


ERRORS = {
    "fewer gradients": ({"retain": lambda r: r[:2]}, ValueError, r"`retain` must have 4 entries like `forget`, got 2"),
    "another shape": (
        {"forget": lambda f: [f[0][:3], *f[1:]]},
        ValueError,
        r"`retain\[0\]` must have the number of elements of the other tensors, 3, got 5",
    ),
    "parameter of another shape": (
        {"params": lambda p: [p[0], p[1][1:], *p[2:]]},
        ValueError,
        r"`params\[1\]` must have the number of elements of the other tensors, 2100, got 2099",
    ),
    "gradients of two dtypes": (
        {"retain": lambda r: [*r[:3], r[3].half()]},
        ValueError,
        r"`forget\[3\]` must have the dtype of `retain\[3\]`, torch.float16, or be compressed.* got torch.float32",
    ),
    "a forget gradient in float16": (
        {"forget": lambda f: [f[0].half(), *f[1:]]},
        ValueError,
        r"`forget\[0\]` must have the dtype of `retain\[0\]`, torch.float32, or be compressed.* got torch.float16",
    ),
    "no scales": (
        {"stash": torch.int8, "scales": lambda s: []},
        ValueError,
        r"`scales\[0\]` must be a contiguous float32 tensor of shape \(1,\) .* each block of 256 of `forget\[0\]`",
    ),
    "too few scales": (
        {"stash": torch.int8, "scales": lambda s: [s[0], s[1][:8], *s[2:]]},
        ValueError,
        r"`scales\[1\]` must be a contiguous float32 tensor of shape \(9,\)",
    ),
    "compressed and alone": (
        {"stash": torch.bfloat16, "retain": lambda r: [r[0][:0], *r[1:]]},
        ValueError,
        r"`forget\[0\]` must not be compressed where `retain\[0\]` is absent",
    ),
    "state of another dtype": (
        {"state": lambda s: {**s, "m": [t.double() for t in s["m"]]}},
        ValueError,
        r"`(exp_avgs|momentum_buffers)\[0\]` must have the dtype",
    ),
    "parameters of another device": (
        {"params": lambda p: [t.to("meta") for t in p]},
        ValueError,
        r"`params\[0\]` must have the device",
    ),
    "dtypes that do not fit": (
        {
            "params": lambda p: [t.half() for t in p],
            "state": lambda s: {k: [t.half() for t in v] for k, v in s.items()},
        },
        TypeError,
        r"16-bit beside float32, got torch.float32 beside torch.float16",
    ),
    "rows that descend": ({"rows": lambda r: r[::-1]}, ValueError, r"`rows` must ascend"),
    "rows without coefficients": ({"rows": lambda r: [0, 0, 1, 2]}, ValueError, r"`rows` .* to less than 2"),
}


class TestWhole:
    """Misuse, and the backend under BLUR."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS)
    @pytest.mark.parametrize("step", [adam, sgd])
    def test_errors(self, step, changes, error, message):
        with pytest.raises(error, match=message):
            step(wrong(**changes), **({"momentum": 0.9} if step is sgd else {}))

    def test_a_step_count_for_each_parameter(self):
        with pytest.raises(ValueError, match=r"`steps` must have shape \(4,\) like `params`, got \(2,\)"):
            adam(Case(shapes=SMALL), steps=(1, 2))

    @pytest.mark.parametrize(
        ("base", "kernel"),
        [(optim.AdamW, "adam_kernel"), (optim.Adam, "adam_kernel"), (optim.SGD, "sgd_kernel"), (optim.Adagrad, None)],
    )
    def test_under_blur(self, base, kernel, launches):
        problem, twin = Problem(), Problem()
        opt = BLUR(problem.params, base, lr=0.1, weight_decay=0.1, backend="triton")
        other = BLUR(twin.params, base, lr=0.1, weight_decay=0.1, backend="reference")
        for _ in range(3):
            step_by_closures(opt, problem)
            step_by_closures(other, twin)
        # float64 up to the order of additions in the dots, which adaptive steps pass on as they are relative.
        assert_params_close(problem.params, twin.params, rtol=1e-12, atol=1e-13)
        assert launches.count(kernel or "blend_kernel") == 3

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # Of NumPy, that infinity times 0 is none.
    def test_a_skipped_step_under_blur(self):
        problem = Problem(torch.float32)
        opt = BLUR(problem.params, optim.AdamW, lr=0.1, fused=True, backend="triton")
        step_by_closures(opt, problem)
        before = snapshot(opt)
        opt.step(problem.forget_loss, lambda: problem.retain_loss() * float("inf"))
        assert opt.statistics.skipped == 1
        assert_same_bits(snapshot(opt), before)
