"""int8 with a scale for each block of 256 elements: how a gradient is compressed, and PyTorch's way to and from it.

A block holds ``round(x / scale)`` with ``scale = max |x| / 127``: no element is off by more than half a scale. Blocks
run over the elements in memory order. A block with an infinity or a NaN reads as NaN.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from blur_optim.kernels.layout import memory_order

#: Elements that share a scale; csrc/multi_tensor.h has it too. The scales add 1.6 % to the integers.
BLOCK_SIZE = 256
# Elements quantized at a time: the workspace, 3 float32 tensors of this size, is all that is needed beside the result.
SLAB_SIZE = 1 << 22
# Cheaper in the cache.
CPU_SLAB_SIZE = 1 << 16


def empty_compressed(grads: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Make room for compressed gradients.

    Args:
        grads: dense, on one device.
        dtype: int8 or bfloat16.
    Returns:
        ``dtype`` of the same shapes and strides; for int8 also float32 ``[ceil(n / 256)]`` each, else an empty list.
    """
    values = [torch.empty_like(grad, dtype=dtype, memory_format=torch.preserve_format) for grad in grads]
    if dtype != torch.int8 or not grads:
        return values, []
    sizes = [-(-grad.numel() // BLOCK_SIZE) for grad in grads]
    buffer = torch.empty(sum(sizes), dtype=torch.float32, device=grads[0].device)
    return values, list(torch.split(buffer, sizes))


def quantize_(values: Tensor, scales: Tensor, grad: Tensor) -> None:
    """Compress a gradient.

    Args:
        grad: dense, any shape, float32, float64, bfloat16 or float16. Not modified.
        values, scales: written; as :func:`empty_compressed` makes them.
    """
    source, target = memory_order(grad), memory_order(values)
    size = CPU_SLAB_SIZE if grad.device.type == "cpu" else SLAB_SIZE
    whole = grad.numel() // BLOCK_SIZE * BLOCK_SIZE
    for start in range(0, whole, size):
        stop = min(start + size, whole)
        slab, first, last = slice(start, stop), start // BLOCK_SIZE, stop // BLOCK_SIZE
        _quantize(source[slab].view(-1, BLOCK_SIZE), target[slab].view(-1, BLOCK_SIZE), scales[first:last])
    if whole < grad.numel():
        _quantize(source[whole:].view(1, -1), target[whole:].view(1, -1), scales[-1:])


def quantize(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Compress one gradient, and make room for the result."""
    (values,), (scales,) = empty_compressed([grad], torch.int8)
    quantize_(values, scales, grad)
    return values, scales


def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Restore a compressed gradient in ``dtype``, with the strides of ``values``."""
    result = torch.empty_like(values, dtype=dtype, memory_format=torch.preserve_format)
    memory_order(result).copy_(dequantize_flat(memory_order(values), scales, dtype))
    return result


def dequantize_flat(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n] int8, [ceil(n / 256)] -> [n]``; ``values`` begins with a block, its last one may be short."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    scales = scales.to(compute)  # Beside an integer, float32 would be the result's type.
    whole = len(values) // BLOCK_SIZE
    result = torch.empty(len(values), dtype=compute, device=values.device)
    body, tail = slice(0, whole * BLOCK_SIZE), slice(whole * BLOCK_SIZE, None)
    torch.mul(values[body].view(-1, BLOCK_SIZE), scales[:whole, None], out=result[body].view(-1, BLOCK_SIZE))
    if whole < len(scales):
        torch.mul(values[tail], scales[whole], out=result[tail])
    return result.to(dtype)


def _quantize(source: Tensor, target: Tensor, scales: Tensor) -> None:
    """``[k, m]`` gradients to ``[k, m]`` integers and ``[k]`` scales."""
    values = source.float()
    torch.div(values.abs().amax(dim=1), 127, out=scales)
    # A block of zeros has scale 0: its quotients are NaN, which an integer cannot hold.
    integers = (values / scales[:, None]).round_().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    # A scale that is a denormal number may be too small by a third.
    target.copy_(integers.clamp_(-127, 127))
