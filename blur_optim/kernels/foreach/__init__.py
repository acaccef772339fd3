"""The backend that is always there: PyTorch's own operators over slices that fit the cache.

Sums are float32 within chunks of fixed size and float64 across chunks. The chunk, not the thread, decides the order
of every addition, so the result has the same bits on any number of threads.
"""

from blur_optim.kernels.foreach.gradients import multi_tensor_blend_, multi_tensor_compress_, multi_tensor_dots
from blur_optim.kernels.foreach.metric import (
    metric_adamw_,
    metric_sgd_,
    multi_tensor_metric_blend_,
    multi_tensor_metric_dots,
)
from blur_optim.kernels.foreach.slabs import CHUNK_SIZE, CPU_SLAB_SIZE, DEVICE_SLAB_SIZE

__all__ = [
    "CHUNK_SIZE",
    "CPU_SLAB_SIZE",
    "DEVICE_SLAB_SIZE",
    "metric_adamw_",
    "metric_sgd_",
    "multi_tensor_blend_",
    "multi_tensor_compress_",
    "multi_tensor_dots",
    "multi_tensor_metric_blend_",
    "multi_tensor_metric_dots",
]
