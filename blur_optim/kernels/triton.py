"""The Triton backend: for GPUs where the compiled extension is not there.

An operation is one launch for all tensors of a kind (dtypes, which gradients are there, alignment), not one per tensor:
launching costs the host 10 us and more, which a list of thousands of biases and norm weights would pay for each. The
kernels therefore read addresses from a table, which goes to the device in one copy from pinned memory, behind the
kernels that are queued already; the host waits for nothing. A step has one kind, or a few. Nothing is autotuned: trial
runs of a kernel that works in place would apply the update again.

The sums have the same bits for the same lists of shapes, dtypes, values and alignments (to 16 bytes). A tensor that
starts elsewhere is read in another order, and its float64 sums may differ in the last bit.

Triton is imported, and each kernel compiled, at its first use.
"""

import functools
import importlib.util
import itertools
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from blur_optim.kernels.blocks import BLOCK_SIZE
from blur_optim.kernels.native import (
    blend_the_unusual_,
    in_one_order,
    in_order_of_gradients,
    metric_blend_the_unusual_,
)


def why_not(device: torch.device) -> str:
    """Say why this backend cannot serve ``device``; an empty string where it can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return f"Triton has no kernels for {device.type}, except in its interpreter, for tests: TRITON_INTERPRET=1."
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed. `pip install triton`, or a build of torch that brings it."
    if device.type == "cuda" and not interpreted:
        return _why_not_compile(device)
    return ""


@functools.cache
def _why_not_compile(device: torch.device) -> str:
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton compiles its launcher with a C compiler, and there is none. Install gcc, or set CC."
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels are for NVIDIA GPUs of compute capability 8.0 or more."
    return ""


def multi_tensor_dots(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    num_rows: int,
    scales: Sequence[Tensor] = (),
) -> Tensor:
    if not forget:
        return torch.zeros(num_rows, 3, dtype=torch.float64)
    forget, retain = in_one_order(forget, retain)
    kernels = _kernels()
    device = forget[0].device
    plan = _make_plan(forget, retain, scales, {}, rows, num_rows)
    partials = torch.empty(plan.num_chunks, 3, dtype=torch.float64, device=device)
    dots = torch.empty(num_rows, 3, dtype=torch.float64, device=device)
    _run_plan(kernels.dots_kernel, plan, partials)
    _sum_rows(partials, plan.row_starts, dots)
    return dots


def multi_tensor_blend_(
    retain: Sequence[Tensor],
    forget: Sequence[Tensor],
    coefficients: Tensor,
    rows: Sequence[int],
    scales: Sequence[Tensor] = (),
) -> None:
    dense = blend_the_unusual_(retain, forget, coefficients, rows, scales)
    if not dense:
        return
    forget, retain, rows = [forget[i] for i in dense], [retain[i] for i in dense], [rows[i] for i in dense]
    scales = [scales[i] for i in dense] if scales else []
    plan = _make_plan(forget, retain, scales, {}, rows, len(coefficients))
    increment_version(r if r.numel() else f for f, r in zip(forget, retain, strict=True))
    _run_plan(_kernels().blend_kernel, plan, coefficients.contiguous())


def multi_tensor_compress_(values: Sequence[Tensor], scales: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    if grads:
        plan = _make_plan(values, grads, scales, {}, [0] * len(grads), 1)
        increment_version([*values, *scales])
        _run_plan(_kernels().compress_kernel, plan)


def multi_tensor_metric_dots(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    rows: Sequence[int],
    num_rows: int,
    metric: Tensor,
    scales: Sequence[Tensor] = (),
) -> Tensor:
    if not forget:
        return torch.zeros(num_rows, 9, dtype=torch.float64)
    forget, retain = in_one_order(forget, retain)
    state: dict[str, Sequence[Tensor]] = {"exp_avg_sqs": in_order_of_gradients(exp_avg_sqs, forget, retain)}
    if max_exp_avg_sqs:
        state["max_exp_avg_sqs"] = in_order_of_gradients(max_exp_avg_sqs, forget, retain)
    device = forget[0].device
    plan = _make_plan(forget, retain, scales, state, rows, num_rows)
    partials = torch.empty(plan.num_chunks, 9, dtype=torch.float64, device=device)
    dots = torch.empty(num_rows, 9, dtype=torch.float64, device=device)
    _run_plan(
        _kernels().metric_dots_kernel,
        plan,
        partials,
        _checked_metric(metric, len(forget)),
        AMSGRAD=len(state) == 2,
    )
    _sum_rows(partials, plan.row_starts, dots)
    return dots


def multi_tensor_metric_blend_(
    retain: Sequence[Tensor],
    forget: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    coefficients: Tensor,
    rows: Sequence[int],
    metric: Tensor,
    found_inf: Tensor | None,
    scales: Sequence[Tensor] = (),
) -> None:
    dense = metric_blend_the_unusual_(retain, forget, exp_avg_sqs, coefficients, rows, metric, found_inf, scales)
    if not dense:
        return
    f, r, v = ([tensors[i] for i in dense] for tensors in (forget, retain, exp_avg_sqs))
    scales = [scales[i] for i in dense] if scales else []
    metric = metric if len(dense) == len(retain) else metric[dense]
    plan = _make_plan(f, r, scales, {"exp_avg_sqs": v}, [rows[i] for i in dense], len(coefficients))
    increment_version([*v, *(y if y.numel() else x for x, y in zip(f, r, strict=True))])
    _run_plan(
        _kernels().metric_blend_kernel, plan, coefficients.contiguous(), _checked_metric(metric, len(r)), found_inf
    )


def fused_adamw_(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    coefficients: Tensor,
    steps: Tensor,
    lr: Tensor,
    *,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    found_inf: Tensor | None,
    scales: Sequence[Tensor] = (),
    metric: Tensor | None = None,
) -> None:
    if not params:
        return
    if steps.shape != (len(params),):
        raise ValueError(f"`steps` must have shape ({len(params)},) like `params`, got {tuple(steps.shape)}.")
    kernels = _kernels()
    state = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if amsgrad:
        state["max_exp_avg_sqs"] = max_exp_avg_sqs
    # In the order in which the kernels read them; float64, which an argument of a Triton kernel cannot be.
    sign = -1.0 if maximize else 1.0
    numbers = [sign, beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, _log(beta1), _log(beta2)]
    plan = _make_plan(forget, retain, scales, state, rows, len(coefficients), numbers)
    sizes = torch.empty(len(params), 2, dtype=torch.float64, device=params[0].device)
    _run(kernels.adam_step_sizes_kernel, (len(params),), steps.contiguous(), lr, plan.numbers, sizes)
    arguments = (coefficients.contiguous(), plan.numbers, sizes, lr, found_inf, _checked_metric(metric, len(params)))
    increment_version(itertools.chain(*state.values()))
    _run_plan(kernels.adam_kernel, plan, *arguments, AMSGRAD=amsgrad, DECOUPLED=decoupled)


def fused_sgd_(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    coefficients: Tensor,
    lr: Tensor,
    *,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
    found_inf: Tensor | None,
    scales: Sequence[Tensor] = (),
    exp_avg_sqs: Sequence[Tensor] = (),
    metric: Tensor | None = None,
) -> None:
    if not params:
        return
    state = {"params": params}
    if momentum != 0:
        state["momentum_buffers"] = momentum_buffers
    if metric is not None:
        state["exp_avg_sqs"] = exp_avg_sqs
    numbers = [-1.0 if maximize else 1.0, weight_decay, momentum, 1 - dampening]
    plan = _make_plan(forget, retain, scales, state, rows, len(coefficients), numbers)
    arguments = (coefficients.contiguous(), plan.numbers, lr, found_inf, _checked_metric(metric, len(params)))
    increment_version(itertools.chain(*state.values()))
    flags = {"MOMENTUM": momentum != 0, "NESTEROV": nesterov, "FIRST_STEP": first_step}
    _run_plan(_kernels().sgd_kernel, plan, *arguments, **flags)


def metric_adamw_(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    coefficients: Tensor,
    steps: Tensor,
    lr: Tensor,
    metric: Tensor,
    **options: Any,
) -> None:
    state, gradients = (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs), (forget, retain, rows, coefficients)
    fused_adamw_(*state, *gradients, steps, lr, beta2=0.0, eps=0.0, metric=metric, **options)


def metric_sgd_(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    coefficients: Tensor,
    lr: Tensor,
    metric: Tensor,
    **options: Any,
) -> None:
    gradients = (forget, retain, rows, coefficients)
    fused_sgd_(params, momentum_buffers, *gradients, lr, exp_avg_sqs=exp_avg_sqs, metric=metric, **options)


# -- The plan ----------------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What a kernel is compiled for. ``vector``: elements that one instruction loads or stores."""

    param: torch.dtype
    grad: torch.dtype  # Of the retain gradient;
    stash: torch.dtype  # of the forget gradient: the same, or compressed.
    forget: bool
    retain: bool
    vector: int


