"""The metric of the retain loss: the dots in it, the blend that advances its second moments, the steps taken in it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blur_optim.kernels.foreach.gradients import multi_tensor_blend_
from blur_optim.kernels.foreach.slabs import accumulation_dtype, aligned_slabs, chunk_sums, ordered_sum
from blur_optim.kernels.layout import in_order_of, is_dense


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
    device = forget[0].device if forget else torch.device("cpu")
    partials: list[list[Tensor]] = [[] for _ in range(num_rows)]
    for i, (f, r, v, row) in enumerate(zip(forget, retain, exp_avg_sqs, rows, strict=True)):
        dtype = accumulation_dtype(v.dtype)
        numbers = _numbers(metric, i, dtype)
        tensors = _readable(f, r, v, *max_exp_avg_sqs[i : i + 1])
        for f_slab, r_slab, v_slab, *seen in aligned_slabs(scales[i : i + 1], dtype, *tensors):
            partials[row].append(_metric_slab_dots(f_slab, r_slab, v_slab, seen, numbers))
    zero = torch.zeros(9, 1, dtype=torch.float64, device=device)
    return torch.stack([ordered_sum(torch.cat([zero, *parts], dim=1)) for parts in partials])


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
    for i, (r, v) in enumerate(zip(retain, exp_avg_sqs, strict=True)):
        numbers = _numbers(metric, i, accumulation_dtype(v.dtype))
        for _, r_slab, v_slab in aligned_slabs((), v.dtype, r.new_empty(0), r, v):
            _write(v_slab, _moment(v_slab, r_slab, numbers), found_inf)
    multi_tensor_blend_(retain, forget, coefficients, rows, scales)


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
    *,
    beta1: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    found_inf: Tensor | None,
    scales: Sequence[Tensor] = (),
) -> None:
    sign = -1.0 if maximize else 1.0
    shrink = 1 - lr * weight_decay if decoupled else torch.ones_like(lr)
    sizes = lr / (1 - torch.pow(beta1, steps.double()))
    for i, (p, row) in enumerate(zip(params, rows, strict=True)):
        dtype = accumulation_dtype(p.dtype)
        numbers, (a, b) = _numbers(metric, i, dtype), (sign * coefficients[row]).to(dtype).unbind()
        size, shrunk = sizes[i].to(dtype), shrink.to(dtype)
        tensors = forget[i], retain[i], p, exp_avgs[i], exp_avg_sqs[i], *max_exp_avg_sqs[i : i + 1]
        for f, r, param, m, v, *seen in aligned_slabs(scales[i : i + 1], dtype, *tensors):
            old = param.to(dtype) * shrunk
            grad = _update(f, r, a, b)
            if not decoupled:
                grad = grad + weight_decay * old
            moment = second = _moment(v, r, numbers)
            averaged = beta1 * m.to(dtype) + (1 - beta1) * grad
            if amsgrad:
                second = torch.maximum(seen[0].to(dtype), moment)
                _write(seen[0], second, found_inf)
            _write(m, averaged, found_inf)
            _write(v, moment, found_inf)
            _write(param, old - size * averaged / _denominator(second * numbers[2], numbers), found_inf)


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
    *,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
    found_inf: Tensor | None,
    scales: Sequence[Tensor] = (),
) -> None:
    sign = -1.0 if maximize else 1.0
    for i, (p, row) in enumerate(zip(params, rows, strict=True)):
        dtype = accumulation_dtype(p.dtype)
        numbers, (a, b) = _numbers(metric, i, dtype), (sign * coefficients[row]).to(dtype).unbind()
        tensors = forget[i], retain[i], p, exp_avg_sqs[i], *momentum_buffers[i : i + 1]
        for f, r, param, v, *buffers in aligned_slabs(scales[i : i + 1], dtype, *tensors):
            grad = _update(f, r, a, b) + weight_decay * param.to(dtype)
            for buffer in buffers:
                moved = grad if first_step else momentum * buffer.to(dtype) + (1 - dampening) * grad
                _write(buffer, moved, found_inf)
                grad = grad + momentum * moved if nesterov else moved
            moment = _moment(v, r, numbers)
            _write(v, moment, found_inf)
            step = lr.to(dtype) * grad / _denominator(moment * numbers[2], numbers)
            _write(param, param.to(dtype) - step, found_inf)


def _numbers(metric: Tensor, i: int, dtype: torch.dtype) -> Sequence[Tensor]:
    """The numbers of a tensor's metric: beta2, the weight of r^2, the inverse bias correction, damping, eps."""
    return metric[i].to(dtype).unbind()


def _moment(v: Tensor, r: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    """The second moment of the retain gradient that this step makes."""
    moment = numbers[0] * v.to(numbers[0].dtype)
    if not r.numel():
        return moment
    r = r.to(moment.dtype)
    return moment + numbers[1] * (r * r)


def _denominator(corrected: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    return (corrected + numbers[3]).sqrt() + numbers[4]


def _update(f: Tensor, r: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a f + b r`` in the dtype of the weights; an absent gradient counts as zeros."""
    if not r.numel():
        return a * f.to(a.dtype)
    return b * r.to(b.dtype) + a * f.to(a.dtype) if f.numel() else b * r.to(b.dtype)


def _write(out: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """Without a look at the flag from the host."""
    out.copy_(value if found_inf is None else torch.where(found_inf > 0, out.to(value.dtype), value))


def _metric_slab_dots(f: Tensor, r: Tensor, v: Tensor, seen: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    """``[9, chunks]`` float64 partial sums."""
    dtype = numbers[0].dtype
    second = _moment(v, r, numbers)
    if seen:
        second = torch.maximum(seen[0].to(dtype), second)
    corrected = second * numbers[2]
    inverse = _denominator(corrected, numbers).reciprocal_()
    sums = torch.zeros(9, v.numel(), dtype=dtype, device=v.device)
    if f.numel():
        f = f.to(dtype)
        pf = inverse * f
        torch.mul(f, f, out=sums[1])
        torch.mul(f, pf, out=sums[4])
        torch.mul(pf, pf, out=sums[6])
        torch.mul(sums[6], sums[6], out=sums[7])
    if r.numel():
        r = r.to(dtype)
        torch.mul(r, r, out=sums[2])
        torch.mul(r, inverse * r, out=sums[5])
    if f.numel() and r.numel():
        torch.mul(r, f, out=sums[0])
        torch.mul(r, pf, out=sums[3])
    sums[8] = corrected
    return chunk_sums(sums)


def _readable(forget: Tensor, *others: Tensor) -> list[Tensor]:
    """The tensors with their elements in one order in memory; copies where they are not."""
    first = next((t for t in (forget, *others) if t.numel()), forget)
    first = first if is_dense(first) else first.contiguous()
    rest = [in_order_of(t, first) if t.numel() else t for t in (forget, *others)]
    return rest
