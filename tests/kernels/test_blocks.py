"""int8 blocks: the error that is promised, every length and layout, and what is not finite."""

import pytest
import torch

from blur_optim.kernels import blocks
from blur_optim.kernels.blocks import BLOCK_SIZE, dequantize, dequantize_flat, quantize

LENGTHS = [0, 1, 255, 256, 257, 1000, blocks.CPU_SLAB_SIZE + 300]


def scale_of_each(scales, n):
    return scales.double().repeat_interleave(BLOCK_SIZE)[:n]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_no_element_is_off_by_more_than_half_a_scale(n, dtype):
    grad = (torch.randn(n).exp() * torch.randn(n)).to(dtype)
    values, scales = quantize(grad)
    assert values.dtype == torch.int8
    assert scales.shape == (-(-n // BLOCK_SIZE),)
    restored = values.double() * scale_of_each(scales, n)
    # Beside the half: a float32 division, whose quotient may fall on the other side of it.
    assert ((restored - grad.double()).abs() <= (0.5 + 1e-4) * scale_of_each(scales, n)).all()
    biggest = [block.abs().max().double() for block in grad.split(BLOCK_SIZE)] if n else []
    torch.testing.assert_close(127 * scales.double(), torch.tensor(biggest).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 100), (7, 5, 33), ()])
def test_layouts(shape, dtype):
    grad = torch.randn(shape).permute(tuple(reversed(range(len(shape)))))
    values, scales = quantize(grad)
    assert values.stride() == grad.stride()
    restored = dequantize(values, scales, dtype)
    assert restored.dtype == dtype
    assert restored.stride() == grad.stride()
    assert (restored - grad).abs().max() <= 0.5001 * scales.max() + (0.02 if dtype == torch.bfloat16 else 0)


def test_pieces_that_begin_with_a_block_are_restored_alone():
    values, scales = quantize(torch.randn(1000))
    whole = dequantize_flat(values, scales, torch.float32)
    assert torch.equal(dequantize_flat(values[512:], scales[2:], torch.float32), whole[512:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad):
    grad = torch.randn(700)
    grad[300] = bad
    restored = dequantize(*quantize(grad), torch.float32)
    assert restored[256:512].isnan().all()
    assert restored[:256].isfinite().all()
    assert restored[512:].isfinite().all()


def test_zeros_and_denormals():
    for tiny in (0.0, 1e-45, 1e-42):
        values, scales = quantize(torch.full((300,), tiny))
        assert (dequantize(values, scales, torch.float32) - tiny).abs().max() <= max(tiny, 0)


def test_a_gradient_in_a_larger_buffer_is_read_in_place():
    buffer = torch.randn(2000)
    values, scales = quantize(buffer[100:700].view(20, 30))
    expected = quantize(buffer[100:700].clone())
    assert torch.equal(values.view(-1), expected[0])
    assert torch.equal(scales, expected[1])
