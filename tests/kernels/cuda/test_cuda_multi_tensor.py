"""The dots and the blend of the CUDA source, on the emulator and through their binding.

Every call is repeated under other schedules of the CUDA threads and has to give the same bits. No GPU runs any of it.
"""

import pytest
import torch
from cuda_emulator import (
    CHUNK,
    GRADIENTS,
    NUMELS,
    TOLERANCE,
    Emulated,
    coefficients,
    make,
    make_forget,
    same_bits,
    with_absent,
)
from torch import Tensor

from blur_optim.kernels import foreach, native, reference
from blur_optim.kernels.blocks import empty_compressed

# Error of a dot over the product of the norms: the rounding of each product, and of short sums.
DOT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-7, torch.bfloat16: 1e-7, torch.float16: 1e-7}


def rounding(dtype: torch.dtype, stash: torch.dtype) -> float:
    """Of the product of an integer and its scale."""
    return 2**-24 if stash == torch.int8 and dtype != torch.float64 else 0.0


def assert_dots_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, rounding: float = 0.0) -> None:
    forget, retain = expected[:, 1].sqrt(), expected[:, 2].sqrt()
    scale = torch.stack([forget * retain, forget**2, retain**2], dim=1)
    assert actual.dtype == torch.float64
    assert ((actual - expected).abs() <= (DOT_TOLERANCE[dtype] + 2 * rounding) * scale).all()


@pytest.mark.parametrize(("dtype", "stash"), GRADIENTS, ids=str)
@pytest.mark.parametrize("absent", [False, True], ids=["both", "one-absent"])
def test_dots(emulated, dtype, stash, absent):
    numels = [*NUMELS, 0, 100]
    (forget, scales), retain = make_forget(numels, stash, 0), make(numels, dtype, 1)
    if absent:
        with_absent(forget, retain)
    rows = [0, 0, 0, 2, 2, 2, 2, 2, 2, 3, 4]
    actual = emulated.dots(forget, retain, rows, 6, scales)
    expected = reference.multi_tensor_dots(forget, retain, rows, 6, scales)
    assert_dots_close(actual, expected, dtype, rounding(dtype, stash))
    assert torch.equal(actual[[1, 3, 5]], torch.zeros(3, 3, dtype=torch.float64))
    for row in (0, 2, 4):  # A row has the same bits alone.
        mine = [i for i, r in enumerate(rows) if r == row]
        lists = [[tensors[i] for i in mine] for tensors in (forget, retain, scales) if tensors]
        alone = emulated.dots(*lists[:2], [0] * len(mine), 1, *lists[2:])
        assert torch.equal(alone[0], actual[row])


@pytest.mark.parametrize(("dtype", "stash"), GRADIENTS, ids=str)
def test_alignment_changes_no_bit(emulated, dtype, stash):
    results = []
    for f_misaligned, r_misaligned in [(False, False), (True, False), (False, True), (True, True)]:
        (forget, scales), retain = make_forget(NUMELS, stash, 0, f_misaligned), make(NUMELS, dtype, 1, r_misaligned)
        rows = [0] * len(NUMELS)
        results.append([emulated.dots(forget, retain, rows, 1, scales)])
        results[-1] += emulated.blend(forget, retain, coefficients((0.3, -1.7)), rows, scales)
    assert all(same_bits(result, results[0]) for result in results[1:])


