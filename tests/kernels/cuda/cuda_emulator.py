"""The CUDA operators on the emulator, as torch operators on CPU tensors, and what their tests share."""

import ctypes
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from cuda_toolchain import CSRC
from torch import Tensor

from blur_optim.kernels.blocks import BLOCK_SIZE, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CHUNK = 16384
# Around a pack, a block of int8 and a chunk. `with_absent` leaves out the second forget gradient of every three, and
# the third retain gradient.
NUMELS = [CHUNK + BLOCK_SIZE + 1, 2 * CHUNK + 5, CHUNK - 1, 1, 7, 2 * CHUNK + 5, CHUNK, BLOCK_SIZE, BLOCK_SIZE - 1]
# (retain gradients, forget gradients): of one dtype, or the forget gradients compressed.
GRADIENTS = [
    (dtype, stash)
    for dtype in DTYPES
    for stash in (dtype, torch.bfloat16, torch.int8)
    if stash == dtype or stash.itemsize < dtype.itemsize
]

# Forward, reverse, and shuffled by two seeds.
SCHEDULES = [(0, 0), (1, 0), (2, 1), (2, 2)]

# Error of an updated element relative to what it is made of: a few roundings in float32, then one to the dtype.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


class Emulated:
    """The operators, and a call for the schedule of the emulator that they run on."""

    def __init__(self, library: Path) -> None:
        self.schema = torch.library.Library("blur_optim_emulated", "DEF")
        definitions = re.findall(r"m\.def\(\s*((?:\"[^\"]*\"\s*)+)\)", (CSRC / "registration.cpp").read_text())
        for definition in definitions:
            self.schema.define("".join(re.findall(r'"([^"]*)"', definition)))
        torch.ops.load_library(library)
        self.ops = torch.ops.blur_optim_emulated
        self.library = ctypes.CDLL(str(library))

    def schedule(self, order: int, seed: int = 0, edge_blocks: int = 0) -> None:
        self.library.emulator_schedule(order, ctypes.c_uint(seed), ctypes.c_int64(edge_blocks))

    def locate(self, numels: Sequence[int], block: int) -> tuple[int, int, int]:
        piece = (ctypes.c_int64 * 3)()
        self.library.emulator_locate((ctypes.c_int64 * len(numels))(*numels), len(numels), ctypes.c_uint(block), piece)
        return piece[0], piece[1], piece[2]

    def on_every_schedule(self, call: Callable[[], list[Tensor]]) -> list[Tensor]:
        results = []
        for order, seed in SCHEDULES:
            self.schedule(order, seed)
            results.append(call())
        assert all(same_bits(result, results[0]) for result in results[1:])
        return results[0]

    def dots(
        self, forget: list[Tensor], retain: list[Tensor], rows: list[int], num_rows: int, scales: Sequence[Tensor] = ()
    ) -> Tensor:
        arguments = forget, retain, rows, num_rows, list(scales)
        return self.on_every_schedule(lambda: [self.ops.multi_tensor_dots(*arguments)])[0]

    def blend(
        self,
        forget: list[Tensor],
        retain: list[Tensor],
        coefficients: Tensor,
        rows: list[int],
        scales: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """What retain holds afterwards, or forget where retain is absent."""

        def call() -> list[Tensor]:
            f, r = copied(forget), copied(retain)
            self.ops.multi_tensor_blend_(r, f, coefficients, rows, list(scales))
            return [y if y.numel() else x for x, y in zip(f, r, strict=True)]

        return self.on_every_schedule(call)


def copied(tensors: list[Tensor]) -> list[Tensor]:
    """Clones, each as far from 16-byte alignment as the original."""
    return [
        torch.cat([t.new_zeros(t.storage_offset()), t.flatten()])[t.storage_offset() :].view(t.shape) for t in tensors
    ]


def same_bits(actual: list[Tensor], expected: list[Tensor]) -> bool:
    words = ([t.contiguous().reshape(-1).view(torch.uint8) for t in tensors] for tensors in (actual, expected))
    return all(torch.equal(a, e) for a, e in zip(*words, strict=True))


def make(numels: Sequence[int], dtype: torch.dtype, seed: int, misaligned: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n, generator=generator).to(dtype) for n in numels]
    return misalign(tensors) if misaligned else tensors


def make_forget(
    numels: Sequence[int], stash: torch.dtype, seed: int, misaligned: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Forget gradients of dtype ``stash``, and their scales where that is int8: another size in each block."""
    if stash != torch.int8:
        return make(numels, stash, seed, misaligned), []
    grads = [t * (1 + torch.arange(len(t)) // BLOCK_SIZE % 5) for t in make(numels, torch.float32, seed)]
    values, scales = map(list, zip(*map(quantize, grads), strict=True))
    return misalign(values) if misaligned else values, scales


def misalign(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.cat([t.new_zeros(1), t])[1:] for t in tensors]


def coefficients(*rows: tuple[float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def with_absent(forget: list[Tensor], retain: list[Tensor]) -> None:
    """Leave out one gradient of some of the pairs, and both of none; never one beside a compressed gradient."""
    for i, (f, r) in enumerate(zip(forget, retain, strict=True)):
        if i % 3 == 1:
            forget[i] = f.new_empty(0)
        elif i % 3 == 2 and f.dtype == r.dtype:
            retain[i] = r.new_empty(0)
