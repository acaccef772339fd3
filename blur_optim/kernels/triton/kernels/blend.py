"""The update u = a f + b r, and the blend, which is all of it."""

import triton
import triton.language as tl

from blur_optim.kernels.triton.kernels.access import ROW, chunk_of, gradients_at, load_forget, load_retain, store


@triton.jit
def coefficients_of(coefficients_ptr, line_ptr, COMPUTE: tl.constexpr):
    ptr = coefficients_ptr + tl.load(line_ptr + ROW) * 2
    return tl.load(ptr).to(COMPUTE), tl.load(ptr + 1).to(COMPUTE)


@triton.jit
def update(
    gradients,
    first,
    count,
    a,
    b,
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if FORGET and RETAIN:
        af = a * load_forget(gradients, first, count, COMPUTE, BLOCK_SIZE)
        return b * load_retain(gradients, first, count, COMPUTE, BLOCK_SIZE) + af
    elif FORGET:
        return a * load_forget(gradients, first, count, COMPUTE, BLOCK_SIZE)
    else:
        return b * load_retain(gradients, first, count, COMPUTE, BLOCK_SIZE)


@triton.jit
def blend_kernel(
    table_ptr,
    programs_ptr,
    coefficients_ptr,
    GRAD: tl.constexpr,
    STASH: tl.constexpr,
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """r <- u, or f <- u where there is no r."""
    line_ptr, chunk, count = chunk_of(table_ptr, programs_ptr, CHUNK_SIZE, 2)
    gradients = gradients_at(line_ptr, chunk * CHUNK_SIZE, GRAD, STASH, VECTOR)
    a, b = coefficients_of(coefficients_ptr, line_ptr, COMPUTE)
    out_ptr = gradients[1] if RETAIN else gradients[0]
    whole = count // BLOCK_SIZE * BLOCK_SIZE
    for i in range(0, whole, BLOCK_SIZE):
        u = update(gradients, i, None, a, b, FORGET, RETAIN, COMPUTE, BLOCK_SIZE)
        store(out_ptr, i, None, u, BLOCK_SIZE)
    if whole < count:
        u = update(gradients, whole, count, a, b, FORGET, RETAIN, COMPUTE, BLOCK_SIZE)
        store(out_ptr, whole, count, u, BLOCK_SIZE)
