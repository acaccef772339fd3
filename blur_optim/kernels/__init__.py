"""Multi-tensor operations over lists of gradients; see :mod:`blur_optim.kernels.select` for their signatures."""

from blur_optim.kernels.select import BACKEND_VARIABLE, BACKENDS, Backend, FusedBackend, select_backend

__all__ = ["BACKENDS", "BACKEND_VARIABLE", "Backend", "FusedBackend", "select_backend"]
