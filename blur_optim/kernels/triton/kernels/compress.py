"""Gradients compressed, to int8 in blocks or to bfloat16."""

import triton
import triton.language as tl

from blur_optim.kernels.triton.kernels.access import SCALED, chunk_of, gradients_at, load, store


@triton.jit
def _compress(gradients, first, count, BLOCK_SIZE: tl.constexpr):
    """Write a block of the retain gradient, compressed, to where the forget gradient of a pair would be."""
    f_ptr, r_ptr, scales_ptr = gradients
    x = load(r_ptr, first, count, tl.float32, BLOCK_SIZE)
    if f_ptr.dtype.element_ty == tl.int8:
        SCALES: tl.constexpr = BLOCK_SIZE // SCALED
        x = tl.reshape(x, [SCALES, SCALED])
        # In integers the largest magnitude is that of a NaN, then that of an infinity.
        largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        scales = tl.div_rn(largest.to(tl.float32, bitcast=True), 127.0)
        quotients = tl.div_rn(x, tl.broadcast_to(scales[:, None], [SCALES, SCALED]))
        # 1.5 * 2^23: what a float of up to 2^22 loses beside it is its fraction, to nearest, ties to even.
        rounded = (quotients + 12582912.0) - 12582912.0
        rounded = tl.where(quotients - quotients == 0.0, rounded, 0.0)  # Of zeros, 0 / 0.
        rounded = tl.where(rounded > 127.0, 127.0, tl.where(rounded < -127.0, -127.0, rounded))
        offsets = first // SCALED + tl.arange(0, SCALES)
        blocks = None if count is None else tl.cdiv(count, SCALED)
        tl.store(scales_ptr + offsets, scales, mask=None if count is None else offsets < blocks)
        x = tl.reshape(rounded, [BLOCK_SIZE]).to(tl.int32)
    store(f_ptr, first, count, x, BLOCK_SIZE)


@triton.jit
def compress_kernel(
    table_ptr,
    programs_ptr,
    GRAD: tl.constexpr,
    STASH: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Compress gradients: the scales that :func:`load_forget` reads are written here."""
    line_ptr, chunk, count = chunk_of(table_ptr, programs_ptr, CHUNK_SIZE, 2)
    gradients = gradients_at(line_ptr, chunk * CHUNK_SIZE, GRAD, STASH, VECTOR)
    whole = count // BLOCK_SIZE * BLOCK_SIZE
    for i in range(0, whole, BLOCK_SIZE):
        _compress(gradients, i, None, BLOCK_SIZE)
    if whole < count:
        _compress(gradients, whole, count, BLOCK_SIZE)
