"""The step of SGD on u, in the metric or not."""

import triton
import triton.language as tl

from blur_optim.kernels.triton.kernels.access import (
    chunk_of,
    divide,
    gradients_at,
    load,
    none_if_found,
    store,
    tensor_at,
)
from blur_optim.kernels.triton.kernels.blend import coefficients_of, update
from blur_optim.kernels.triton.kernels.metric import metric_denominator, metric_numbers, retain_moment


@triton.jit
def _sgd_numbers(coefficients_ptr, numbers_ptr, lr_ptr, line_ptr, COMPUTE: tl.constexpr):
    a, b = coefficients_of(coefficients_ptr, line_ptr, COMPUTE)
    sign = tl.load(numbers_ptr).to(COMPUTE)
    decay = tl.load(numbers_ptr + 1).to(COMPUTE)
    momentum = tl.load(numbers_ptr + 2).to(COMPUTE)
    take = tl.load(numbers_ptr + 3).to(COMPUTE)
    return sign * a, sign * b, tl.load(lr_ptr).to(COMPUTE), decay, momentum, take


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
    param = load(p_ptr, first, count, COMPUTE, BLOCK_SIZE)
    grad = update(gradients, first, count, a, b, FORGET, RETAIN, COMPUTE, BLOCK_SIZE) + decay * param
    v = None
    if metric is not None:  # Before anything is stored: the retain gradient is loaded once.
        v = retain_moment(v_ptr, gradients, metric, first, count, RETAIN, COMPUTE, BLOCK_SIZE)
    if MOMENTUM:
        # The first step starts the buffer with the gradient itself, undamped, and must not read what lies there.
        moved = grad
        if not FIRST_STEP:
            moved = momentum * load(buffer_ptr, first, count, COMPUTE, BLOCK_SIZE) + take * grad
        store(buffer_ptr, first, count, moved, BLOCK_SIZE)
        grad = grad + momentum * moved if NESTEROV else moved
    if metric is not None:
        store(v_ptr, first, count, v, BLOCK_SIZE)
        grad = divide(grad, metric_denominator(v, metric))
    store(p_ptr, first, count, param - lr * grad, BLOCK_SIZE)


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
    line_ptr, chunk, count = chunk_of(table_ptr, programs_ptr, CHUNK_SIZE, TENSORS)
    count = none_if_found(count, found_inf_ptr)
    start = chunk * CHUNK_SIZE
    gradients = gradients_at(line_ptr, start, GRAD, STASH, VECTOR)
    p_ptr = tensor_at(line_ptr, 2, start, PARAM, VECTOR)
    buffer_ptr = tensor_at(line_ptr, 3, start, PARAM, VECTOR) if MOMENTUM else p_ptr
    v_ptr = p_ptr if metric_ptr is None else tensor_at(line_ptr, OWN, start, PARAM, VECTOR)
    state = (p_ptr, buffer_ptr, v_ptr)
    metric = None if metric_ptr is None else metric_numbers(metric_ptr, line_ptr, COMPUTE)
    numbers = _sgd_numbers(coefficients_ptr, numbers_ptr, lr_ptr, line_ptr, COMPUTE)
    # Each flag by itself: Triton 3.6, which torch 2.10 and 2.11 bring, does not compile a call with starred arguments.
    whole = count // BLOCK_SIZE * BLOCK_SIZE
    for i in range(0, whole, BLOCK_SIZE):
        _sgd_block(
            gradients, state, numbers, metric, i, None,
            FORGET, RETAIN, MOMENTUM, NESTEROV, FIRST_STEP, COMPUTE, BLOCK_SIZE,
        )  # fmt: skip
    if whole < count:
        _sgd_block(
            gradients, state, numbers, metric, whole, count,
            FORGET, RETAIN, MOMENTUM, NESTEROV, FIRST_STEP, COMPUTE, BLOCK_SIZE,
        )  # fmt: skip
