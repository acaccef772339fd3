"""What the phases leave in ``p.grad``: looked at once, taken, and paired by parameter."""

from collections.abc import Sequence
from operator import attrgetter, eq
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from blur_optim.kernels.layout import Contiguous
from blur_optim.parallel.ranks import Ranks, like, settle_gradient, to_local, to_locals
from blur_optim.step.pairs import PairedGradients, Pairs
from blur_optim.step.plan import Plan, Rows, any_missing
from blur_optim.step.stash import Stash, Stashed, Waiting, real

grad_of, _layout_of, _dtype_of = attrgetter("grad"), attrgetter("layout"), attrgetter("dtype")


class Taken(NamedTuple):
    """What a phase has left in ``p.grad`` of each parameter of a plan.

    Args:
        contiguous: every one is there, a plain tensor and contiguous; False says nothing.
    """

    grads: list[Tensor | None]
    contiguous: bool


def take_gradients(plan: Plan) -> Taken:
    """Look at what a phase has left in ``p.grad``, once, and refuse what kernels cannot take.

    Raises:
        TypeError: a gradient is sparse, or distributed otherwise than its parameter.
    """
    grads: list[Tensor | None] = list(map(grad_of, plan.params))
    if set(map(type, grads)) == {Tensor} and not plan.dtensors:
        found = cast(list[Tensor], grads)
        if set(map(_layout_of, found)) == {torch.strided} and all(map(Tensor.is_contiguous, found)):
            return Taken(grads, True)
    for index, (p, grad) in enumerate(zip(plan.params, grads, strict=True)):
        if grad is not None:
            check_dense(grad, plan.name(index))
            settle_gradient(p, plan.name(index))
    return Taken([p.grad for p in plan.params], False)


def check_dense(grad: Tensor, name: str) -> None:
    if grad.layout != torch.strided:
        raise TypeError(f"The gradient of {name} must be dense, got {grad.layout}. Use sparse=False in the embedding.")


def pair_gradients(rows: Rows, stash: Stash, ranks: Ranks, taken: Taken | None = None) -> PairedGradients:
    """Take the forget gradients out of ``stash`` and pair them with the retain gradients in ``p.grad``.

    Afterwards ``p.grad`` is, for every parameter with a gradient in either phase, the tensor that will hold the update:
    the retain gradient, or the forget gradient where there is no other.

    Args:
        taken: the retain gradients of the rows' members, where they have been looked at already.

    Raises:
        RuntimeError: a retain gradient lies in the memory of a stashed one.
    """
    stash.settle()
    waiting = stash.hand_out(rows.params)
    retain, contiguous = Taken([p.grad for p in rows.params], False) if taken is None else taken
    facts = rows.facts(ranks, waiting.values, retain)
    found = _all_present(rows, waiting, retain, contiguous)
    if found is not None:
        return PairedGradients(found, rows, ranks, facts, True, stash.may_be_elsewhere)
    pairs = Pairs()
    any_scales = False
    for member, p in enumerate(rows.params):
        stashed = waiting.stashed(member)
        if stashed is None and retain[member] is None:
            continue
        f, r = _two_gradients(p, stashed)
        scale = None if stashed is None or not f.numel() else stashed.scales
        any_scales = any_scales or (scale is not None and f.dtype == torch.int8)
        row = (p, f, r, rows.rows[member], member, rows.groups[member], r if scale is None else scale)
        for values, value in zip(pairs.lists().values(), row, strict=True):
            values.append(value)
    if not any_scales:
        pairs.scales.clear()
    return PairedGradients(pairs, rows, ranks, facts, False, stash.may_be_elsewhere)


def _all_present(rows: Rows, waiting: Waiting, retain: Sequence[Any], contiguous: bool) -> Pairs | None:
    """The pairs as they are, where both gradients of all parameters are plain, contiguous and apart; else None."""
    forget: list[Any] = waiting.values
    if any_missing(forget) or any_missing(retain):
        return None
    if not (contiguous and waiting.contiguous):  # Not known, as for DTensors: their shards may be.
        forget, retain = to_locals(forget), to_locals(retain)
        if not (set(map(type, forget)) == set(map(type, retain)) == {Tensor}):
            return None
        if not (all(map(Tensor.is_contiguous, retain)) and all(map(Tensor.is_contiguous, forget))):
            return None
    if any(dtype.is_complex for dtype in set(map(_dtype_of, retain))):
        return None
    forget, retain = Contiguous(forget), Contiguous(retain)
    if any(map(eq, map(Tensor.data_ptr, forget), map(Tensor.data_ptr, retain))):
        for f, r in zip(forget, retain, strict=True):
            _check_distinct(f, r)
    quantized = bool(waiting.scales) and any(f.dtype == torch.int8 for f in forget)
    scales = [r if s is None else s for s, r in zip(waiting.scales, retain, strict=True)] if quantized else []
    return Pairs(rows.params, forget, retain, rows.rows, rows.members, rows.groups, scales)


def _two_gradients(param: Tensor, stashed: Stashed | None) -> tuple[Tensor, Tensor]:
    """Both gradients as real local tensors, an absent one with 0 elements; ``p.grad`` is then what will be written."""
    if stashed is not None and param.grad is None:
        param.grad = stashed.restore(param)
        forget = real(to_local(param.grad))
        return forget, forget.new_empty(0)
    assert param.grad is not None
    retain = to_local(param.grad)
    if retain.numel() and _overlaps_itself(retain):
        retain = retain.clone(memory_format=torch.contiguous_format)
        param.grad = like(retain, param)
    retain = real(retain)
    if stashed is None:
        return retain.new_empty(0), retain
    forget = to_local(stashed.values)
    _check_distinct(forget, retain)
    return real(forget), retain


def _check_distinct(forget: Tensor, retain: Tensor) -> None:
    # A fake tensor, for one, has no address to ask for, and one on the device "meta" has none.
    if type(forget) is type(retain) is Tensor and 0 != forget.data_ptr() == retain.data_ptr() and forget.numel():
        raise RuntimeError(
            "A retain gradient was written over a stashed forget gradient: something keeps the memory of p.grad and "
            "writes to it again. Under DistributedDataParallel pass gradient_as_bucket_view=False."
        )


def _overlaps_itself(grad: Tensor) -> bool:
    return not grad.is_contiguous() and any(
        stride == 0 and size > 1 for size, stride in zip(grad.size(), grad.stride(), strict=True)
    )
