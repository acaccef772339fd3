"""Device code of the ``triton`` backend. Importing it imports triton, so only ``triton.py`` does, and not before use.

A program handles one chunk of one tensor. What it needs to know stands in a *table* of int64: one line per tensor with
the columns below, then the addresses of the forget gradient, the retain gradient and the state. ``programs`` names the
line of each program.

Addresses and offsets into a tensor are 64 bits wide, offsets into a chunk 32. All chunks but the last of a tensor are
whole: an unmasked loop, because a mask that is not known at compile time splits a 16-byte load into its elements, and a
masked block for the rest. For the same reason tensors whose addresses are multiples of 16 get a kernel that knows it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from blur_optim.kernels import blocks

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
    torch.int8: tl.int8,
}

# Elements of an int8 gradient that share a scale. Every chunk, and every block that advances, begins with one.
SCALED = tl.constexpr(blocks.BLOCK_SIZE)

# Columns of the table.
NUMEL = tl.constexpr(0)
ROW = tl.constexpr(1)
TENSOR = tl.constexpr(2)  # Its place in the caller's lists.
FIRST_PROGRAM = tl.constexpr(3)
FIRST_CHUNK = tl.constexpr(4)  # Over all launches of an operation.
SCALES_ADDRESS = tl.constexpr(5)  # 0 where the forget gradient is not int8.
ADDRESSES = tl.constexpr(6)


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
def _gradients_at(line_ptr, start, GRAD: tl.constexpr, STASH: tl.constexpr, VECTOR: tl.constexpr):
    f_ptr = _at(line_ptr, 0, start, STASH, VECTOR)
    r_ptr = _at(line_ptr, 1, start, GRAD, VECTOR)
    scales_ptr = tl.load(line_ptr + SCALES_ADDRESS).to(tl.pointer_type(tl.float32))
    return f_ptr, r_ptr, scales_ptr + start // SCALED


@triton.jit
def _load(ptr, first, count, COMPUTE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """BLOCK_SIZE elements, of which those from ``count`` on read as zero; all are there where it is None."""
    offsets = first + tl.arange(0, BLOCK_SIZE)
    x = tl.load(ptr + offsets) if count is None else tl.load(ptr + offsets, mask=offsets < count, other=0)
    return x.to(COMPUTE)


@triton.jit
def _store(ptr, first, count, x, BLOCK_SIZE: tl.constexpr):
    offsets = first + tl.arange(0, BLOCK_SIZE)
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=None if count is None else offsets < count)


@triton.jit
def _load_forget(gradients, first, count, COMPUTE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    f_ptr, _, scales_ptr = gradients
    f = _load(f_ptr, first, count, COMPUTE, BLOCK_SIZE)
    if f_ptr.dtype.element_ty == tl.int8:
        # Few enough for each thread to load those that it needs: elements stay with their threads.
        SCALES: tl.constexpr = BLOCK_SIZE // SCALED
        scales = _load(scales_ptr, first // SCALED, None if count is None else tl.cdiv(count, SCALED), COMPUTE, SCALES)
        f = tl.reshape(tl.reshape(f, [SCALES, SCALED]) * scales[:, None], [BLOCK_SIZE])
    return f


@triton.jit
def _load_retain(gradients, first, count, COMPUTE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    return _load(gradients[1], first, count, COMPUTE, BLOCK_SIZE)


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
        f = _load_forget(gradients, first, count, COMPUTE, BLOCK_SIZE)
        ff += f * f
    if RETAIN:
        r = _load_retain(gradients, first, count, COMPUTE, BLOCK_SIZE)
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
    line_ptr, chunk, count = _chunk(table_ptr, programs_ptr, CHUNK_SIZE, 2)
    gradients = _gradients_at(line_ptr, chunk * CHUNK_SIZE, GRAD, STASH, VECTOR)
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


# -- The metric of the retain loss -------------------------------------------------------------------------------------


@triton.jit
def _metric_numbers(metric_ptr, line_ptr, COMPUTE: tl.constexpr):
    """beta2, the weight of r^2, the inverse bias correction, damping, eps of this program's tensor."""
    ptr = metric_ptr + tl.load(line_ptr + TENSOR) * 5
    beta2 = tl.load(ptr).to(COMPUTE)
    rest2 = tl.load(ptr + 1).to(COMPUTE)
    correction = tl.load(ptr + 2).to(COMPUTE)
    damping = tl.load(ptr + 3).to(COMPUTE)
    return beta2, rest2, correction, damping, tl.load(ptr + 4).to(COMPUTE)


