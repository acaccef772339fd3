"""Device code of the ``triton`` backend. Importing it imports triton, so only ``launch.py`` does, and not before use.

A program handles one chunk of one tensor. What it needs to know stands in a *table* of int64: one line per tensor with
the columns of ``access.py``, then the addresses of the forget gradient, the retain gradient and the state. ``programs``
names the line of each program.

Addresses and offsets into a tensor are 64 bits wide, offsets into a chunk 32. All chunks but the last of a tensor are
whole: an unmasked loop, because a mask that is not known at compile time splits a 16-byte load into its elements, and a
masked block for the rest. For the same reason tensors whose addresses are multiples of 16 get a kernel that knows it.
"""

from typing import Any

import torch
import triton.language as tl

from blur_optim.kernels.triton.kernels.adam import adam_kernel, adam_step_sizes_kernel
from blur_optim.kernels.triton.kernels.blend import blend_kernel
from blur_optim.kernels.triton.kernels.compress import compress_kernel
from blur_optim.kernels.triton.kernels.dots import dots_kernel, sum_rows_kernel
from blur_optim.kernels.triton.kernels.metric import metric_blend_kernel, metric_dots_kernel
from blur_optim.kernels.triton.kernels.sgd import sgd_kernel

#: Elements that a program handles, and that are summed in the compute dtype before float64 takes over. Part of the
#: definition of the sums, like that of csrc/multi_tensor.h: it does not follow the device.
CHUNK_SIZE = 32768
#: Elements that advance together. 8 per thread: one 16-byte load of 16-bit values, two of float32; and 16 additions
#: into one running sum per chunk: longer runs over bfloat16 are biased, see kRun in csrc/cpu/dots.h.
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

__all__ = [
    "BLOCK_SIZE",
    "CHUNK_SIZE",
    "DTYPES",
    "OPTIONS",
    "adam_kernel",
    "adam_step_sizes_kernel",
    "blend_kernel",
    "compress_kernel",
    "dots_kernel",
    "metric_blend_kernel",
    "metric_dots_kernel",
    "sgd_kernel",
    "sum_rows_kernel",
]
