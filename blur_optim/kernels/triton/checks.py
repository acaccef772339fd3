"""What the launches trust: the kernels take the addresses and sizes that they are given."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blur_optim.kernels.blocks import BLOCK_SIZE

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPES = {(float_, float_) for float_ in _FLOATS} | {(torch.float32, torch.bfloat16), (torch.float32, torch.float16)}


def check_lists(
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
    numels, grads = numels_of(forget, retain), [r.dtype for r in retain]
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


def checked_metric(metric: Tensor | None, length: int) -> Tensor | None:
    if metric is not None and (metric.dtype != torch.float64 or metric.shape != (length, 5)):
        raise ValueError(
            f"`metric` must be a float64 tensor of shape ({length}, 5), got {metric.dtype} of {tuple(metric.shape)}."
        )
    return None if metric is None else metric.contiguous()


def is_int8(forget: Tensor) -> bool:
    return forget.dtype == torch.int8 and forget.numel() > 0


def numels_of(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> list[int]:
    return [f.numel() or r.numel() for f, r in zip(forget, retain, strict=True)]
