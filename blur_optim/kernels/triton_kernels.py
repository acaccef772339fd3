"""Device code of the ``triton`` backend. Importing it imports triton, so only ``triton.py`` does, and not before use.

A program handles one chunk of one tensor. What it needs to know stands in a *table* of int64: one line per tensor with
the columns below, then the address of each of its tensors. ``programs`` names the line of each program.

Addresses and offsets into a tensor are 64 bits wide, offsets into a chunk 32. All chunks but the last of a tensor are
whole: an unmasked loop, because a mask that is not known at compile time splits a 16-byte load into its elements, and a
masked block for the rest. For the same reason tensors whose addresses are multiples of 16 get a kernel that knows it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

#: Elements that a program handles, and that are summed in the compute dtype before float64 takes over. Part of the
#: definition of the sums, like that of csrc/multi_tensor.h: it does not follow the device.
CHUNK_SIZE = 32768
#: Elements that advance together. 8 per thread: one 16-byte load of 16-bit values, two of float32; and 16 additions
#: into one running sum per chunk: longer runs over bfloat16 are biased, see kRun in csrc/cpu/kernels_impl.h.
BLOCK_SIZE = 2048

# What every launch is compiled with, whatever Triton's defaults are. Without contraction into fused multiply-adds the
# bits do not depend on which of them the compiler finds (and Triton's default for it changes after 3.9). One stage:
# there is nothing to multiply in tensor cores, and a pipeline would only take shared memory.
OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}

DTYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}

# Columns of the table.
NUMEL = tl.constexpr(0)
ROW = tl.constexpr(1)
TENSOR = tl.constexpr(2)  # Its place in the caller's lists.
FIRST_PROGRAM = tl.constexpr(3)
FIRST_CHUNK = tl.constexpr(4)  # Over all launches of an operation.
ADDRESSES = tl.constexpr(5)


@triton.jit
def _chunk(table_ptr, programs_ptr, CHUNK_SIZE: tl.constexpr, TENSORS: tl.constexpr):
    """The line of this program's tensor, and its chunk: index in the tensor and number of elements."""
    program = tl.program_id(0)
    line_ptr = table_ptr + tl.load(programs_ptr + program) * (ADDRESSES + TENSORS)
    chunk = program - tl.load(line_ptr + FIRST_PROGRAM)
    count = tl.minimum(tl.load(line_ptr + NUMEL) - chunk * CHUNK_SIZE, CHUNK_SIZE).to(tl.int32)
    return line_ptr, chunk, count


