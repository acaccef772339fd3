"""Slices that fit the cache, and sums whose order the length of a chunk alone decides."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from blur_optim.kernels.blocks import BLOCK_SIZE, dequantize, dequantize_flat
from blur_optim.kernels.layout import dense_alike, is_dense, memory_order

# Short enough that torch never splits one chunk's sum over threads (its grain is 32768 elements).
CHUNK_SIZE = 4096
# Elements handled at a time. On the CPU the three float32 products of a slab stay in the L2 cache; elsewhere a slab
# only bounds the workspace, and few launches matter more. A multiple of CHUNK_SIZE, or the chunks would depend on it,
# and so of BLOCK_SIZE.
CPU_SLAB_SIZE = 1 << 16
DEVICE_SLAB_SIZE = 1 << 24


def slabs(out: Tensor, forget: Tensor, scales: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching pieces of both, the forget gradient's restored where it is int8.

    Tensors of other layouts stay whole, for ``out`` must not become a copy.
    """
    dtype = accumulation_dtype(out.dtype)
    if not (out.is_contiguous() and forget.is_contiguous()):
        yield out, forget if scales is None else dequantize(forget, scales, dtype)
        return
    out, forget, size = out.view(-1), forget.view(-1), slab_size(out.device)
    for start in range(0, out.numel(), size):
        piece = forget[start : start + size]
        if scales is not None:
            piece = dequantize_flat(piece, scales[start // BLOCK_SIZE : (start + size) // BLOCK_SIZE], dtype)
        yield out[start : start + size], piece


def aligned_slabs(scales: Sequence[Tensor], dtype: torch.dtype, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Matching pieces of all tensors, the first one's restored where it is int8; an absent one has empty pieces.

    Tensors of unlike layouts stay whole, for what is written must not become a copy.
    """
    forget, *others = tensors
    present = [t for t in tensors if t.numel()]
    quantized = forget.dtype == torch.int8 and forget.numel() > 0
    if not present:
        return
    if not all(dense_alike(t, present[0]) and is_dense(t) for t in present):
        yield [dequantize(forget, scales[0], dtype) if quantized else forget, *others]
        return
    size = slab_size(present[0].device)
    for start in range(0, present[0].numel(), size):
        f, *rest = (memory_order(t)[start : start + size] for t in tensors)
        if quantized:
            f = dequantize_flat(f, scales[0][start // BLOCK_SIZE : (start + size) // BLOCK_SIZE], dtype)
        yield [f, *rest]


def slab_size(device: torch.device) -> int:
    return CPU_SLAB_SIZE if device.type == "cpu" else DEVICE_SLAB_SIZE


def chunk_sums(values: Tensor) -> Tensor:
    """``[k, n] -> [k, ceil(n / CHUNK_SIZE)]``: sums in the values' dtype within a chunk, returned in float64."""
    k, n = values.shape
    if n % CHUNK_SIZE and n > CHUNK_SIZE:
        whole = n // CHUNK_SIZE * CHUNK_SIZE
        return torch.cat([chunk_sums(values[:, :whole]), chunk_sums(values[:, whole:])], dim=1)
    return values.reshape(k, -1, min(n, CHUNK_SIZE) or 1).sum(dim=-1).double()


def ordered_sum(values: Tensor) -> Tensor:
    """``[k, n] -> [k]``, level by level in chunks, so that no level is one long sum that threads would share."""
    while values.shape[1] > 1:
        values = chunk_sums(pad(values, (0, -values.shape[1] % min(values.shape[1], CHUNK_SIZE))))
    return values.squeeze(1)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
