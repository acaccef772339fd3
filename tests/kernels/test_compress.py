"""The compress operation in every backend: int8 and scales have the same bits everywhere, bfloat16 those of torch."""

import pytest
import torch

from blur_optim.kernels import BACKENDS, native
from blur_optim.kernels.blocks import dequantize, empty_compressed, quantize
from blur_optim.kernels.select import why_not

CPU = torch.device("cpu")
OTHERS = [name for name in BACKENDS if name != "foreach" and not why_not(name, CPU)]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NUMELS = [0, 1, 7, 255, 256, 257, 1000, 32768, 32769 + 256, 70_001]


def heavy(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator) * torch.randn(n, generator=generator).exp()


def compress(backend, grads, dtype):
    values, scales = empty_compressed(grads, dtype)
    BACKENDS[backend].multi_tensor_compress_(values, scales, grads)
    return values, scales


def assert_same(backend, grads, dtype):
    values, scales = compress(backend, grads, dtype)
    expected, expected_scales = compress("foreach", grads, dtype)
    for i, (actual, wanted) in enumerate(zip([*values, *scales], [*expected, *expected_scales], strict=True)):
        assert actual.dtype == wanted.dtype
        assert actual.stride() == wanted.stride()
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"{i}: {m}")


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_has_the_same_bits(backend, dtype):
    assert_same(backend, [heavy(n, i).to(dtype) for i, n in enumerate(NUMELS)], torch.int8)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bfloat16_has_the_same_bits(backend, dtype):
    grads = [heavy(n, i).to(dtype) for i, n in enumerate(NUMELS)]
    grads += [torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1e39, float("nan"), -float("inf"), 1e-45]).to(dtype)]
    assert_same(backend, grads, torch.bfloat16)


@pytest.mark.parametrize("backend", OTHERS)
def test_ties_denormals_and_what_is_not_finite(backend):
    ties = torch.arange(-126, 126).float() + torch.tensor([0.5, -0.5, 0.25]).repeat(84)
    ties[0] = 127.0  # A scale of 1: halves are ties, and go to the even integer.
    blocks = [ties, torch.zeros(300), torch.full((300,), 1e-45), torch.full((257,), 190 * 2.0**-149)]
    for bad in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        block = heavy(700)
        block[300] = bad
        blocks.append(block)
    assert_same(backend, blocks, torch.int8)
    (values,), (scales,) = compress(backend, [blocks[0]], torch.int8)
    assert torch.equal(values.float(), ties.round())
    assert scales.tolist() == [1.0]


@pytest.mark.parametrize("backend", ["foreach", *OTHERS])
def test_a_scale_too_small_by_a_third_turns_no_sign(backend):
    """Below the normal numbers a scale is rounded to a multiple of 1e-45, and a quotient may come out as 190."""
    (values,), (scales,) = compress(backend, [torch.tensor([190.0, -190.0]) * 2.0**-149], torch.int8)
    assert values.tolist() == [127, -127]
    assert dequantize(values, scales, torch.float64).abs().max() <= 190 * 2.0**-149


@pytest.mark.parametrize("backend", OTHERS)
def test_layouts_and_misaligned_memory(backend):
    buffer = heavy(4000)
    grads = [buffer[1:601].view(20, 30), heavy(600).view(20, 30).t(), heavy(480).view(2, 5, 6, 8).permute(0, 3, 1, 2)]
    assert_same(backend, grads, torch.int8)
    assert_same(backend, grads, torch.bfloat16)


@pytest.mark.parametrize("backend", ["foreach", *OTHERS])
def test_the_gradients_are_not_modified_and_the_results_are_marked_as_written(backend):
    grad = heavy(1000)
    before = grad.clone()
    values, scales = empty_compressed([grad], torch.int8)
    versions = values[0]._version, scales[0]._version
    BACKENDS[backend].multi_tensor_compress_(values, scales, [grad])
    assert torch.equal(grad, before)
    assert values[0]._version > versions[0]
    assert scales[0]._version > versions[1]
    assert torch.equal(values[0], quantize(grad)[0])


def test_nothing_to_compress():
    for backend in BACKENDS:
        if not why_not(backend, CPU):
            BACKENDS[backend].multi_tensor_compress_([], [], [])


@pytest.mark.skipif(bool(native.why_not(CPU)), reason=native.why_not(CPU))
class TestRefused:
    """By the operator itself, which trusts nobody: it writes to addresses."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda v, s, g: (v[:1], s, g), r"`values` must have 2 tensors like `grads`, got 1"),
            (lambda v, s, g: ([v[0].int(), v[1]], s, g), r"`values\[0\]` must be int8, or bfloat16 for a gradient of"),
            (
                lambda v, s, g: ([v[0], v[1][:5]], s, g),
                r"`values\[1\]` must have as many elements as `grads\[1\]`, 300",
            ),
            (lambda v, s, g: (v, s[:1], g), r"`scales\[1\]` must be a contiguous float32 tensor of 2 elements"),
            (lambda v, s, g: (v, [s[0], s[1].double()], g), r"`scales\[1\]` must be a contiguous float32"),
            (lambda v, s, g: (v, s, [g[0], g[1].int()]), r"`grads\[1\]` must be float32, bfloat16, float16 or float64"),
        ],
    )
    def test_what_does_not_fit(self, change, message):
        grads = [torch.randn(300), torch.randn(300)]
        lists = change(*empty_compressed(grads, torch.int8), grads)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.blur_optim.multi_tensor_compress_(*lists)