@triton.jit
def _at(line_ptr, TENSOR: tl.constexpr, start, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """The address of the chunk in a tensor, with the promise that VECTOR elements can be accessed together."""
    ptr = tl.load(line_ptr + ADDRESSES + TENSOR).to(tl.pointer_type(DTYPE)) + start
    return tl.multiple_of(ptr, VECTOR * (ptr.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit
def _load(ptr, offsets, mask, COMPUTE: tl.constexpr):
    x = tl.load(ptr + offsets) if mask is None else tl.load(ptr + offsets, mask=mask, other=0.0)
    return x.to(COMPUTE)


@triton.jit
def _divide(x, y):
    """Rounded as IEEE says; Triton's ``/`` is an approximation in float32."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _sqrt(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


# -- Dots --------------------------------------------------------------------------------------------------------------


@triton.jit
def _add_dots(sums, f_ptr, r_ptr, offsets, mask, COMPUTE: tl.constexpr, FORGET: tl.constexpr, RETAIN: tl.constexpr):
    rf, ff, rr = sums
    if FORGET:
        f = _load(f_ptr, offsets, mask, COMPUTE)
        ff += f * f
    if RETAIN:
        r = _load(r_ptr, offsets, mask, COMPUTE)
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
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Write <r, f>, |f|^2, |r|^2 of each chunk to ``partials`` [chunks, 3], float64."""
    line_ptr, chunk, count = _chunk(table_ptr, programs_ptr, CHUNK_SIZE, 2)
    f_ptr = _at(line_ptr, 0, chunk * CHUNK_SIZE, GRAD, VECTOR)
    r_ptr = _at(line_ptr, 1, chunk * CHUNK_SIZE, GRAD, VECTOR)
    lanes = tl.arange(0, BLOCK_SIZE)
    rf = tl.zeros([BLOCK_SIZE], COMPUTE)
    ff = tl.zeros([BLOCK_SIZE], COMPUTE)
    rr = tl.zeros([BLOCK_SIZE], COMPUTE)
    whole = count // BLOCK_SIZE * BLOCK_SIZE
    for i in range(0, whole, BLOCK_SIZE):
        rf, ff, rr = _add_dots((rf, ff, rr), f_ptr, r_ptr, i + lanes, None, COMPUTE, FORGET, RETAIN)
    if whole < count:
        offsets = whole + lanes
        rf, ff, rr = _add_dots((rf, ff, rr), f_ptr, r_ptr, offsets, offsets < count, COMPUTE, FORGET, RETAIN)
    out_ptr = partials_ptr + (tl.load(line_ptr + FIRST_CHUNK) + chunk) * 3
    tl.store(out_ptr, tl.sum(rf.to(tl.float64), axis=0))
    tl.store(out_ptr + 1, tl.sum(ff.to(tl.float64), axis=0))
    tl.store(out_ptr + 2, tl.sum(rr.to(tl.float64), axis=0))


@triton.jit
def sum_rows_kernel(partials_ptr, row_starts_ptr, dots_ptr, BLOCK_SIZE: tl.constexpr):
    """One dot of one row from the partial sums of its chunks, in an order that depends on their number alone."""
    row = tl.program_id(0)
    dot = tl.program_id(1)
    end = tl.load(row_starts_ptr + row + 1)
    total = tl.zeros([BLOCK_SIZE], tl.float64)
    for i in range(tl.load(row_starts_ptr + row), end, BLOCK_SIZE):
        chunks = i + tl.arange(0, BLOCK_SIZE)
        total += tl.load(partials_ptr + chunks * 3 + dot, mask=chunks < end, other=0.0)
    tl.store(dots_ptr + row * 3 + dot, tl.sum(total, axis=0))


# -- The update u = a f + b r ------------------------------------------------------------------------------------------


@triton.jit
def _coefficients(coefficients_ptr, line_ptr, COMPUTE: tl.constexpr):
    ptr = coefficients_ptr + tl.load(line_ptr + ROW) * 2
    return tl.load(ptr).to(COMPUTE), tl.load(ptr + 1).to(COMPUTE)


@triton.jit
def _update(f_ptr, r_ptr, offsets, mask, a, b, COMPUTE: tl.constexpr, FORGET: tl.constexpr, RETAIN: tl.constexpr):
    if FORGET and RETAIN:
        return b * _load(r_ptr, offsets, mask, COMPUTE) + a * _load(f_ptr, offsets, mask, COMPUTE)
    elif FORGET:
        return a * _load(f_ptr, offsets, mask, COMPUTE)
    else:
        return b * _load(r_ptr, offsets, mask, COMPUTE)


@triton.jit
def blend_kernel(
    table_ptr,
    programs_ptr,
    coefficients_ptr,
    GRAD: tl.constexpr,
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """r <- u, or f <- u where there is no r."""
    line_ptr, chunk, count = _chunk(table_ptr, programs_ptr, CHUNK_SIZE, 2)
    f_ptr = _at(line_ptr, 0, chunk * CHUNK_SIZE, GRAD, VECTOR)
    r_ptr = _at(line_ptr, 1, chunk * CHUNK_SIZE, GRAD, VECTOR)
    a, b = _coefficients(coefficients_ptr, line_ptr, COMPUTE)
    out_ptr = r_ptr if RETAIN else f_ptr
    lanes = tl.arange(0, BLOCK_SIZE)
    whole = count // BLOCK_SIZE * BLOCK_SIZE
    for i in range(0, whole, BLOCK_SIZE):
        u = _update(f_ptr, r_ptr, i + lanes, None, a, b, COMPUTE, FORGET, RETAIN)
        tl.store(out_ptr + i + lanes, u.to(GRAD))
    if whole < count:
        offsets = whole + lanes
        u = _update(f_ptr, r_ptr, offsets, offsets < count, a, b, COMPUTE, FORGET, RETAIN)
        tl.store(out_ptr + offsets, u.to(GRAD), mask=offsets < count)


# -- Fused optimizers --------------------------------------------------------------------------------------------------


@triton.jit
def _none_if_found(count, found_inf_ptr):
    """No elements where the step is to be skipped."""
    if found_inf_ptr is None:
        return count
    else:
        return tl.where(tl.load(found_inf_ptr) == 0, count, 0)


@triton.jit
def adam_step_sizes_kernel(steps_ptr, lr_ptr, numbers_ptr, sizes_ptr):
    """lr / (1 - beta1^step) and sqrt(1 - beta2^step) of each tensor, in float64: once, and not in every chunk."""
    tensor = tl.program_id(0)
    step = tl.load(steps_ptr + tensor).to(tl.float64)
    bias1 = 1.0 - tl.exp(step * tl.load(numbers_ptr + 7))
    bias2 = 1.0 - tl.exp(step * tl.load(numbers_ptr + 8))
    tl.store(sizes_ptr + tensor * 2, tl.load(lr_ptr) / bias1)
    tl.store(sizes_ptr + tensor * 2 + 1, tl.sqrt(bias2))


@triton.jit
def _adam_block(
    ptrs,
    numbers,
    offsets,
    mask,
    PARAM: tl.constexpr,
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    COMPUTE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DECOUPLED: tl.constexpr,
):
    f_ptr, r_ptr, p_ptr, m_ptr, v_ptr, vmax_ptr = ptrs
    a, b, beta1, rest1, beta2, rest2, eps, decay, step_size, bias2_sqrt = numbers
    grad = _update(f_ptr, r_ptr, offsets, mask, a, b, COMPUTE, FORGET, RETAIN)
    param = _load(p_ptr, offsets, mask, COMPUTE)
    if DECOUPLED:
        param = param * decay
    else:
        grad = grad + decay * param
    m = beta1 * _load(m_ptr, offsets, mask, COMPUTE) + rest1 * grad
    v = beta2 * _load(v_ptr, offsets, mask, COMPUTE) + rest2 * grad * grad
    tl.store(m_ptr + offsets, m.to(PARAM), mask=mask)
    tl.store(v_ptr + offsets, v.to(PARAM), mask=mask)
    if AMSGRAD:
        seen = _load(vmax_ptr, offsets, mask, COMPUTE)
        v = tl.where(seen < v, v, seen)
        tl.store(vmax_ptr + offsets, v.to(PARAM), mask=mask)
    param = param - _divide(step_size * m, _divide(_sqrt(v), bias2_sqrt) + eps)
    tl.store(p_ptr + offsets, param.to(PARAM), mask=mask)


@triton.jit
def adam_kernel(
    table_ptr,
    programs_ptr,
    coefficients_ptr,
    numbers_ptr,
    sizes_ptr,
    lr_ptr,
    found_inf_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DECOUPLED: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The step of Adam or AdamW (DECOUPLED) on u, which stays in registers."""
    TENSORS: tl.constexpr = 6 if AMSGRAD else 5
    line_ptr, chunk, count = _chunk(table_ptr, programs_ptr, CHUNK_SIZE, TENSORS)
    count = _none_if_found(count, found_inf_ptr)
    start = chunk * CHUNK_SIZE
    f_ptr = _at(line_ptr, 0, start, GRAD, VECTOR)
    r_ptr = _at(line_ptr, 1, start, GRAD, VECTOR)
    p_ptr = _at(line_ptr, 2, start, PARAM, VECTOR)
    m_ptr = _at(line_ptr, 3, start, PARAM, VECTOR)
    v_ptr = _at(line_ptr, 4, start, PARAM, VECTOR)
    vmax_ptr = _at(line_ptr, 5, start, PARAM, VECTOR) if AMSGRAD else v_ptr
    ptrs = (f_ptr, r_ptr, p_ptr, m_ptr, v_ptr, vmax_ptr)

    a, b = _coefficients(coefficients_ptr, line_ptr, COMPUTE)
    sign = tl.load(numbers_ptr).to(COMPUTE)
    beta1 = tl.load(numbers_ptr + 1).to(COMPUTE)
    rest1 = tl.load(numbers_ptr + 2).to(COMPUTE)
    beta2 = tl.load(numbers_ptr + 3).to(COMPUTE)
    rest2 = tl.load(numbers_ptr + 4).to(COMPUTE)
    eps = tl.load(numbers_ptr + 5).to(COMPUTE)
    decay = tl.load(numbers_ptr + 6)
    if DECOUPLED:
        decay = 1.0 - tl.load(lr_ptr) * decay
    size_ptr = sizes_ptr + tl.load(line_ptr + TENSOR) * 2
    step_size = tl.load(size_ptr).to(COMPUTE)
    bias2_sqrt = tl.load(size_ptr + 1).to(COMPUTE)
    numbers = (sign * a, sign * b, beta1, rest1, beta2, rest2, eps, decay.to(COMPUTE), step_size, bias2_sqrt)

    lanes = tl.arange(0, BLOCK_SIZE)
    whole = count // BLOCK_SIZE * BLOCK_SIZE
    for i in range(0, whole, BLOCK_SIZE):
        _adam_block(ptrs, numbers, i + lanes, None, PARAM, FORGET, RETAIN, COMPUTE, AMSGRAD, DECOUPLED)
    if whole < count:
        offsets = whole + lanes
        _adam_block(ptrs, numbers, offsets, offsets < count, PARAM, FORGET, RETAIN, COMPUTE, AMSGRAD, DECOUPLED)


@triton.jit
def _sgd_block(
    ptrs,
    numbers,
    offsets,
    mask,
    PARAM: tl.constexpr,
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    COMPUTE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST_STEP: tl.constexpr,
):
    f_ptr, r_ptr, p_ptr, buffer_ptr = ptrs
    a, b, lr, decay, momentum, take = numbers
    param = _load(p_ptr, offsets, mask, COMPUTE)
    grad = _update(f_ptr, r_ptr, offsets, mask, a, b, COMPUTE, FORGET, RETAIN) + decay * param
    if MOMENTUM:
        # The first step starts the buffer with the gradient itself, undamped, and must not read what lies there.
        moved = grad if FIRST_STEP else momentum * _load(buffer_ptr, offsets, mask, COMPUTE) + take * grad
        tl.store(buffer_ptr + offsets, moved.to(PARAM), mask=mask)
        grad = grad + momentum * moved if NESTEROV else moved
    tl.store(p_ptr + offsets, (param - lr * grad).to(PARAM), mask=mask)


@triton.jit
def sgd_kernel(
    table_ptr,
    programs_ptr,
    coefficients_ptr,
    numbers_ptr,
    lr_ptr,
    found_inf_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The step of SGD on u, which stays in registers."""
    TENSORS: tl.constexpr = 4 if MOMENTUM else 3
    line_ptr, chunk, count = _chunk(table_ptr, programs_ptr, CHUNK_SIZE, TENSORS)
    count = _none_if_found(count, found_inf_ptr)
    start = chunk * CHUNK_SIZE
    f_ptr = _at(line_ptr, 0, start, GRAD, VECTOR)
    r_ptr = _at(line_ptr, 1, start, GRAD, VECTOR)
    p_ptr = _at(line_ptr, 2, start, PARAM, VECTOR)
    buffer_ptr = _at(line_ptr, 3, start, PARAM, VECTOR) if MOMENTUM else p_ptr
    ptrs = (f_ptr, r_ptr, p_ptr, buffer_ptr)

    a, b = _coefficients(coefficients_ptr, line_ptr, COMPUTE)
    sign = tl.load(numbers_ptr).to(COMPUTE)
    decay = tl.load(numbers_ptr + 1).to(COMPUTE)
    momentum = tl.load(numbers_ptr + 2).to(COMPUTE)
    take = tl.load(numbers_ptr + 3).to(COMPUTE)
    numbers = (sign * a, sign * b, tl.load(lr_ptr).to(COMPUTE), decay, momentum, take)

    lanes = tl.arange(0, BLOCK_SIZE)
    whole = count // BLOCK_SIZE * BLOCK_SIZE
    for i in range(0, whole, BLOCK_SIZE):
        _sgd_block(ptrs, numbers, i + lanes, None, PARAM, FORGET, RETAIN, COMPUTE, MOMENTUM, NESTEROV, FIRST_STEP)
    if whole < count:
        offsets = whole + lanes
        mask = offsets < count
        _sgd_block(ptrs, numbers, offsets, mask, PARAM, FORGET, RETAIN, COMPUTE, MOMENTUM, NESTEROV, FIRST_STEP)
