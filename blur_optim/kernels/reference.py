"""The equations themselves, in float64 and plain PyTorch: what the other backends are checked against."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from blur_optim.kernels.blocks import BLOCK_SIZE, dequantize
from blur_optim.kernels.layout import memory_order


def multi_tensor_dots(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    num_rows: int,
    scales: Sequence[Tensor] = (),
) -> Tensor:
    device = forget[0].device if forget else None
    dots = torch.zeros(num_rows, 3, dtype=torch.float64, device=device)
    for f, r, row in zip(_in_float64(forget, scales), retain, rows, strict=True):
        f64, r64 = f.flatten(), r.double().flatten()
        both = f64 @ r64 if len(f64) == len(r64) else dots.new_zeros(())
        dots[row] += torch.stack([both, f64 @ f64, r64 @ r64])
    return dots


def multi_tensor_blend_(
    retain: Sequence[Tensor],
    forget: Sequence[Tensor],
    coefficients: Tensor,
    rows: Sequence[int],
    scales: Sequence[Tensor] = (),
) -> None:
    for r, f, f64, row in zip(retain, forget, _in_float64(forget, scales), rows, strict=True):
        a, b = coefficients[row]
        if r.numel() == f.numel():
            r.copy_(a * f64 + b * r.double())
        elif r.numel() == 0:
            f.copy_(a * f64)
        else:
            r.copy_(b * r.double())


def multi_tensor_compress_(values: Sequence[Tensor], scales: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for i, (v, grad) in enumerate(zip(values, grads, strict=True)):
        if v.dtype != torch.int8 or not v.numel():
            v.copy_(grad)
            continue
        # In float32, in which the scale is kept: what the others are to have the bits of.
        target, blocks = memory_order(v), torch.split(memory_order(grad).float(), BLOCK_SIZE)
        for b, block in enumerate(blocks):
            scales[i][b] = block.abs().max() / 127
            integers = (block / scales[i][b]).round().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            target[b * BLOCK_SIZE : (b + 1) * BLOCK_SIZE] = integers.clamp(-127, 127).to(torch.int8)


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
    dots = torch.zeros(num_rows, 9, dtype=torch.float64, device=forget[0].device if forget else None)
    for i, (f, r, v) in enumerate(zip(_in_float64(forget, scales), retain, exp_avg_sqs, strict=True)):
        f, r = (_present(t.double(), v).flatten() for t in (f, r))
        second = _moment(v, r.view_as(v), metric[i])
        if max_exp_avg_sqs:
            second = torch.maximum(second, max_exp_avg_sqs[i].double())
        corrected = second.flatten() * metric[i, 2]
        p = 1 / _denominator(corrected, metric[i])
        euclidean = [r @ f, f @ f, r @ r]
        dots[rows[i]] += torch.stack(
            [
                *euclidean,
                r @ (p * f),
                f @ (p * f),
                r @ (p * r),
                (p * f) @ (p * f),
                (p * f).pow(4).sum(),
                corrected.sum(),
            ]
        )
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
    if found_inf is None or not found_inf:
        for r, v, numbers in zip(retain, exp_avg_sqs, metric, strict=True):
            v.copy_(_moment(v, _present(r.double(), v), numbers))
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
    if found_inf is not None and found_inf:
        return
    for i, (p, u, r) in enumerate(_updates(params, forget, retain, rows, coefficients, scales)):
        param, grad = p.double(), -u if maximize else u
        if decoupled:
            param = param * (1 - lr * weight_decay)
        else:
            grad = grad + weight_decay * param
        moment = _moment(exp_avg_sqs[i], r, metric[i])
        averaged = beta1 * exp_avgs[i].double() + (1 - beta1) * grad
        second = torch.maximum(max_exp_avg_sqs[i].double(), moment) if amsgrad else moment
        size = lr / (1 - beta1 ** steps[i].double())
        p.copy_(param - size * averaged / _denominator(second * metric[i, 2], metric[i]))
        exp_avgs[i].copy_(averaged)
        exp_avg_sqs[i].copy_(moment)
        if amsgrad:
            max_exp_avg_sqs[i].copy_(second)


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
    if found_inf is not None and found_inf:
        return
    for i, (p, u, r) in enumerate(_updates(params, forget, retain, rows, coefficients, scales)):
        grad = (-u if maximize else u) + weight_decay * p.double()
        if momentum != 0:
            moved = grad if first_step else momentum * momentum_buffers[i].double() + (1 - dampening) * grad
            momentum_buffers[i].copy_(moved)
            grad = grad + momentum * moved if nesterov else moved
        moment = _moment(exp_avg_sqs[i], r, metric[i])
        p.copy_(p.double() - lr * grad / _denominator(moment * metric[i, 2], metric[i]))
        exp_avg_sqs[i].copy_(moment)


def _updates(
    params: Sequence[Tensor],
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    coefficients: Tensor,
    scales: Sequence[Tensor],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each parameter with its update and its retain gradient in float64."""
    for p, f, r, row in zip(params, _in_float64(forget, scales), retain, rows, strict=True):
        a, b = coefficients[row]
        r64 = _present(r.double(), p)
        yield p, a * _present(f, p) + b * r64, r64


def _present(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient, zeros where it is absent, in the shape of ``like``."""
    return grad.reshape(like.shape) if grad.numel() else torch.zeros_like(like, dtype=torch.float64)


def _moment(v: Tensor, r: Tensor, numbers: Tensor) -> Tensor:
    return numbers[0] * v.double() + numbers[1] * r.square()


def _denominator(corrected: Tensor, numbers: Tensor) -> Tensor:
    return (corrected + numbers[3]).sqrt() + numbers[4]


def _in_float64(forget: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:
    return [
        dequantize(f, scales[i], torch.float64) if f.dtype == torch.int8 else f.double() for i, f in enumerate(forget)
    ]
