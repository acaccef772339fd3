"""Where the forget gradients wait while the retain gradients are computed."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from blur_optim.kernels import select_backend
from blur_optim.kernels.blocks import dequantize, empty_compressed
from blur_optim.kernels.layout import is_dense
from blur_optim.parallel.ranks import is_dtensor, like, to_local

#: Bytes of gradients that are compressed at a time; then they are dropped.
PIECE_BYTES = 1 << 26


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


class Waiting(NamedTuple):
    """Forget gradients that are handed out, in the order of the parameters that were asked for; None: there is none.

    Args:
        values, scales, dtypes: see :class:`Stashed`; the last two are empty where every gradient is as it was.
        contiguous: every gradient is there, a plain tensor and contiguous; False says nothing.
    """

    values: list[Tensor | None]
    scales: list[Tensor | None]
    dtypes: list[torch.dtype | None]
    contiguous: bool = False

    def stashed(self, place: int) -> Stashed | None:
        values = self.values[place] if self.values else None
        if values is None:
            return None
        dtype = self.dtypes[place] if self.dtypes else None
        return Stashed(values, self.scales[place] if self.scales else None, dtype or values.dtype)


class Stash:
    """Keep the forget gradients by reference: the tensors move out of ``p.grad``, nothing is copied.

    A gradient that is a window into a larger buffer is copied after all, for its owner writes the next gradient to the
    same place: DistributedDataParallel(gradient_as_bucket_view=True) does, from its second step on. A copy that
    was not needed costs one read and one write; a missing one would replace g_f by g_r without a sign.

    Cost: one gradient set.
    """

    #: Whether they may be on another device than their parameters.
    may_be_elsewhere = False
    #: Bytes of gradients that are kept at a time, and dropped before the next; None: all are kept at once.
    piece_bytes: int | None = None

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend
        self._params: Sequence[Tensor] = ()
        self._places: dict[int, int] = {}
        self._waiting = Waiting([], [], [])

    def take(
        self, params: Sequence[Tensor], grads: list[Tensor | None] | None = None, contiguous: bool = False
    ) -> None:
        """Move the gradient of each of ``params`` here and leave ``p.grad = None``.

        Args:
            grads: the gradients, where they have been looked up already. The list is this stash's from here on.
            contiguous: see :class:`Waiting`.
        """
        grads = [p.grad for p in params] if grads is None else grads
        for p in params:
            p.grad = None
        self.clear()
        self._params, self._waiting = params, Waiting(grads, [], [], contiguous)
        for piece in self._pieces(grads):
            self.keep(params, piece)

    def settle(self) -> None:
        """Let what is read from here on wait for copies that are under way; the host does not."""

    def get(self, param: Tensor) -> Stashed | None:
        """The gradient of ``param``, or None where the forget phase left none."""
        if not self._places:
            self._places = {id(p): i for i, p in enumerate(self._params)}
        place = self._places.get(id(param))
        return None if place is None else self._waiting.stashed(place)

    def hand_out(self, params: Sequence[Tensor]) -> Waiting:
        """Hand out the gradients of ``params``; none is here any longer. Empty lists where nothing has been."""
        if params is self._params or not self._params:
            handed = self._waiting
        else:  # Groups were added since, or only some take part.
            found = [self.get(p) for p in params]
            handed = Waiting(
                [None if s is None else s.values for s in found],
                [None if s is None else s.scales for s in found],
                [None if s is None else s.dtype for s in found],
            )
        self.clear()
        return handed

    def has(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """What waits for each of ``params``, in a list that is not to be changed; it counts what is None."""
        if params is self._params:
            return self._waiting.values
        return [None if (stashed := self.get(p)) is None else stashed.values for p in params]

    def clear(self) -> None:
        self._params, self._places, self._waiting = (), {}, Waiting([], [], [])

    def __len__(self) -> int:
        return sum(values is not None for values in self._waiting.values)

    def keep(self, params: Sequence[Tensor], places: Sequence[int]) -> None:
        """Replace the gradients at ``places`` of ``self._waiting`` by what is kept of them."""
        values = self._waiting.values
        for i in _windows(values, places):
            values[i] = values[i].clone()  # type: ignore[union-attr]

    def _pieces(self, grads: Sequence[Tensor | None]) -> Iterator[Sequence[int]]:
        """The places of gradients, ``piece_bytes`` at a time."""
        if self.piece_bytes is None:
            yield range(len(grads))
            return
        piece: list[int] = []
        size = 0
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            nbytes = to_local(grad).nbytes
            if piece and size + nbytes > self.piece_bytes:
                yield piece
                piece, size = [], 0
            piece.append(i)
            size += nbytes
        if piece:
            yield piece


class CompressedStash(Stash):
    """What compresses gradients: in pieces, so that a gradient set and its compressed copy are never both there."""

    piece_bytes = PIECE_BYTES

    def _compress(self, places: Sequence[int], dtype: torch.dtype) -> None:
        """Replace the gradients at ``places`` by what one operation over those of each device makes of them."""
        values, scales, dtypes, _ = self._waiting
        if not dtypes:
            scales.extend([None] * len(values))
            dtypes.extend([None] * len(values))
        by_device: dict[torch.device, list[int]] = {}
        for i in places:
            grad = cast(Tensor, values[i])
            local = real(to_local(grad))
            dtypes[i] = grad.dtype
            values[i] = local if is_dense(local) else local.contiguous()
            by_device.setdefault(local.device, []).append(i)
        for device, mine in by_device.items():
            grads = [cast(Tensor, values[i]) for i in mine]
            compressed, blocks = empty_compressed(grads, dtype)
            select_backend(self.backend, device).multi_tensor_compress_(compressed, blocks, grads)
            for place, i in enumerate(mine):
                values[i], scales[i] = compressed[place], blocks[place] if blocks else None


class BFloat16Stash(CompressedStash):
    """Keep float32 and float64 gradients in bfloat16, others by reference.

    The coefficients are those of the rounded gradient, and the update projects on it: an error of 2^-9 of an element at
    most. Cost: half a set of float32 gradients.
    """

    def keep(self, params: Sequence[Tensor], places: Sequence[int]) -> None:
        wide = [i for i in places if cast(Tensor, self._waiting.values[i]).dtype.itemsize > 2]
        narrow = [i for i in places if cast(Tensor, self._waiting.values[i]).dtype.itemsize <= 2]
        super().keep(params, narrow)
        self._compress(wide, torch.bfloat16)


class Int8Stash(CompressedStash):
    """Keep gradients as integers of 8 bits with a scale for each block of 256.

    The error of an element is at most 1/254 of the largest in its block. Cost: a quarter of a set of float32
    gradients, half a set of bfloat16 gradients.
    """

    def keep(self, params: Sequence[Tensor], places: Sequence[int]) -> None:
        self._compress(places, torch.int8)


class HostStash(Stash):
    """Keep the gradients of a GPU in pinned host memory; copies run on a stream of their own, beside the retain phase.

    They come back in pieces, twice: for the dots and for the update. The pinned buffers stay for the next step. The
    gradients of parameters on the CPU are kept by reference. Cost: nothing on the device.
    """

    may_be_elsewhere = True

    def __init__(self, backend: str | None = None) -> None:
        super().__init__(backend)
        self._buffers: dict[Tensor, Tensor] = {}
        self._streams: dict[torch.device, torch.Stream] = {}

    def settle(self) -> None:
        for device, stream in self._streams.items():
            torch.accelerator.current_stream(device).wait_stream(stream)

    def keep(self, params: Sequence[Tensor], places: Sequence[int]) -> None:
        values = self._waiting.values
        on_host = []
        for i in places:
            local = None if (grad := values[i]) is None else to_local(grad)
            if local is None or local.device.type == "cpu":
                on_host.append(i)
            else:
                values[i] = self._copy(params[i], local)
        super().keep(params, on_host)

    def _copy(self, param: Tensor, grad: Tensor) -> Tensor:
        buffer = self._buffers.get(param)
        if buffer is None or _form(buffer) != _form(grad):
            buffer = torch.empty_like(grad, device="cpu", pin_memory=True)
            self._buffers[param] = buffer
        stream = self._streams.setdefault(grad.device, torch.Stream(grad.device))
        stream.wait_stream(torch.accelerator.current_stream(grad.device))
        with stream:
            buffer.copy_(grad, non_blocking=True)
        grad.record_stream(stream)
        return buffer


def _form(t: Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    return t.dtype, t.shape, t.stride()


def real(grad: Tensor) -> Tensor:
    """A complex gradient as its real and imaginary parts: the inner product of the method is the real one."""
    return torch.view_as_real(grad) if grad.is_complex() else grad


def _windows(grads: Sequence[Tensor | None], places: Sequence[int]) -> list[int]:
    """Those of ``places`` whose gradient is a window into a larger buffer."""
    if len(places) == len(grads) and set(map(type, grads)) == {Tensor}:
        present, own = places, cast(list[Tensor], grads)
    else:  # FSDP2 hands out views of one buffer for a whole group, and keeps none.
        present = [i for i in places if (g := grads[i]) is not None and not is_dtensor(g)]
        own = cast(list[Tensor], [grads[i] for i in present])
    pairs = zip(present, own, strict=True)
    return [i for i, g in pairs if g._is_view() or g.untyped_storage().nbytes() > g.nbytes]


#: The stashes by the name that ``BLUR(stash=...)`` takes. What recompute adds to the first is in its own module.
STASHES: dict[str, type[Stash]] = {
    "reference": Stash,
    "bfloat16": BFloat16Stash,
    "int8": Int8Stash,
    "cpu": HostStash,
    "recompute": Stash,
}
