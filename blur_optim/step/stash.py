"""Where the forget gradients wait while the retain gradients are computed."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from blur_optim.kernels.blocks import dequantize, quantize
from blur_optim.kernels.layout import is_dense
from blur_optim.parallel.ranks import is_dtensor, like, to_local


class Stashed(NamedTuple):
    """A forget gradient that waits.

    Args:
        values: of the gradient's shape; local and real where it is compressed.
        scales: of the blocks of ``values``, where those are int8; see :mod:`blur_optim.kernels.blocks`.
        dtype: the gradient's own.
    """

    values: Tensor
    scales: Tensor | None
    dtype: torch.dtype

    def restore(self, param: Tensor) -> Tensor:
        """The gradient as ``param.grad`` would hold it: a new tensor where it is compressed or elsewhere."""
        if self.values.device != param.device:
            return like(self.values.to(param.device, non_blocking=True), param)
        if self.values.dtype == self.dtype:
            return self.values
        real = torch.float64 if self.dtype == torch.complex128 else torch.float32
        dtype = real if self.dtype.is_complex else self.dtype
        values = self.values.to(dtype) if self.scales is None else dequantize(self.values, self.scales, dtype)
        return like(torch.view_as_complex(values) if self.dtype.is_complex else values, param)


class Stash:
    """Keep the forget gradients by reference: the tensors move out of ``p.grad``, nothing is copied.

    A gradient that is a window into a larger buffer is copied after all, for its owner writes the next gradient to the
    same place: DistributedDataParallel(gradient_as_bucket_view=True) does, from its second step on. A copy that
    was not needed costs one read and one write; a missing one would replace g_f by g_r without a sign.

    Cost: one gradient set.
    """

    def __init__(self) -> None:
        self._waiting: dict[Tensor, Stashed] = {}

    def take(self, params: Iterable[Tensor]) -> None:
        """Move the gradient of each of ``params`` here and leave ``p.grad = None``, one after another."""
        for p in params:
            if p.grad is not None:
                self._waiting[p] = self._keep(p, p.grad)
                p.grad = None

    def settle(self) -> None:
        """Let what is read from here on wait for copies that are under way; the host does not."""

    def get(self, param: Tensor) -> Stashed | None:
        """The gradient of ``param``, or None where the forget phase left none."""
        return self._waiting.get(param)

    def pop(self, param: Tensor) -> Stashed | None:
        """Hand out the gradient of ``param``, which is then no longer here."""
        return self._waiting.pop(param, None)

    def clear(self) -> None:
        self._waiting.clear()

    def __len__(self) -> int:
        return len(self._waiting)

    def _keep(self, param: Tensor, grad: Tensor) -> Stashed:
        # FSDP2 hands out views of one buffer for a whole group, and keeps none.
        shared = not is_dtensor(grad) and _shares_storage(grad)
        return Stashed(grad.clone() if shared else grad, None, grad.dtype)


class BFloat16Stash(Stash):
    """Keep float32 and float64 gradients in bfloat16, others by reference.

    The coefficients are those of the rounded gradient, and the update projects on it: an error of 2^-9 of an element at
    most. Cost: half a set of float32 gradients.
    """

    def _keep(self, param: Tensor, grad: Tensor) -> Stashed:
        if grad.dtype.itemsize <= 2:
            return super()._keep(param, grad)
        return Stashed(real(to_local(grad)).to(torch.bfloat16), None, grad.dtype)


class Int8Stash(Stash):
    """Keep gradients as integers of 8 bits with a scale for each block of 256.

    The error of an element is at most 1/254 of the largest in its block. Cost: a quarter of a set of float32
    gradients, half a set of bfloat16 gradients.
    """

    def _keep(self, param: Tensor, grad: Tensor) -> Stashed:
        local = real(to_local(grad))
        values, scales = quantize(local if is_dense(local) else local.contiguous())
        return Stashed(values, scales, grad.dtype)


class HostStash(Stash):
    """Keep the gradients of a GPU in pinned host memory; copies run on a stream of their own, beside the retain phase.

    They come back in pieces, twice: for the dots and for the update. The pinned buffers stay for the next step. The
    gradients of parameters on the CPU are kept by reference. Cost: nothing on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: dict[Tensor, Tensor] = {}
        self._streams: dict[torch.device, torch.Stream] = {}

    def _keep(self, param: Tensor, grad: Tensor) -> Stashed:
        local = to_local(grad)
        if local.device.type == "cpu":
            return super()._keep(param, grad)
        buffer = self._buffers.get(param)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            buffer = torch.empty_like(local, device="cpu", pin_memory=True)
            self._buffers[param] = buffer
        stream = self._streams.setdefault(local.device, torch.Stream(local.device))
        stream.wait_stream(torch.accelerator.current_stream(local.device))
        with stream:
            buffer.copy_(local, non_blocking=True)
        local.record_stream(stream)
        return Stashed(buffer, None, grad.dtype)

    def settle(self) -> None:
        for device, stream in self._streams.items():
            torch.accelerator.current_stream(device).wait_stream(stream)


def real(grad: Tensor) -> Tensor:
    """A complex gradient as its real and imaginary parts: the inner product of the method is the real one."""
    return torch.view_as_real(grad) if grad.is_complex() else grad


def _shares_storage(grad: Tensor) -> bool:
    return grad._is_view() or grad.untyped_storage().nbytes() > grad.numel() * grad.element_size()


#: The stashes by the name that ``BLUR(stash=...)`` takes. What recompute adds to the first is in its own module.
STASHES: dict[str, type[Stash]] = {
    "reference": Stash,
    "bfloat16": BFloat16Stash,
    "int8": Int8Stash,
    "cpu": HostStash,
    "recompute": Stash,
}
