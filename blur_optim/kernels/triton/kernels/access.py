"""How a program finds its chunk of one tensor, reads it and writes it: see the package's docstring."""

import triton
import triton.language as tl

from blur_optim.kernels import blocks

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
def chunk_of(table_ptr, programs_ptr, CHUNK_SIZE: tl.constexpr, TENSORS: tl.constexpr):
    """The line of this program's tensor, and its chunk: index in the tensor and number of elements."""
    program = tl.program_id(0)
    line_ptr = table_ptr + tl.load(programs_ptr + program) * (ADDRESSES + TENSORS)
    chunk = program - tl.load(line_ptr + FIRST_PROGRAM)
    count = tl.minimum(tl.load(line_ptr + NUMEL) - chunk * CHUNK_SIZE, CHUNK_SIZE).to(tl.int32)
    return line_ptr, chunk, count


@triton.jit
def tensor_at(line_ptr, TENSOR: tl.constexpr, start, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """The address of the chunk in a tensor, with the promise that VECTOR elements can be accessed together."""
    ptr = tl.load(line_ptr + ADDRESSES + TENSOR).to(tl.pointer_type(DTYPE)) + start
    return tl.multiple_of(ptr, VECTOR * (ptr.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit
def gradients_at(line_ptr, start, GRAD: tl.constexpr, STASH: tl.constexpr, VECTOR: tl.constexpr):
    f_ptr = tensor_at(line_ptr, 0, start, STASH, VECTOR)
    r_ptr = tensor_at(line_ptr, 1, start, GRAD, VECTOR)
    scales_ptr = tl.load(line_ptr + SCALES_ADDRESS).to(tl.pointer_type(tl.float32))
    return f_ptr, r_ptr, scales_ptr + start // SCALED


@triton.jit
def load(ptr, first, count, COMPUTE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """BLOCK_SIZE elements, of which those from ``count`` on read as zero; all are there where it is None."""
    offsets = first + tl.arange(0, BLOCK_SIZE)
    x = tl.load(ptr + offsets) if count is None else tl.load(ptr + offsets, mask=offsets < count, other=0)
    return x.to(COMPUTE)


@triton.jit
def store(ptr, first, count, x, BLOCK_SIZE: tl.constexpr):
    offsets = first + tl.arange(0, BLOCK_SIZE)
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=None if count is None else offsets < count)


@triton.jit
def load_forget(gradients, first, count, COMPUTE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    f_ptr, _, scales_ptr = gradients
    f = load(f_ptr, first, count, COMPUTE, BLOCK_SIZE)
    if f_ptr.dtype.element_ty == tl.int8:
        # Few enough for each thread to load those that it needs: elements stay with their threads.
        SCALES: tl.constexpr = BLOCK_SIZE // SCALED
        scales = load(scales_ptr, first // SCALED, None if count is None else tl.cdiv(count, SCALED), COMPUTE, SCALES)
        f = tl.reshape(tl.reshape(f, [SCALES, SCALED]) * scales[:, None], [BLOCK_SIZE])
    return f


@triton.jit
def load_retain(gradients, first, count, COMPUTE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    return load(gradients[1], first, count, COMPUTE, BLOCK_SIZE)


@triton.jit
def divide(x, y):
    """Rounded as IEEE says; Triton's ``/`` is an approximation in float32."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def square_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def none_if_found(count, found_inf_ptr):
    """No elements where the step is to be skipped."""
    if found_inf_ptr is None:
        return count
    else:
        return tl.where(tl.load(found_inf_ptr) == 0, count, 0)
