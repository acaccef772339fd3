"""The dots of each chunk, and what every sum over chunks ends with."""

import triton
import triton.language as tl

from blur_optim.kernels.triton.kernels.access import (
    FIRST_CHUNK,
    chunk_of,
    gradients_at,
    load_forget,
    load_retain,
)


@triton.jit
def _add_dots(
    sums,
    gradients,
    first,
    count,
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    rf, ff, rr = sums
    if FORGET:
        f = load_forget(gradients, first, count, COMPUTE, BLOCK_SIZE)
        ff += f * f
    if RETAIN:
        r = load_retain(gradients, first, count, COMPUTE, BLOCK_SIZE)
        rr += r * r
    if FORGET and RETAIN:
        rf += r * f
    return rf, ff, rr


@triton.jit
def dots_kernel(
    table_ptr,
    programs_ptr,
    partials_ptr,
    GRAD: tl.constexpr,
    STASH: tl.constexpr,
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Write <r, f>, |f|^2, |r|^2 of each chunk to ``partials`` [chunks, 3], float64."""
    line_ptr, chunk, count = chunk_of(table_ptr, programs_ptr, CHUNK_SIZE, 2)
    gradients = gradients_at(line_ptr, chunk * CHUNK_SIZE, GRAD, STASH, VECTOR)
    # Before the loop, which then keeps one register for it: with more, the compiler would spill some of them rather
    # than run fewer programs at a time.
    index = (tl.load(line_ptr + FIRST_CHUNK) + chunk).to(tl.int32)
    rf = tl.zeros([BLOCK_SIZE], COMPUTE)
    ff = tl.zeros([BLOCK_SIZE], COMPUTE)
    rr = tl.zeros([BLOCK_SIZE], COMPUTE)
    whole = count // BLOCK_SIZE * BLOCK_SIZE
    for i in range(0, whole, BLOCK_SIZE):
        rf, ff, rr = _add_dots((rf, ff, rr), gradients, i, None, FORGET, RETAIN, COMPUTE, BLOCK_SIZE)
    if whole < count:
        rf, ff, rr = _add_dots((rf, ff, rr), gradients, whole, count, FORGET, RETAIN, COMPUTE, BLOCK_SIZE)
    out_ptr = partials_ptr + index.to(tl.int64) * 3
    tl.store(out_ptr, tl.sum(rf.to(tl.float64), axis=0))
    tl.store(out_ptr + 1, tl.sum(ff.to(tl.float64), axis=0))
    tl.store(out_ptr + 2, tl.sum(rr.to(tl.float64), axis=0))


@triton.jit
def sum_rows_kernel(partials_ptr, row_starts_ptr, dots_ptr, DOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """One dot of one row from the partial sums of its chunks, in an order that depends on their number alone."""
    row = tl.program_id(0)
    dot = tl.program_id(1)
    end = tl.load(row_starts_ptr + row + 1)
    total = tl.zeros([BLOCK_SIZE], tl.float64)
    for i in range(tl.load(row_starts_ptr + row), end, BLOCK_SIZE):
        chunks = i + tl.arange(0, BLOCK_SIZE)
        total += tl.load(partials_ptr + chunks * DOTS + dot, mask=chunks < end, other=0.0)
    tl.store(dots_ptr + row * DOTS + dot, tl.sum(total, axis=0))
