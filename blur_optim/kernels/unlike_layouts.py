"""Tensors whose elements lie in unlike orders, for backends that go through memory from end to end."""

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from blur_optim.kernels import foreach
from blur_optim.kernels.layout import are_contiguous, as_list, dense_alike, in_order_of, is_dense

T = TypeVar("T")


def in_one_order(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients with the elements of each pair in one order: as they are, or copies where layouts are unusual."""
    if are_contiguous(forget, retain):
        return as_list(forget), as_list(retain)
    forget = [f if is_dense(f) else f.contiguous() for f in forget]
    retain = [
        in_order_of(r, f) if f.numel() == r.numel() else r.contiguous() for f, r in zip(forget, retain, strict=True)
    ]
    return forget, retain


def in_order_of_gradients(state: Sequence[Tensor], forget: Sequence[Tensor], retain: Sequence[Tensor]) -> list[Tensor]:
    """``state`` with the elements of each tensor in the order of its gradients': as they are, or copies."""
    if are_contiguous(state, forget, retain):
        return as_list(state)
    grads = (f if f.numel() else r for f, r in zip(forget, retain, strict=True))
    return [in_order_of(t, grad) for t, grad in zip(state, grads, strict=True)] if state else []


def blend_the_unusual_(
    retain: Sequence[Tensor],
    forget: Sequence[Tensor],
    coefficients: Tensor,
    rows: Sequence[int],
    scales: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor], list[int], list[Tensor]]:
    """Blend the pairs of unusual layout, whose results a copy would miss, by the other backend.

    Returns:
        ``retain``, ``forget``, ``rows`` and ``scales`` of the pairs that are left to blend.
    """
    if are_contiguous(forget, retain):
        return as_list(retain), as_list(forget), as_list(rows), as_list(scales)
    dense: list[int] = []
    for i, (r, f) in enumerate(zip(retain, forget, strict=True)):
        if dense_alike(r, f) if r.numel() and f.numel() else (r if r.numel() else f).is_contiguous():
            dense.append(i)
        else:
            foreach.multi_tensor_blend_([r], [f], coefficients, [rows[i]], scales[i : i + 1])
    return _at(dense, retain), _at(dense, forget), _at(dense, rows), _at(dense, scales)


def metric_blend_the_unusual_(
    retain: Sequence[Tensor],
    forget: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    coefficients: Tensor,
    rows: Sequence[int],
    metric: Tensor,
    found_inf: Tensor | None,
    scales: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int], Tensor, list[Tensor]]:
    """As :func:`blend_the_unusual_`, with the second moments after ``forget`` and ``metric`` after ``rows``."""
    if are_contiguous(retain, forget, exp_avg_sqs):
        return as_list(retain), as_list(forget), as_list(exp_avg_sqs), as_list(rows), metric, as_list(scales)
    dense: list[int] = []
    for i, (r, f, v) in enumerate(zip(retain, forget, exp_avg_sqs, strict=True)):
        present = [t for t in (r, f) if t.numel()]
        if is_dense(v) and all(dense_alike(t, v) for t in present):
            dense.append(i)
        else:
            arguments = [r], [f], [v], coefficients, [rows[i]], metric[i : i + 1], found_inf, scales[i : i + 1]
            foreach.multi_tensor_metric_blend_(*arguments)
    left = _at(dense, retain), _at(dense, forget), _at(dense, exp_avg_sqs), _at(dense, rows)
    return *left, metric if len(dense) == len(retain) else metric[dense], _at(dense, scales)


def _at(places: Sequence[int], values: Sequence[T]) -> list[T]:
    """The ``values`` at these places; of none, none."""
    return [values[i] for i in places] if values else []
