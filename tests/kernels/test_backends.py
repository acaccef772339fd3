"""Every backend against the float64 reference: values, accuracy, reproducibility."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blur_optim.kernels import foreach, native, reference
from blur_optim.kernels.blocks import quantize
from blur_optim.kernels.select import BACKEND_VARIABLE, BACKENDS, select_backend, why_not

# Triton's interpreter is too slow for these sizes; test_triton.py is its own.
CPU_BACKENDS = [name for name in BACKENDS if name != "triton" and not why_not(name, torch.device("cpu"))]
FAST_BACKENDS = [name for name in CPU_BACKENDS if name != "reference"]

# Error of a dot over the product of the norms: one float32 rounding of each product and a few in a chunk's sum, for the
# low precisions too, since their products are taken in float32. A sum in bfloat16 itself is off by 1e-3.
DOT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-7, torch.bfloat16: 1e-7, torch.float16: 1e-7}
# Error of an element of the update relative to |a f| + |b r|: float32 rounds three times, the others once, at the end.
BLEND_TOLERANCE = {torch.float64: 4e-16, torch.float32: 1.8e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}

SHAPES = [
    pytest.param([()], id="0-d"),
    pytest.param([(0,)], id="0-elements"),
    pytest.param([(1,)], id="1-element"),
    pytest.param([(7,), (4, 0), (3, 5), (), (1, 1, 2)], id="small-and-empty"),
    pytest.param([(foreach.CHUNK_SIZE,)], id="one-chunk"),
    pytest.param([(foreach.CHUNK_SIZE - 1,), (foreach.CHUNK_SIZE + 1,)], id="around-a-chunk"),
    pytest.param([(foreach.CPU_SLAB_SIZE + foreach.CHUNK_SIZE + 3,), (64, 33)], id="more-than-a-slab"),
    pytest.param([(9,)] * 300, id="300-tensors"),
]
LONG = pytest.param(torch.float32, [(3,)] * 10_000, id="float32-10000-tensors")
# Each size in float32, and each dtype in sizes that it is cut into pieces by.
DTYPES_AND_SHAPES = [pytest.param(torch.float32, *p.values, id=f"float32-{p.id}") for p in SHAPES] + [
    pytest.param(dtype, [(foreach.CHUNK_SIZE - 1,), (0,), (foreach.CPU_SLAB_SIZE + 3,), (7,)], id=f"{dtype}-some")
    for dtype in (torch.float64, torch.bfloat16, torch.float16)
]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "every-second-element": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


def make(shapes, dtype, seed, layout="contiguous"):
    generator = torch.Generator().manual_seed(seed)
    return [LAYOUTS[layout](torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def assert_dots_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, rounding: float = 0.0) -> None:
    assert actual.dtype == torch.float64
    assert actual.shape == expected.shape
    forget, retain = expected[:, 1].sqrt(), expected[:, 2].sqrt()
    scale = torch.stack([forget * retain, forget**2, retain**2], dim=1)
    assert ((actual - expected).abs() <= (DOT_TOLERANCE[dtype] + rounding) * scale).all()


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize(("dtype", "shapes"), [*DTYPES_AND_SHAPES, LONG])
def test_dots_match_the_reference(backend, dtype, shapes):
    forget, retain = make(shapes, dtype, seed=0), make(shapes, dtype, seed=1)
    rows = [0] * len(shapes)
    actual = BACKENDS[backend].multi_tensor_dots(forget, retain, rows, 1)
    assert_dots_close(actual, reference.multi_tensor_dots(forget, retain, rows, 1), dtype)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("dtype", "shapes"), [*DTYPES_AND_SHAPES, LONG])
def test_blend_matches_the_equation(backend, dtype, shapes):
    forget, retain = make(shapes, dtype, seed=0), make(shapes, dtype, seed=1)
    a, b = -1.3, 0.7
    terms = [(a * f.double(), b * r.double()) for f, r in zip(forget, retain, strict=True)]
    kept = [f.clone() for f in forget]
    coefficients = torch.tensor([[a, b]], dtype=torch.float64)
    BACKENDS[backend].multi_tensor_blend_(retain, forget, coefficients, [0] * len(shapes))
    for actual, (af, br) in zip(retain, terms, strict=True):
        assert actual.dtype == dtype
        assert ((actual.double() - (af + br)).abs() <= BLEND_TOLERANCE[dtype] * (af.abs() + br.abs())).all()
    assert all(torch.equal(f, k) for f, k in zip(forget, kept, strict=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("forget_layout", LAYOUTS)
@pytest.mark.parametrize("retain_layout", LAYOUTS)
def test_layouts_do_not_matter(backend, forget_layout, retain_layout):
    shapes = [(31, 17), (5,)]
    plain_f, plain_r = make(shapes, torch.float32, 0), make(shapes, torch.float32, 1)
    forget, retain = make(shapes, torch.float32, 0, forget_layout), make(shapes, torch.float32, 1, retain_layout)
    kernels = BACKENDS[backend]
    dots = kernels.multi_tensor_dots(forget, retain, [0, 0], 1)
    assert_dots_close(dots, reference.multi_tensor_dots(plain_f, plain_r, [0, 0], 1), torch.float32)
    coefficients = torch.tensor([[0.3, -2.0]], dtype=torch.float64)
    pointers = [r.data_ptr() for r in retain]
    kernels.multi_tensor_blend_(retain, forget, coefficients, [0, 0])
    kernels.multi_tensor_blend_(plain_r, plain_f, coefficients, [0, 0])
    torch.testing.assert_close(retain, plain_r, rtol=1e-6, atol=1e-6)
    assert pointers == [r.data_ptr() for r in retain]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_rows_are_kept_apart(backend):
    shapes, rows = [(5,), (3, 3), (2,), (70_000,)], [0, 0, 2, 3]
    forget, retain = make(shapes, torch.float32, 0), make(shapes, torch.float32, 1)
    kernels = BACKENDS[backend]
    dots = kernels.multi_tensor_dots(forget, retain, rows, 4)
    assert torch.equal(dots[1], torch.zeros(3, dtype=torch.float64))
    for row in (0, 2, 3):
        mine = [i for i, r in enumerate(rows) if r == row]
        alone = kernels.multi_tensor_dots([forget[i] for i in mine], [retain[i] for i in mine], [0] * len(mine), 1)
        assert torch.equal(dots[row], alone[0])
    coefficients = torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    expected = [forget[0], forget[1], retain[2].clone(), 2 * forget[3]]
    kernels.multi_tensor_blend_(retain, forget, coefficients, rows)
    assert all(torch.equal(r, e) for r, e in zip(retain, expected, strict=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", DOT_TOLERANCE, ids=str)
def test_an_absent_gradient_counts_as_zeros(backend, dtype):
    shapes = [(6, 5), (4,), (foreach.CPU_SLAB_SIZE + 9,), (3,)]
    forget, retain = make(shapes, dtype, 0), make(shapes, dtype, 1)
    empty = torch.empty(0, dtype=dtype)
    forget[1] = retain[2] = retain[3] = empty
    full_f = [f.clone() if f.numel() else torch.zeros(s, dtype=dtype) for f, s in zip(forget, shapes, strict=True)]
    full_r = [r.clone() if r.numel() else torch.zeros(s, dtype=dtype) for r, s in zip(retain, shapes, strict=True)]
    kernels = BACKENDS[backend]
    expected = reference.multi_tensor_dots(full_f, full_r, [0] * 4, 1)
    assert_dots_close(kernels.multi_tensor_dots(forget, retain, [0] * 4, 1), expected, dtype)
    coefficients = torch.tensor([[0.5, -2.0]], dtype=torch.float64)  # Powers of two: exact in every dtype.
    results = [retain[0], retain[1], forget[2], forget[3]]
    kernels.multi_tensor_blend_(retain, forget, coefficients, [0] * 4)
    reference.multi_tensor_blend_(full_r, full_f, coefficients, [0] * 4)
    assert all(torch.equal(x, y) for x, y in zip(results[1:], full_r[1:], strict=True))


COMPRESSED = [
    (dtype, stash)
    for dtype in BLEND_TOLERANCE
    for stash in (torch.bfloat16, torch.int8)
    if stash.itemsize < dtype.itemsize
]


def compress(tensors, stash):
    """The tensors as a stash keeps them, and their scales."""
    if stash is torch.int8:
        return map(list, zip(*map(quantize, tensors), strict=True))
    return [t.to(stash) for t in tensors], []


READ = [pytest.param(torch.float32, torch.int8, *p.values, id=f"float32-int8-{p.id}") for p in SHAPES] + [
    pytest.param(dtype, stash, [(257,), (4,), (foreach.CPU_SLAB_SIZE + 259,), (255,)], id=f"{dtype}-{stash}-some")
    for dtype, stash in COMPRESSED
]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("dtype", "stash", "shapes"), READ)
def test_compressed_forget_gradients_are_read_as_they_are(backend, dtype, stash, shapes):
    forget, scales = compress(make(shapes, dtype, seed=0), stash)
    retain, rows, kernels = make(shapes, dtype, seed=1), [0] * len(shapes), BACKENDS[backend]
    if len(forget) > 1:  # One without a forget gradient among them.
        forget[1] = forget[1].new_empty(0)
    exact = reference._in_float64(forget, scales)
    expected = reference.multi_tensor_dots(exact, [r.double() for r in retain], rows, 1)
    # The product with a block's scale rounds too, the same way for all elements of a block that have one value.
    rounding = 2**-24 if stash is torch.int8 and dtype != torch.float64 else 0.0
    assert_dots_close(kernels.multi_tensor_dots(forget, retain, rows, 1, scales), expected, dtype, 2 * rounding)
    a, b = -1.3, 0.7
    terms = [
        (a * f if len(f) else 0 * r.double(), b * r.double()) for f, r in zip(flat(exact), flat(retain), strict=True)
    ]
    kept = [f.clone() for f in forget]
    kernels.multi_tensor_blend_(retain, forget, torch.tensor([[a, b]], dtype=torch.float64), rows, scales)
    for actual, (af, br) in zip(flat(retain), terms, strict=True):
        limit = (BLEND_TOLERANCE[dtype] + rounding) * (af.abs() + br.abs())
        smallest = 2**-25 if dtype == torch.float16 else 0.0  # Half of the spacing of the subnormals.
        assert ((actual.double() - (af + br)).abs() <= limit + smallest).all()
    assert all(torch.equal(f, k) for f, k in zip(forget, kept, strict=True))


def flat(tensors):
    return [t.reshape(-1) for t in tensors]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("stash", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("forget_layout", ["contiguous", "transposed", "misaligned"])
@pytest.mark.parametrize("retain_layout", LAYOUTS)
def test_layouts_of_compressed_gradients_do_not_matter(backend, stash, forget_layout, retain_layout):
    shapes, kernels = [(31, 17), (5,)], BACKENDS[backend]
    forget, scales = compress(make(shapes, torch.float32, 0, forget_layout), stash)
    retain, coefficients = make(shapes, torch.float32, 1, retain_layout), torch.tensor([[0.3, -2.0]]).double()
    exact, plain = reference._in_float64(forget, scales), [r.double() for r in retain]
    dots = kernels.multi_tensor_dots(forget, retain, [0, 0], 1, scales)
    assert_dots_close(dots, reference.multi_tensor_dots(exact, plain, [0, 0], 1), torch.float32, rounding=2**-23)
    kernels.multi_tensor_blend_(retain, forget, coefficients, [0, 0], scales)
    reference.multi_tensor_blend_(plain, exact, coefficients, [0, 0])
    torch.testing.assert_close(retain, [p.float() for p in plain], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_no_tensors(backend):
    dots = BACKENDS[backend].multi_tensor_dots([], [], [], 2)
    assert torch.equal(dots, torch.zeros(2, 3, dtype=torch.float64))
    BACKENDS[backend].multi_tensor_blend_([], [], torch.ones(2, 2, dtype=torch.float64), [])


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_dtypes_in_one_row_are_not_mixed_up(backend):
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.float64]
    forget = [make([(50,)], dtype, i)[0] for i, dtype in enumerate(dtypes)]
    retain = [make([(50,)], dtype, i + 9)[0] for i, dtype in enumerate(dtypes)]
    actual = BACKENDS[backend].multi_tensor_dots(forget, retain, [0] * 5, 1)
    assert_dots_close(actual, reference.multi_tensor_dots(forget, retain, [0] * 5, 1), torch.float32)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dots_have_the_same_bits_on_any_number_of_threads(backend, dtype, restore_threads):
    shapes = [(3_000_001,), (700, 300), *[(33,)] * 200]
    forget, retain = make(shapes, dtype, 0), make(shapes, dtype, 1)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results += [BACKENDS[backend].multi_tensor_dots(forget, retain, [0] * 202, 1) for _ in range(3)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def heavy_tailed(n: int, seed: int) -> Tensor:
    """Layers of scales 1e-4 to 1e-1, with Student-t noise of 3 degrees of freedom: what gradients look like."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=generator)
    chi = torch.randn(3, n, generator=generator).square().mean(0).sqrt()
    return normal / chi * torch.logspace(-4, -1, 16).repeat_interleave(n // 16)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_nearly_orthogonal_heavy_tailed_gradients(backend):
    # A running float32 sum over these 4M elements has a norm that is off by 1e-4; bfloat16 products by 1e-3.
    n = 1 << 22
    forget, retain = heavy_tailed(n, 0), heavy_tailed(n, 1)
    f, r = forget.double(), retain.double()
    retain = (r + (1e-5 * r.norm() / f.norm() - (f @ r) / (f @ f)) * f).float()
    dots = BACKENDS[backend].multi_tensor_dots([forget], [retain], [0], 1)
    expected = reference.multi_tensor_dots([forget], [retain], [0], 1)
    scale = (expected[0, 1] * expected[0, 2]).sqrt()
    assert (dots[0, 0] - expected[0, 0]).abs() < 5e-10 * scale
    assert ((dots - expected)[0, 1:].abs() < 1e-7 * expected[0, 1:]).all()


def test_selection(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    assert select_backend(None, cpu) is (foreach if native.why_not(cpu) else native)
    assert select_backend("reference", cpu) is reference
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert select_backend(None, cpu) is reference
    assert select_backend("foreach", cpu) is foreach
    monkeypatch.setenv(BACKEND_VARIABLE, "fortran")
    with pytest.raises(ValueError, match=r"`BLUR_OPTIM_BACKEND` must be one of .*'foreach'.* got 'fortran'"):
        select_backend(None, cpu)
    monkeypatch.setattr(native, "why_not", lambda device: "no compiler")
    with pytest.raises(ImportError, match=r"`backend` is 'native', which is not available: no compiler"):
        select_backend("native", cpu)
    monkeypatch.delenv(BACKEND_VARIABLE)
    assert select_backend(None, cpu) is foreach
    with pytest.raises(ValueError, match=r"`backend` must be one of .* got 'cuda9'"):
        select_backend("cuda9", cpu)
