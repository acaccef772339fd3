"""The metric of the retain loss: the dots in it, and the blend that advances its second moments."""

import triton
import triton.language as tl

from blur_optim.kernels.triton.kernels.access import (
    FIRST_CHUNK,
    TENSOR,
    chunk_of,
    divide,
    gradients_at,
    load,
    load_forget,
    load_retain,
    square_root,
    store,
    tensor_at,
)
from blur_optim.kernels.triton.kernels.blend import coefficients_of, update


@triton.jit
def metric_numbers(metric_ptr, line_ptr, COMPUTE: tl.constexpr):
    """beta2, the weight of r^2, the inverse bias correction, damping, eps of this program's tensor."""
    ptr = metric_ptr + tl.load(line_ptr + TENSOR) * 5
    beta2 = tl.load(ptr).to(COMPUTE)
    rest2 = tl.load(ptr + 1).to(COMPUTE)
    correction = tl.load(ptr + 2).to(COMPUTE)
    damping = tl.load(ptr + 3).to(COMPUTE)
    return beta2, rest2, correction, damping, tl.load(ptr + 4).to(COMPUTE)


@triton.jit
def retain_moment(
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
    v = beta2 * load(v_ptr, first, count, COMPUTE, BLOCK_SIZE)
    if RETAIN:
        r = load_retain(gradients, first, count, COMPUTE, BLOCK_SIZE)
        v = v + rest2 * (r * r)
    return v


@triton.jit
def metric_denominator(second, metric):
    _, _, correction, damping, eps = metric
    return square_root(second * correction + damping) + eps


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
    second = retain_moment(v_ptr, gradients, metric, first, count, RETAIN, COMPUTE, BLOCK_SIZE)
    if AMSGRAD:
        seen = load(vmax_ptr, first, count, COMPUTE, BLOCK_SIZE)
        second = tl.where(seen < second, second, seen)
    total += second * metric[2]
    denominator = metric_denominator(second, metric)
    inverse = divide(tl.full([BLOCK_SIZE], 1.0, COMPUTE), denominator)
    if FORGET:
        f = load_forget(gradients, first, count, COMPUTE, BLOCK_SIZE)
        pf = inverse * f
        ff += f * f
        fpf += f * pf
        pf2 += pf * pf
        pf4 += (pf * pf) * (pf * pf)
    if RETAIN:
        r = load_retain(gradients, first, count, COMPUTE, BLOCK_SIZE)
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
    line_ptr, chunk, count = chunk_of(table_ptr, programs_ptr, CHUNK_SIZE, TENSORS)
    start = chunk * CHUNK_SIZE
    gradients = gradients_at(line_ptr, start, GRAD, STASH, VECTOR)
    v_ptr = tensor_at(line_ptr, 2, start, PARAM, VECTOR)
    vmax_ptr = tensor_at(line_ptr, 3, start, PARAM, VECTOR) if AMSGRAD else v_ptr
    state = (v_ptr, vmax_ptr)
    metric = metric_numbers(metric_ptr, line_ptr, COMPUTE)
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
    moment = retain_moment(v_ptr, gradients, metric, first, count, RETAIN, COMPUTE, BLOCK_SIZE)
    u = update(gradients, first, count, a, b, FORGET, RETAIN, COMPUTE, BLOCK_SIZE)
    if found is not None:
        moment = tl.where(found, load(v_ptr, first, count, COMPUTE, BLOCK_SIZE), moment)
    store(v_ptr, first, count, moment, BLOCK_SIZE)
    store(out_ptr, first, count, u, BLOCK_SIZE)


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
    line_ptr, chunk, count = chunk_of(table_ptr, programs_ptr, CHUNK_SIZE, 3)
    start = chunk * CHUNK_SIZE
    gradients = gradients_at(line_ptr, start, GRAD, STASH, VECTOR)
    v_ptr = tensor_at(line_ptr, 2, start, PARAM, VECTOR)
    a, b = coefficients_of(coefficients_ptr, line_ptr, COMPUTE)
    metric = metric_numbers(metric_ptr, line_ptr, COMPUTE)
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
