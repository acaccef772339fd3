"""Bytes of the tensors that are alive, by category, when there are the most of them; and the process's own peak."""

import ctypes
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PARAMETERS, STATE, GRADIENTS, STASH, REST = CATEGORIES = (
    "parameters",
    "optimizer state",
    "gradients",
    "stash",
    "activations and temporaries",
)

#: For the environment of a process whose peak is measured: glibc gives larger blocks back as soon as they are free.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_MMAP_MAX_": str(1 << 15), "MALLOC_TRIM_THRESHOLD_": "0"}


@dataclass
class _Storage:
    nbytes: int
    category: str
    reference: Any  # Its callback ends the count; it must live as long as the storage.


class MemoryTracker(TorchDispatchMode):
    """Count storages, each once however many views it has, from the operator that returns them until they are freed.

    What exists before has to be shown to :meth:`label`. A gradient counts as a temporary until autograd has put it into
    ``p.grad``. Scratch memory inside an operator is not seen; :func:`process_peak` includes it.

    Args:
        params: what is their ``grad`` at the peak is the category "gradients".
        device: tensors elsewhere are not counted.
    """

    def __init__(self, params: Iterable[Tensor] = (), device: str = "cpu") -> None:
        super().__init__()
        self.params, self.device = list(params), device
        self.current = self.peak = 0
        self.at_peak = dict.fromkeys(CATEGORIES, 0)
        self._storages: dict[int, _Storage] = {}

    def label(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Put the memory of ``tensors``, views included, into ``category`` for the rest of its life.

        A label that is there already stays. ``p.grad`` is "gradients" whatever its label.
        """
        for tensor in tensors:
            storage = self._add(tensor)
            if storage is not None and storage.category == REST:
                storage.category = category

    def reset_peak(self) -> None:
        self.peak, self.at_peak = self.current, self.by_category()

    def by_category(self) -> dict[str, int]:
        """The bytes that are alive now."""
        grads = {p.grad.untyped_storage()._cdata for p in self.params if p.grad is not None}
        result = dict.fromkeys(CATEGORIES, 0)
        for key, storage in self._storages.items():
            result[GRADIENTS if key in grads else storage.category] += storage.nbytes
        return result

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        if self.current > self.peak:
            self.reset_peak()
        return result

    def _add(self, tensor: Tensor) -> _Storage | None:
        if tensor.device.type != self.device:
            return None
        memory = tensor.untyped_storage()
        key, nbytes = memory._cdata, memory.nbytes()
        if key not in self._storages:
            self._storages[key] = _Storage(0, REST, weakref.ref(memory, partial(self._remove, key)))
        storage = self._storages[key]
        self.current += nbytes - storage.nbytes  # Not 0 for a known one that resize_ has changed.
        storage.nbytes = nbytes
        return storage

    def _remove(self, key: int, _: object) -> None:
        self.current -= self._storages.pop(key).nbytes


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors among the values of containers and the attributes of objects, however deep; not dict keys."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, list | tuple | set):
            waiting += item
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            waiting += vars(item).values()


def process_peak(run: Callable[[], object]) -> int | None:
    """Run, and return by how many bytes the process's resident memory rose above what it was before.

    Everything counts, unlike for a tracker of tensors: scratch memory, the interpreter, what the C library keeps. So
    that it keeps little, start the process with :data:`ALLOCATOR`. None where the kernel does not tell; Linux does.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # Free memory that stays resident would hide as much of the rise.
        Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM.
    except (AttributeError, OSError):
        run()
        return None
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {name}.")


def cuda_peak(run: Callable[[], object]) -> int:
    """Run, and return by how many bytes the CUDA allocator's allocations rose above what they were before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
