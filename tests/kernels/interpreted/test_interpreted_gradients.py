"""Dots, blend and compression in Triton's interpreter, on the CPU."""

import pytest
import torch
from triton_case import (
    AROUND_SCALES,
    BLOCK,
    CHUNK,
    COMPRESSED,
    DTYPES,
    LAYOUTS,
    SHAPES,
    assert_close,
    assert_dots_close,
    clones,
    make,
    make_stashed,
    table,
)

from blur_optim.kernels import foreach, reference, triton
from blur_optim.kernels.blocks import empty_compressed, quantize
from blur_optim.kernels.triton import launch

# Each size in one dtype, and each dtype in sizes around a block, which is half as large in float64.
PLAIN = [(torch.float32, name) for name in SHAPES] + [(dtype, "around-a-block") for dtype in DTYPES[:1] + DTYPES[2:]]


@pytest.mark.parametrize(("dtype", "name"), PLAIN, ids=str)
def test_dots_and_blend_match_the_equations(dtype, name):
    shapes = SHAPES[name]
    forget, retain = make(shapes, dtype, 0), make(shapes, dtype, 1)
    rows = [0] * len(shapes)
    expected = reference.multi_tensor_dots(forget, retain, rows, 1)
    assert_dots_close(triton.multi_tensor_dots(forget, retain, rows, 1), expected, dtype)
    update = [-1.3 * f.double() + 0.7 * r.double() for f, r in zip(forget, retain, strict=True)]
    kept = clones(forget)
    triton.multi_tensor_blend_(retain, forget, table([-1.3, 0.7]), rows)
    assert_close(retain, update, dtype)
    assert all(torch.equal(f, k) for f, k in zip(forget, kept, strict=True))


READ = [(torch.float32, torch.int8, name) for name in SHAPES] + [(*each, "around-scales") for each in COMPRESSED]


@pytest.mark.parametrize(("dtype", "stash", "name"), READ, ids=str)
def test_compressed_forget_gradients_are_read_as_they_are(dtype, stash, name):
    shapes = AROUND_SCALES if name == "around-scales" else SHAPES[name]
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
def test_compress_has_the_bits_of_pytorch(dtype, stash):
    grads = make([(2 * BLOCK + 300,), (700,), (300,), (1,), (0,), (2,), (3, 5)], dtype, 2)
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
@pytest.mark.parametrize(
    ("forget_layout", "retain_layout"),
    [
        ("contiguous", "transposed"),
        ("transposed", "contiguous"),
        ("transposed", "transposed"),
        ("transposed", "every-second-element"),
        ("misaligned", "contiguous"),
    ],
)
def test_layouts_of_compressed_gradients_do_not_matter(stash, forget_layout, retain_layout):
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


@pytest.mark.parametrize(
    ("forget_layout", "retain_layout"),
    [
        *((layout, "contiguous") for layout in LAYOUTS),
        *(("contiguous", layout) for layout in LAYOUTS if layout != "contiguous"),
        ("transposed", "transposed"),
        ("every-second-element", "transposed"),
    ],
)
def test_layouts_do_not_matter(forget_layout, retain_layout):
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
def test_an_absent_gradient_counts_as_zeros(dtype):
    shapes = [(6, 5), (4,), (BLOCK + 9,), (3,)]
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


def test_rows_are_kept_apart():
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


def test_dtypes_and_alignments_in_one_row_are_not_mixed_up():
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


def test_no_tensors():
    assert torch.equal(triton.multi_tensor_dots([], [], [], 2), torch.zeros(2, 3, dtype=torch.float64))
    triton.multi_tensor_blend_([], [], torch.ones(2, 2, dtype=torch.float64), [])


def test_runs_are_short(monkeypatch):
    """Half of the roundings in a running sum of squares of bfloat16 values are ties: a long one is biased."""
    x = torch.full((CHUNK,), 1.0).add_(torch.arange(CHUNK) % 128 / 128).bfloat16()
    exact = reference.multi_tensor_dots([x], [x], [0], 1)

    def error():
        return ((triton.multi_tensor_dots([x], [x], [0], 1) - exact).abs() / exact).max()

    assert error() < 1e-7
    monkeypatch.setattr(launch.device_code(), "BLOCK_SIZE", 64)  # Runs of 512 additions.
    assert error() > 2e-7


def test_nearly_orthogonal_heavy_tailed_gradients():
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


def test_offsets_beyond_32_bits():
    """The last chunk of a tensor of 2^33 + 5 elements, of which only these 5 exist."""
    kernels, start = launch.device_code(), 1 << 33
    f, r = make([(5,), (5,)], torch.bfloat16, 0)
    expected = 2 * f - r
    first = -(start // CHUNK)
    line = [start + 5, 0, 0, first, first, 0, *(t.data_ptr() - 2 * start for t in (f, r))]
    kind = launch.Kind(torch.bfloat16, torch.bfloat16, torch.bfloat16, True, True, 1)
    constants = {name: v for name, v in launch.constants_of(kind).items() if name != "PARAM"}
    lines, programs = torch.tensor([line]), torch.zeros(1, dtype=torch.int64)
    partials = torch.zeros(1, 3, dtype=torch.float64)
    launch.run(kernels.dots_kernel, (1,), lines, programs, partials, **constants)
    assert_dots_close(partials, reference.multi_tensor_dots([f], [r], [0], 1), torch.bfloat16)
    launch.run(kernels.blend_kernel, (1,), lines, programs, table([2, -1]), **constants)
    assert_close([r], [expected.double()], torch.bfloat16)


def test_a_launch_for_all_tensors_of_a_kind(launches):
    shapes = [(5,)] * 20
    forget, retain = make(shapes, torch.float32, 0), make(shapes, torch.float32, 1)
    triton.multi_tensor_dots(forget, retain, list(range(20)), 20)
    assert launches == ["dots_kernel", "sum_rows_kernel"]
    retain[3] = torch.empty(0)
    forget[7], retain[7] = forget[7].bfloat16(), retain[7].bfloat16()
    triton.multi_tensor_blend_(retain, forget, torch.ones(1, 2, dtype=torch.float64), [0] * 20)
    assert launches[2:] == ["blend_kernel"] * 3


def test_the_default_device_does_not_matter():
    forget, retain = make([(5,)], torch.float32, 0), make([(5,)], torch.float32, 1)
    expected = triton.multi_tensor_dots(forget, retain, [0], 1)
    with torch.device("meta"):
        assert torch.equal(triton.multi_tensor_dots(forget, retain, [0], 1), expected)


def test_autograd_learns_of_the_modification():
    forget, retain = make([(5,), (3,)], torch.float32, 0), make([(5,), (3,)], torch.float32, 1)
    retain[1] = torch.empty(0)
    triton.multi_tensor_blend_(retain, forget, torch.ones(1, 2, dtype=torch.float64), [0, 0])
    assert [t._version for t in (*forget, *retain)] == [0, 1, 1, 0]