def test_lists_of_several_launches_and_dtypes_and_rows_in_any_order(emulated):
    numels = [9 + i % 5 for i in range(250)]
    kinds = [GRADIENTS[max(i // 15 - 7, 0)] for i in range(250)]  # 120 of the first, which a table has no room for.
    retain = [make([n], kind[0], i + 1000)[0] for i, (n, kind) in enumerate(zip(numels, kinds, strict=True))]
    made = [make_forget([n], kind[1], i) for i, (n, kind) in enumerate(zip(numels, kinds, strict=True))]
    forget, scales = [values[0] for values, _ in made], [(mine or retain[:1])[0] for _, mine in made]
    rows = [(i * 7) % 250 * 2 for i in range(250)]  # More rows than one launch sums; half of them are empty.
    actual = emulated.dots(forget, retain, rows, 520, scales)
    expected = reference.multi_tensor_dots(forget, retain, rows, 520, scales)
    assert_dots_close(actual, expected, torch.float32, rounding(torch.float32, torch.int8))
    assert_blended(emulated, forget, retain, torch.randn(520, 2, dtype=torch.float64), rows, scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nearly_orthogonal_heavy_tailed_gradients(emulated, dtype):
    # Rounding alone is 1e-10 and, in the norms of bfloat16, 1e-8. A running float32 sum over these 2M elements has a
    # norm that is off by 1e-4, bfloat16 products by 1e-3.
    n = 1 << 21
    generator = torch.Generator().manual_seed(0)
    normal, chi = torch.randn(2, n, generator=generator), torch.randn(2, 3, n, generator=generator).square().mean(1)
    f, r = normal / chi.sqrt() * torch.logspace(-4, -1, 16).repeat_interleave(n // 16)
    f, r = f.double(), r.double()
    forget, retain = f.to(dtype), (r + (1e-5 * r.norm() / f.norm() - (f @ r) / (f @ f)) * f).to(dtype)
    emulated.schedule(2, 3)
    dots = emulated.ops.multi_tensor_dots([forget], [retain], [0], 1, [])[0]
    expected = reference.multi_tensor_dots([forget], [retain], [0], 1)[0]
    assert (dots[0] - expected[0]).abs() < 5e-10 * (expected[1] * expected[2]).sqrt()
    assert ((dots - expected)[1:].abs() < 3e-8 * expected[1:]).all()


def assert_blended(
    emulated: Emulated,
    forget: list[Tensor],
    retain: list[Tensor],
    weights: Tensor,
    rows: list[int],
    scales: list[Tensor],
) -> None:
    results = emulated.blend(forget, retain, weights, rows, scales)
    for f, r, u, row in zip(reference._in_float64(forget, scales), retain, results, rows, strict=True):
        a, b = weights[row]
        terms = [a * f if f.numel() else 0 * r.double(), b * r.double() if r.numel() else 0 * f]
        limit = TOLERANCE[u.dtype] * (terms[0].abs() + terms[1].abs())
        smallest = 2**-25 if u.dtype == torch.float16 else 0.0  # Half of the spacing of the subnormals.
        assert ((u.double() - terms[0] - terms[1]).abs() <= limit + smallest).all()
    if not native.why_not(torch.device("cpu")):
        torch.ops.blur_optim.multi_tensor_blend_(retain, forget, weights, rows, scales)
        assert same_bits(results, [r if r.numel() else f for f, r in zip(forget, retain, strict=True)])


@pytest.mark.parametrize(("dtype", "stash"), GRADIENTS, ids=str)
def test_blend(emulated, dtype, stash):
    (forget, scales), retain = make_forget(NUMELS, stash, 0), make(NUMELS, dtype, 1)
    with_absent(forget, retain)
    rows = [0] + [1] * (len(NUMELS) - 1)
    assert_blended(emulated, forget, retain, coefficients((-1.3, 0.7), (0.4, 2.1)), rows, scales)


COMPRESSED = [(dtype, torch.int8) for dtype in TOLERANCE] + [
    (dtype, torch.bfloat16) for dtype in TOLERANCE if dtype.itemsize > 2
]


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize(("dtype", "compressed"), COMPRESSED, ids=str)
def test_compress(emulated, dtype, compressed, misaligned):
    """The bits of PyTorch's way, on every schedule, for what is not finite and for denormals too."""
    numels = [*NUMELS, 0, 700, 300, 300, 2]
    grads = make(numels, dtype, 5, misaligned)
    grads[-4][300], grads[-3][7], grads[-2][:] = float("nan"), -float("inf"), 0.0
    grads[-1][:] = torch.tensor([190.0, -190.0]).double().mul(2.0**-149).to(dtype)
    expected = empty_compressed(grads, compressed)
    foreach.multi_tensor_compress_(*expected, grads)

    def call():
        values, scales = empty_compressed(grads, compressed)
        emulated.ops.multi_tensor_compress_(values, scales, grads)
        return [*values, *scales]

    for actual, wanted in zip(emulated.on_every_schedule(call), [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def test_compressed_lists_of_several_launches(emulated):
    grads = [t for i in range(200) for t in make([9 + i % 5], list(TOLERANCE)[i % 4], i)]
    expected = empty_compressed(grads, torch.int8)
    foreach.multi_tensor_compress_(*expected, grads)
    values, scales = empty_compressed(grads, torch.int8)
    emulated.schedule(0)
    emulated.ops.multi_tensor_compress_(values, scales, grads)
    assert same_bits([*values, *scales], [*expected[0], *expected[1]])


def test_pieces_beyond_32_bits(emulated):
    numels = [5, 2**33 + 7, 3 * CHUNK, 2**40]
    firsts = [0, 1, 1 + 2**33 // CHUNK + 1, 1 + 2**33 // CHUNK + 1 + 3]
    assert emulated.locate(numels, 0) == (0, 0, 5)
    assert emulated.locate(numels, firsts[1]) == (1, 0, CHUNK)
    assert emulated.locate(numels, firsts[2] - 1) == (1, 2**33, 7)
    assert emulated.locate(numels, firsts[2] + 1) == (2, CHUNK, CHUNK)
    assert emulated.locate(numels, firsts[3] + 2**40 // CHUNK - 1) == (3, 2**40 - CHUNK, CHUNK)


def test_a_tensor_of_more_than_2_31_elements(emulated):
    # Only its first and last blocks are run, and only their memory exists: the rest of the pages is never touched.
    n, edge = 2**31 + 3 * CHUNK + 5, 2 * CHUNK
    try:
        forget, retain = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("needs 8 GiB of address space")
    for t in (forget, retain):
        t[:edge] = t[-edge:] = 1
    forget[-1] = 3
    emulated.schedule(0, edge_blocks=2)
    emulated.ops.multi_tensor_blend_([retain], [forget], coefficients((2.0, 0.5)), [0], [])
    emulated.schedule(0)
    done = CHUNK + 5  # The last block is a short one.
    assert (retain[:edge] == 2.5).all()
    assert retain[-1] == 6.5
    assert (retain[-done:-1] == 2.5).all()
    assert (retain[-edge:-done] == 1).all()
