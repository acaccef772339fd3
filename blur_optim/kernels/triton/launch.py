"""One launch for all tensors of a kind: their table of addresses, and what the kernel is compiled with."""

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blur_optim.kernels.triton.checks import check_lists, is_int8, numels_of


class Kind(NamedTuple):
    """What a kernel is compiled for. ``vector``: elements that one instruction loads or stores."""

    param: torch.dtype
    grad: torch.dtype  # Of the retain gradient;
    stash: torch.dtype  # of the forget gradient: the same, or compressed.
    forget: bool
    retain: bool
    vector: int


class Launch(NamedTuple):
    """The tensors of one kind; ``table`` and ``programs`` as the package of the kernels describes them."""

    kind: Kind
    table: Tensor
    programs: Tensor


class Plan(NamedTuple):
    """An operation: its launches, and what lies on the device for all of them."""

    launches: list[Launch]
    num_chunks: int
    row_starts: Tensor  # The first chunk of each row, and the number of chunks.
    numbers: Tensor


def make_plan(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    scales: Sequence[Tensor],
    state: dict[str, Sequence[Tensor]],
    rows: Sequence[int],
    num_rows: int,
    numbers: Sequence[float] = (),
) -> Plan:
    """Cut the tensors into chunks, and put the tables on the device.

    Args:
        state: what is used beside the gradients, by name: the parameters first, or else what has their dtype.
        numbers: float64 for the kernel.
    """
    check_lists(forget, retain, scales, state, rows, num_rows)
    addresses = _on_host([[t.data_ptr() for t in tensors] for tensors in (forget, retain, *state.values())])
    scale_addresses = _on_host([scales[i].data_ptr() if is_int8(f) else 0 for i, f in enumerate(forget)])
    numels, all_rows = _on_host(numels_of(forget, retain)), _on_host(rows)
    chunk_size = device_code().CHUNK_SIZE
    chunks = (numels + (chunk_size - 1)) // chunk_size
    ends = chunks.cumsum(0)
    starts = torch.cat([ends - chunks, ends[-1:]])
    parts = [starts[torch.searchsorted(all_rows, _on_host(range(num_rows + 1)))]]
    parts += [torch.tensor(numbers, dtype=torch.float64, device="cpu").view(torch.int64)]
    kinds = _kinds(next(iter(state.values()), retain), forget, retain, (addresses % 16 == 0).all(0).tolist())
    for indices in kinds.values():
        index = _on_host(indices)
        mine = chunks[index]
        columns = [numels[index], all_rows[index], index, mine.cumsum(0) - mine, starts[index], scale_addresses[index]]
        parts += [torch.stack([*columns, *addresses[:, index]], dim=1), torch.repeat_interleave(mine)]
    row_starts, on_device, *tables = _to_device(parts, forget[0].device)
    launches = [Launch(*launch) for launch in zip(kinds, tables[::2], tables[1::2], strict=True)]
    return Plan(launches, int(ends[-1]), row_starts, on_device.view(torch.float64))


def _kinds(
    params: Sequence[Tensor], forget: Sequence[Tensor], retain: Sequence[Tensor], aligned: Sequence[bool]
) -> dict[Kind, list[int]]:
    """The indices of the tensors that have elements, by kind."""
    groups: dict[tuple[torch.dtype, torch.dtype, torch.dtype, bool, bool, bool], list[int]] = {}
    for i, (p, f, r, is_aligned) in enumerate(zip(params, forget, retain, aligned, strict=True)):
        has_forget, has_retain = f.numel() > 0, r.numel() > 0
        stash = f.dtype if has_forget else r.dtype
        groups.setdefault((p.dtype, r.dtype, stash, has_forget, has_retain, is_aligned), []).append(i)
    kinds: dict[Kind, list[int]] = {}
    for (param, grad, stash, has_forget, has_retain, is_aligned), indices in groups.items():
        if has_forget or has_retain:
            # Beside float32 parameters 16-bit gradients are loaded 4 at a time: the thread that loads an element has to
            # be the one that stores it, or they change places through shared memory.
            vector = 16 // max(param.itemsize, grad.itemsize) if is_aligned else 1
            kinds[Kind(param, grad, stash, has_forget, has_retain, vector)] = indices
    return kinds


def _on_host(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")  # Whatever the default device is.


def _to_device(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """int64 tensors, copied together. Each starts at a multiple of 16 bytes: Triton compiles others a second time."""
    sizes = [part.numel() + part.numel() % 2 for part in parts]
    # The allocator of pinned memory keeps the block until the copy is done.
    packed = torch.empty(sum(sizes), dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    for part, room in zip(parts, torch.split(packed, sizes), strict=True):
        room[: part.numel()] = part.flatten()
    rooms = torch.split(packed.to(device, non_blocking=True), sizes)
    return [room[: part.numel()].view(part.shape) for part, room in zip(parts, rooms, strict=True)]


def constants_of(kind: Kind) -> dict[str, Any]:
    code = device_code()
    compute = torch.float64 if kind.param == torch.float64 else torch.float32
    return {
        "PARAM": code.DTYPES[kind.param],
        "GRAD": code.DTYPES[kind.grad],
        "STASH": code.DTYPES[kind.stash],
        "FORGET": kind.forget,
        "RETAIN": kind.retain,
        "VECTOR": kind.vector,
        "COMPUTE": code.DTYPES[compute],
        "CHUNK_SIZE": code.CHUNK_SIZE,
        # Half of it in float64, whose registers are twice as large.
        "BLOCK_SIZE": code.BLOCK_SIZE * 4 // compute.itemsize,
    }


@functools.cache
def device_code() -> ModuleType:
    try:
        from blur_optim.kernels.triton import kernels
    except ImportError as error:
        raise ImportError(f"The triton backend is not available: {error}. `pip install triton`.") from error
    return kernels


def run_plan(kernel: Any, plan: Plan, *args: Any, **flags: bool) -> None:
    for kind, table, programs in plan.launches:
        constants = {name: value for name, value in constants_of(kind).items() if name in kernel.arg_names}
        run(kernel, (len(programs),), table, programs, *args, **constants, **flags)


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    device = args[0].device
    # Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **constants, **device_code().OPTIONS)


def sum_rows(partials: Tensor, row_starts: Tensor, dots: Tensor) -> None:
    code = device_code()
    constants = {"DOTS": dots.shape[1], "BLOCK_SIZE": code.BLOCK_SIZE}
    run(code.sum_rows_kernel, tuple(dots.shape), partials, row_starts, dots, **constants)