class _Launch(NamedTuple):
    """The tensors of one kind; ``table`` and ``programs`` as ``triton_kernels.py`` describes them."""

    kind: _Kind
    table: Tensor
    programs: Tensor


class _Plan(NamedTuple):
    """An operation: its launches, and what lies on the device for all of them."""

    launches: list[_Launch]
    num_chunks: int
    row_starts: Tensor  # The first chunk of each row, and the number of chunks.
    numbers: Tensor


def _make_plan(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    scales: Sequence[Tensor],
    state: dict[str, Sequence[Tensor]],
    rows: Sequence[int],
    num_rows: int,
    numbers: Sequence[float] = (),
) -> _Plan:
    """Cut the tensors into chunks, and put the tables on the device.

    Args:
        state: what is used beside the gradients, by name: the parameters first, or else what has their dtype.
        numbers: float64 for the kernel.
    """
    _check(forget, retain, scales, state, rows, num_rows)
    addresses = _on_host([[t.data_ptr() for t in tensors] for tensors in (forget, retain, *state.values())])
    scale_addresses = _on_host([scales[i].data_ptr() if _is_int8(f) else 0 for i, f in enumerate(forget)])
    numels, all_rows = _on_host(_numels(forget, retain)), _on_host(rows)
    chunk_size = _kernels().CHUNK_SIZE
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
    launches = [_Launch(*launch) for launch in zip(kinds, tables[::2], tables[1::2], strict=True)]
    return _Plan(launches, int(ends[-1]), row_starts, on_device.view(torch.float64))