@triton.jit
def _retain_moment(
    v_ptr,
    gradients,
    metric,
    first,
    count,
    RETAIN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The second moment of the retain gradient that this step makes."""
    beta2, rest2, _, _, _ = metric
    v = beta2 * _load(v_ptr, first, count, COMPUTE, BLOCK_SIZE)
    if RETAIN:
        r = _load_retain(gradients, first, count, COMPUTE, BLOCK_SIZE)
        v = v + rest2 * (r * r)
    return v


@triton.jit
def _metric_denominator(second, metric):
    _, _, correction, damping, eps = metric
    return _sqrt(second * correction + damping) + eps


@triton.jit
def _add_metric_dots(
    sums,
    gradients,
    state,
    metric,
    first,
    count,
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    AMSGRAD: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    rf, ff, rr, rpf, fpf, rpr, pf2, pf4, total = sums
    v_ptr, vmax_ptr = state
    second = _retain_moment(v_ptr, gradients, metric, first, count, RETAIN, COMPUTE, BLOCK_SIZE)
    if AMSGRAD:
        seen = _load(vmax_ptr, first, count, COMPUTE, BLOCK_SIZE)
        second = tl.where(seen < second, second, seen)
    total += second * metric[2]
    denominator = _metric_denominator(second, metric)
    inverse = _divide(tl.full([BLOCK_SIZE], 1.0, COMPUTE), denominator)
    if FORGET:
        f = _load_forget(gradients, first, count, COMPUTE, BLOCK_SIZE)
        pf = inverse * f
        ff += f * f
        fpf += f * pf
        pf2 += pf * pf
        pf4 += (pf * pf) * (pf * pf)
    if RETAIN:
        r = _load_retain(gradients, first, count, COMPUTE, BLOCK_SIZE)
        rr += r * r
        rpr += r * (inverse * r)
    if FORGET and RETAIN:
        rf += r * f
        rpf += r * pf
    return rf, ff, rr, rpf, fpf, rpr, pf2, pf4, total


@triton.jit
def metric_dots_kernel(
    table_ptr,
    programs_ptr,
    partials_ptr,
    metric_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STASH: tl.constexpr,
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Write the nine sums of ``multi_tensor_metric_dots`` of each chunk to ``partials`` [chunks, 9], float64."""
    TENSORS: tl.constexpr = 4 if AMSGRAD else 3
    line_ptr, chunk, count = _chunk(table_ptr, programs_ptr, CHUNK_SIZE, TENSORS)
    start = chunk * CHUNK_SIZE
    gradients = _gradients_at(line_ptr, start, GRAD, STASH, VECTOR)
    v_ptr = _at(line_ptr, 2, start, PARAM, VECTOR)
    vmax_ptr = _at(line_ptr, 3, start, PARAM, VECTOR) if AMSGRAD else v_ptr
    state = (v_ptr, vmax_ptr)
    metric = _metric_numbers(metric_ptr, line_ptr, COMPUTE)
    index = (tl.load(line_ptr + FIRST_CHUNK) + chunk).to(tl.int32)
    rf = tl.zeros([BLOCK_SIZE], COMPUTE)
    ff = tl.zeros([BLOCK_SIZE], COMPUTE)
    rr = tl.zeros([BLOCK_SIZE], COMPUTE)
    rpf = tl.zeros([BLOCK_SIZE], COMPUTE)
    fpf = tl.zeros([BLOCK_SIZE], COMPUTE)
    rpr = tl.zeros([BLOCK_SIZE], COMPUTE)
    pf2 = tl.zeros([BLOCK_SIZE], COMPUTE)
    pf4 = tl.zeros([BLOCK_SIZE], COMPUTE)
    total = tl.zeros([BLOCK_SIZE], COMPUTE)
    whole = count // BLOCK_SIZE * BLOCK_SIZE
    for i in range(0, whole, BLOCK_SIZE):
        sums = (rf, ff, rr, rpf, fpf, rpr, pf2, pf4, total)
        rf, ff, rr, rpf, fpf, rpr, pf2, pf4, total = _add_metric_dots(
            sums, gradients, state, metric, i, None, FORGET, RETAIN, AMSGRAD, COMPUTE, BLOCK_SIZE
        )
    if whole < count:
        sums = (rf, ff, rr, rpf, fpf, rpr, pf2, pf4, total)
        rf, ff, rr, rpf, fpf, rpr, pf2, pf4, total = _add_metric_dots(
            sums, gradients, state, metric, whole, count, FORGET, RETAIN, AMSGRAD, COMPUTE, BLOCK_SIZE
        )
    out_ptr = partials_ptr + index.to(tl.int64) * 9
    tl.store(out_ptr, tl.sum(rf.to(tl.float64), axis=0))
    tl.store(out_ptr + 1, tl.sum(ff.to(tl.float64), axis=0))
    tl.store(out_ptr + 2, tl.sum(rr.to(tl.float64), axis=0))
    tl.store(out_ptr + 3, tl.sum(rpf.to(tl.float64), axis=0))
    tl.store(out_ptr + 4, tl.sum(fpf.to(tl.float64), axis=0))
    tl.store(out_ptr + 5, tl.sum(rpr.to(tl.float64), axis=0))
    tl.store(out_ptr + 6, tl.sum(pf2.to(tl.float64), axis=0))
    tl.store(out_ptr + 7, tl.sum(pf4.to(tl.float64), axis=0))
    tl.store(out_ptr + 8, tl.sum(total.to(tl.float64), axis=0))


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


# -- Compression -------------------------------------------------------------------------------------------------------


@triton.jit
def _compress(gradients, first, count, BLOCK_SIZE: tl.constexpr):
    """Write a block of the retain gradient, compressed, to where the forget gradient of a pair would be."""
    f_ptr, r_ptr, scales_ptr = gradients
    x = _load(r_ptr, first, count, tl.float32, BLOCK_SIZE)
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
    _store(f_ptr, first, count, x, BLOCK_SIZE)


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
    """Compress gradients: the scales that :func:`_load_forget` reads are written here."""
    line_ptr, chunk, count = _chunk(table_ptr, programs_ptr, CHUNK_SIZE, 2)
    gradients = _gradients_at(line_ptr, chunk * CHUNK_SIZE, GRAD, STASH, VECTOR)
    whole = count // BLOCK_SIZE * BLOCK_SIZE
    for i in range(0, whole, BLOCK_SIZE):
        _compress(gradients, i, None, BLOCK_SIZE)
    if whole < count:
        _compress(gradients, whole, count, BLOCK_SIZE)


# -- The update u = a f + b r ------------------------------------------------------------------------------------------


@triton.jit
def _coefficients(coefficients_ptr, line_ptr, COMPUTE: tl.constexpr):
    ptr = coefficients_ptr + tl.load(line_ptr + ROW) * 2
    return tl.load(ptr).to(COMPUTE), tl.load(ptr + 1).to(COMPUTE)


@triton.jit
def _update(
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
        af = a * _load_forget(gradients, first, count, COMPUTE, BLOCK_SIZE)
        return b * _load_retain(gradients, first, count, COMPUTE, BLOCK_SIZE) + af
    elif FORGET:
        return a * _load_forget(gradients, first, count, COMPUTE, BLOCK_SIZE)
    else:
        return b * _load_retain(gradients, first, count, COMPUTE, BLOCK_SIZE)


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
    line_ptr, chunk, count = _chunk(table_ptr, programs_ptr, CHUNK_SIZE, 2)
    gradients = _gradients_at(line_ptr, chunk * CHUNK_SIZE, GRAD, STASH, VECTOR)
    a, b = _coefficients(coefficients_ptr, line_ptr, COMPUTE)
    out_ptr = gradients[1] if RETAIN else gradients[0]
    whole = count // BLOCK_SIZE * BLOCK_SIZE
    for i in range(0, whole, BLOCK_SIZE):
        u = _update(gradients, i, None, a, b, FORGET, RETAIN, COMPUTE, BLOCK_SIZE)
        _store(out_ptr, i, None, u, BLOCK_SIZE)
    if whole < count:
        u = _update(gradients, whole, count, a, b, FORGET, RETAIN, COMPUTE, BLOCK_SIZE)
        _store(out_ptr, whole, count, u, BLOCK_SIZE)


@triton.jit
def _metric_blend_block(
    gradients,
    v_ptr,
    out_ptr,
    metric,
    first,
    count,
    found,
    a,
    b,
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    moment = _retain_moment(v_ptr, gradients, metric, first, count, RETAIN, COMPUTE, BLOCK_SIZE)
    u = _update(gradients, first, count, a, b, FORGET, RETAIN, COMPUTE, BLOCK_SIZE)
    if found is not None:
        moment = tl.where(found, _load(v_ptr, first, count, COMPUTE, BLOCK_SIZE), moment)
    _store(v_ptr, first, count, moment, BLOCK_SIZE)
    _store(out_ptr, first, count, u, BLOCK_SIZE)


@triton.jit
def metric_blend_kernel(
    table_ptr,
    programs_ptr,
    coefficients_ptr,
    metric_ptr,
    found_inf_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STASH: tl.constexpr,
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """As the blend, and v <- the second moment of r, unless something was found."""
    line_ptr, chunk, count = _chunk(table_ptr, programs_ptr, CHUNK_SIZE, 3)
    start = chunk * CHUNK_SIZE
    gradients = _gradients_at(line_ptr, start, GRAD, STASH, VECTOR)
    v_ptr = _at(line_ptr, 2, start, PARAM, VECTOR)
    a, b = _coefficients(coefficients_ptr, line_ptr, COMPUTE)
    metric = _metric_numbers(metric_ptr, line_ptr, COMPUTE)
    found = None if found_inf_ptr is None else tl.load(found_inf_ptr) != 0
    out_ptr = gradients[1] if RETAIN else gradients[0]
    whole = count // BLOCK_SIZE * BLOCK_SIZE
    for i in range(0, whole, BLOCK_SIZE):
        _metric_blend_block(
            gradients, v_ptr, out_ptr, metric, i, None, found, a, b, FORGET, RETAIN, COMPUTE, BLOCK_SIZE
        )
    if whole < count:
        _metric_blend_block(
            gradients, v_ptr, out_ptr, metric, whole, count, found, a, b, FORGET, RETAIN, COMPUTE, BLOCK_SIZE
        )


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
    gradients,
    state,
    numbers,
    metric,
    first,
    count,
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DECOUPLED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    p_ptr, m_ptr, v_ptr, vmax_ptr = state
    a, b, beta1, rest1, beta2, rest2, eps, decay, step_size, bias2_sqrt = numbers
    grad = _update(gradients, first, count, a, b, FORGET, RETAIN, COMPUTE, BLOCK_SIZE)
    param = _load(p_ptr, first, count, COMPUTE, BLOCK_SIZE)
    if DECOUPLED:
        param = param * decay
    else:
        grad = grad + decay * param
    m = beta1 * _load(m_ptr, first, count, COMPUTE, BLOCK_SIZE) + rest1 * grad
    if metric is None:
        v = beta2 * _load(v_ptr, first, count, COMPUTE, BLOCK_SIZE) + rest2 * grad * grad
    else:
        v = _retain_moment(v_ptr, gradients, metric, first, count, RETAIN, COMPUTE, BLOCK_SIZE)
    _store(m_ptr, first, count, m, BLOCK_SIZE)
    _store(v_ptr, first, count, v, BLOCK_SIZE)
    if AMSGRAD:
        seen = _load(vmax_ptr, first, count, COMPUTE, BLOCK_SIZE)
        v = tl.where(seen < v, v, seen)
        _store(vmax_ptr, first, count, v, BLOCK_SIZE)
    denominator = _divide(_sqrt(v), bias2_sqrt) + eps if metric is None else _metric_denominator(v, metric)
    param = param - _divide(step_size * m, denominator)
    _store(p_ptr, first, count, param, BLOCK_SIZE)


@triton.jit
def adam_kernel(
    table_ptr,
    programs_ptr,
    coefficients_ptr,
    numbers_ptr,
    sizes_ptr,
    lr_ptr,
    found_inf_ptr,
    metric_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STASH: tl.constexpr,
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DECOUPLED: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The step of Adam or AdamW (DECOUPLED) on u, which stays in registers; in the metric where there is one."""
    TENSORS: tl.constexpr = 6 if AMSGRAD else 5
    line_ptr, chunk, count = _chunk(table_ptr, programs_ptr, CHUNK_SIZE, TENSORS)
    count = _none_if_found(count, found_inf_ptr)
    start = chunk * CHUNK_SIZE
    gradients = _gradients_at(line_ptr, start, GRAD, STASH, VECTOR)
    p_ptr = _at(line_ptr, 2, start, PARAM, VECTOR)
    m_ptr = _at(line_ptr, 3, start, PARAM, VECTOR)
    v_ptr = _at(line_ptr, 4, start, PARAM, VECTOR)
    vmax_ptr = _at(line_ptr, 5, start, PARAM, VECTOR) if AMSGRAD else v_ptr
    state = (p_ptr, m_ptr, v_ptr, vmax_ptr)

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
    metric = None if metric_ptr is None else _metric_numbers(metric_ptr, line_ptr, COMPUTE)

    whole = count // BLOCK_SIZE * BLOCK_SIZE
    for i in range(0, whole, BLOCK_SIZE):
        _adam_block(gradients, state, numbers, metric, i, None, FORGET, RETAIN, AMSGRAD, DECOUPLED, COMPUTE, BLOCK_SIZE)
    if whole < count:
        _adam_block(
            gradients, state, numbers, metric, whole, count, FORGET, RETAIN, AMSGRAD, DECOUPLED, COMPUTE, BLOCK_SIZE
        )


@triton.jit
def _sgd_block(
    gradients,
    state,
    numbers,
    metric,
    first,
    count,
    FORGET: tl.constexpr,
    RETAIN: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    p_ptr, buffer_ptr, v_ptr = state
    a, b, lr, decay, momentum, take = numbers
    param = _load(p_ptr, first, count, COMPUTE, BLOCK_SIZE)
    grad = _update(gradients, first, count, a, b, FORGET, RETAIN, COMPUTE, BLOCK_SIZE) + decay * param
    if MOMENTUM:
        # The first step starts the buffer with the gradient itself, undamped, and must not read what lies there.
        moved = grad
        if not FIRST_STEP:
            moved = momentum * _load(buffer_ptr, first, count, COMPUTE, BLOCK_SIZE) + take * grad
        _store(buffer_ptr, first, count, moved, BLOCK_SIZE)
        grad = grad + momentum * moved if NESTEROV else moved
    if metric is not None:
        v = _retain_moment(v_ptr, gradients, metric, first, count, RETAIN, COMPUTE, BLOCK_SIZE)
        _store(v_ptr, first, count, v, BLOCK_SIZE)
        grad = _divide(grad, _metric_denominator(v, metric))
    _store(p_ptr, first, count, param - lr * grad, BLOCK_SIZE)


@triton.jit
def sgd_kernel(
    table_ptr,
    programs_ptr,
    coefficients_ptr,
    numbers_ptr,
    lr_ptr,
    found_inf_ptr,
    metric_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STASH: tl.constexpr,
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
    """The step of SGD on u, which stays in registers; in the metric where there is one."""
    OWN: tl.constexpr = 4 if MOMENTUM else 3
    TENSORS: tl.constexpr = OWN if metric_ptr is None else OWN + 1
    line_ptr, chunk, count = _chunk(table_ptr, programs_ptr, CHUNK_SIZE, TENSORS)
    count = _none_if_found(count, found_inf_ptr)
    start = chunk * CHUNK_SIZE
    gradients = _gradients_at(line_ptr, start, GRAD, STASH, VECTOR)
    p_ptr = _at(line_ptr, 2, start, PARAM, VECTOR)
    buffer_ptr = _at(line_ptr, 3, start, PARAM, VECTOR) if MOMENTUM else p_ptr
    v_ptr = p_ptr if metric_ptr is None else _at(line_ptr, OWN, start, PARAM, VECTOR)
    state = (p_ptr, buffer_ptr, v_ptr)
    metric = None if metric_ptr is None else _metric_numbers(metric_ptr, line_ptr, COMPUTE)

    a, b = _coefficients(coefficients_ptr, line_ptr, COMPUTE)
    sign = tl.load(numbers_ptr).to(COMPUTE)
    decay = tl.load(numbers_ptr + 1).to(COMPUTE)
    momentum = tl.load(numbers_ptr + 2).to(COMPUTE)
    take = tl.load(numbers_ptr + 3).to(COMPUTE)
    numbers = (sign * a, sign * b, tl.load(lr_ptr).to(COMPUTE), decay, momentum, take)

    # Each flag by itself: Triton 3.6, which torch 2.10 and 2.11 bring, does not compile a call with starred arguments.
    whole = count // BLOCK_SIZE * BLOCK_SIZE
    for i in range(0, whole, BLOCK_SIZE):
        _sgd_block(
            gradients,
            state,
            numbers,
            metric,
            i,
            None,
            FORGET,
            RETAIN,
            MOMENTUM,
            NESTEROV,
            FIRST_STEP,
            COMPUTE,
            BLOCK_SIZE,
        )
    if whole < count:
        _sgd_block(
            gradients, state, numbers, metric, whole, count,
            FORGET, RETAIN, MOMENTUM, NESTEROV, FIRST_STEP, COMPUTE, BLOCK_SIZE,
        )  # fmt: skip
