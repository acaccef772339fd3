"""Whether a CUDA graph is being recorded."""

import torch


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph instead of computing.

    What is kept from step to step must then neither be read nor be made: a replay reads the memory that the capture
    saw, and only tensors of the graph's own pool live as long as the graph.
    """
    return bool(torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())  # type: ignore[no-untyped-call]