def _kinds(
    params: Sequence[Tensor], forget: Sequence[Tensor], retain: Sequence[Tensor], aligned: Sequence[bool]
) -> dict[_Kind, list[int]]:
    """The indices of the tensors that have elements, by kind."""
    groups: dict[tuple[torch.dtype, torch.dtype, torch.dtype, bool, bool, bool], list[int]] = {}
    for i, (p, f, r, is_aligned) in enumerate(zip(params, forget, retain, aligned, strict=True)):
        has_forget, has_retain = f.numel() > 0, r.numel() > 0
        stash = f.dtype if has_forget else r.dtype
        groups.setdefault((p.dtype, r.dtype, stash, has_forget, has_retain, is_aligned), []).append(i)
    kinds: dict[_Kind, list[int]] = {}
    for (param, grad, stash, has_forget, has_retain, is_aligned), indices in groups.items():
        if has_forget or has_retain:
            # Beside float32 parameters 16-bit gradients are loaded 4 at a time: the thread that loads an element has to
            # be the one that stores it, or they change places through shared memory.
            vector = 16 // max(param.itemsize, grad.itemsize) if is_aligned else 1
            kinds[_Kind(param, grad, stash, has_forget, has_retain, vector)] = indices
    return kinds


def _is_int8(forget: Tensor) -> bool:
    return forget.dtype == torch.int8 and forget.numel() > 0


