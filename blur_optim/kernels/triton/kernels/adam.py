"""The step of Adam and AdamW on u, in the metric or not."""

import triton
import triton.language as tl

from blur_optim.kernels.triton.kernels.access import (
    TENSOR,
    chunk_of,
    divide,
    gradients_at,
    load,
    none_if_found,
    square_root,
    store,
    tensor_at,
)
from blur_optim.kernels.triton.kernels.blend import coefficients_of, update
from blur_optim.kernels.triton.kernels.metric import metric_denominator, metric_numbers, retain_moment


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
def _adam_numbers(
    coefficients_ptr, numbers_ptr, sizes_ptr, lr_ptr, line_ptr, DECOUPLED: tl.constexpr, COMPUTE: tl.constexpr
):
    a, b = coefficients_of(coefficients_ptr, line_ptr, COMPUTE)
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
    return sign * a, sign * b, beta1, rest1, beta2, rest2, eps, decay.to(COMPUTE), step_size, bias2_sqrt


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
    grad = update(gradients, first, count, a, b, FORGET, RETAIN, COMPUTE, BLOCK_SIZE)
    param = load(p_ptr, first, count, COMPUTE, BLOCK_SIZE)
    if DECOUPLED:
        param = param * decay
    else:
        grad = grad + decay * param
    m = beta1 * load(m_ptr, first, count, COMPUTE, BLOCK_SIZE) + rest1 * grad
    if metric is None:
        v = beta2 * load(v_ptr, first, count, COMPUTE, BLOCK_SIZE) + rest2 * grad * grad
    else:
        v = retain_moment(v_ptr, gradients, metric, first, count, RETAIN, COMPUTE, BLOCK_SIZE)
    store(m_ptr, first, count, m, BLOCK_SIZE)
    store(v_ptr, first, count, v, BLOCK_SIZE)
    if AMSGRAD:
        seen = load(vmax_ptr, first, count, COMPUTE, BLOCK_SIZE)
        v = tl.where(seen < v, v, seen)
        store(vmax_ptr, first, count, v, BLOCK_SIZE)
    denominator = divide(square_root(v), bias2_sqrt) + eps if metric is None else metric_denominator(v, metric)
    param = param - divide(step_size * m, denominator)
    store(p_ptr, first, count, param, BLOCK_SIZE)


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
    line_ptr, chunk, count = chunk_of(table_ptr, programs_ptr, CHUNK_SIZE, TENSORS)
    count = none_if_found(count, found_inf_ptr)
    start = chunk * CHUNK_SIZE
    gradients = gradients_at(line_ptr, start, GRAD, STASH, VECTOR)
    p_ptr = tensor_at(line_ptr, 2, start, PARAM, VECTOR)
    m_ptr = tensor_at(line_ptr, 3, start, PARAM, VECTOR)
    v_ptr = tensor_at(line_ptr, 4, start, PARAM, VECTOR)
    vmax_ptr = tensor_at(line_ptr, 5, start, PARAM, VECTOR) if AMSGRAD else v_ptr
    state = (p_ptr, m_ptr, v_ptr, vmax_ptr)

    numbers = _adam_numbers(coefficients_ptr, numbers_ptr, sizes_ptr, lr_ptr, line_ptr, DECOUPLED, COMPUTE)
    metric = None if metric_ptr is None else metric_numbers(metric_ptr, line_ptr, COMPUTE)

    whole = count // BLOCK_SIZE * BLOCK_SIZE
    for i in range(0, whole, BLOCK_SIZE):
        _adam_block(gradients, state, numbers, metric, i, None, FORGET, RETAIN, AMSGRAD, DECOUPLED, COMPUTE, BLOCK_SIZE)
    if whole < count:
        _adam_block(
            gradients, state, numbers, metric, whole, count, FORGET, RETAIN, AMSGRAD, DECOUPLED, COMPUTE, BLOCK_SIZE
        )