def _numels(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> list[int]:
    return [f.numel() or r.numel() for f, r in zip(forget, retain, strict=True)]


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


def _constants(kind: _Kind) -> dict[str, Any]:
    kernels = _kernels()
    compute = torch.float64 if kind.param == torch.float64 else torch.float32
    return {
        "PARAM": kernels.DTYPES[kind.param],
        "GRAD": kernels.DTYPES[kind.grad],
        "STASH": kernels.DTYPES[kind.stash],
        "FORGET": kind.forget,
        "RETAIN": kind.retain,
        "VECTOR": kind.vector,
        "COMPUTE": kernels.DTYPES[compute],
        "CHUNK_SIZE": kernels.CHUNK_SIZE,
        # Half of it in float64, whose registers are twice as large.
        "BLOCK_SIZE": kernels.BLOCK_SIZE * 4 // compute.itemsize,
    }


# -- Checks: the kernels trust the addresses and sizes that they are given ---------------------------------------------


def _check(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    scales: Sequence[Tensor],
    state: dict[str, Sequence[Tensor]],
    rows: Sequence[int],
    num_rows: int,
) -> None:
    lists = {"forget": forget, "retain": retain, **state}
    for name, values in {"rows": rows, **lists}.items():
        if len(values) != len(forget):
            raise ValueError(f"`{name}` must have {len(forget)} entries like `forget`, got {len(values)}.")
    if list(rows) != sorted(rows) or rows[0] < 0 or rows[-1] >= num_rows:
        raise ValueError(f"`rows` must ascend from 0 or more to less than {num_rows}, got {list(rows)}.")
    numels, grads = _numels(forget, retain), [r.dtype for r in retain]
    params = [p.dtype for p in next(iter(state.values()), retain)]
    for name, tensors in lists.items():
        _check_each(name, "device", [t.device for t in tensors], [forget[0].device] * len(forget))
    for name, tensors in (("forget", forget), ("retain", retain)):
        sizes = [t.numel() or numel for t, numel in zip(tensors, numels, strict=True)]
        _check_each(name, "number of elements", sizes, numels)
    for i, (f, r) in enumerate(zip(forget, retain, strict=True)):
        if f.dtype != r.dtype and f.numel():
            _check_compressed(i, f, r, scales)
    for name, tensors in state.items():
        _check_each(name, "number of elements", [t.numel() for t in tensors], numels)
        _check_each(name, "dtype", [t.dtype for t in tensors], params)
    for param, grad in set(zip(params, grads, strict=True)) - _DTYPES:
        raise TypeError(
            "Gradients must be float32, bfloat16, float16 or float64 like their parameters, or 16-bit beside float32, "
            f"got {grad} beside {param}."
        )


def _check_each(name: str, what: str, values: list[Any], expected: list[Any]) -> None:
    if values != expected:  # Compared as a whole: there may be thousands.
        i, value, wanted = next((i, *v) for i, v in enumerate(zip(values, expected, strict=True)) if v[0] != v[1])
        raise ValueError(f"`{name}[{i}]` must have the {what} of the other tensors, {wanted}, got {value}.")


def _check_compressed(i: int, forget: Tensor, retain: Tensor, scales: Sequence[Tensor]) -> None:
    if not (forget.dtype == torch.int8 or (forget.dtype == torch.bfloat16 and retain.dtype.itemsize > 2)):
        raise ValueError(
            f"`forget[{i}]` must have the dtype of `retain[{i}]`, {retain.dtype}, or be compressed: int8, or bfloat16 "
            f"beside a wider one; got {forget.dtype}."
        )
    if not retain.numel():
        raise ValueError(
            f"`forget[{i}]` must not be compressed where `retain[{i}]` is absent: it holds the update then."
        )
    if forget.dtype == torch.int8:
        expected = (torch.float32, (math.ceil(forget.numel() / BLOCK_SIZE),), forget.device, True)
        s = scales[i] if i < len(scales) else torch.empty(0)
        if (s.dtype, tuple(s.shape), s.device, s.is_contiguous()) != expected:
            raise ValueError(
                f"`scales[{i}]` must be a contiguous float32 tensor of shape {expected[1]} on the device of the other "
                f"tensors: one scale for each block of {BLOCK_SIZE} of `forget[{i}]`."
            )


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPES = {(float_, float_) for float_ in _FLOATS} | {(torch.float32, torch.bfloat16), (torch.float32, torch.float16)}


# -- Triton ------------------------------------------------------------------------------------------------------------


@functools.cache
def _kernels() -> ModuleType:
    try:
        from blur_optim.kernels import triton_kernels
    except ImportError as error:
        raise ImportError(f"The triton backend is not available: {error}. `pip install triton`.") from error
    return triton_kernels


def _run_plan(kernel: Any, plan: _Plan, *args: Any, **flags: bool) -> None:
    for kind, table, programs in plan.launches:
        constants = {name: value for name, value in _constants(kind).items() if name in kernel.arg_names}
        _run(kernel, (len(programs),), table, programs, *args, **constants, **flags)


def _run(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    device = args[0].device
    # Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **constants, **_kernels().OPTIONS)


def _sum_rows(partials: Tensor, row_starts: Tensor, dots: Tensor) -> None:
    kernels = _kernels()
    constants = {"DOTS": dots.shape[1], "BLOCK_SIZE": kernels.BLOCK_SIZE}
    _run(kernels.sum_rows_kernel, tuple(dots.shape), partials, row_starts, dots, **constants)


def _checked_metric(metric: Tensor | None, length: int) -> Tensor | None:
    if metric is not None and (metric.dtype != torch.float64 or metric.shape != (length, 5)):
        raise ValueError(
            f"`metric` must be a float64 tensor of shape ({length}, 5), got {metric.dtype} of {tuple(metric.shape)}."
        )
    return None if metric is None else metric.contiguous()


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf
