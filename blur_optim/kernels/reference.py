"""The equations themselves, in float64 and plain PyTorch: what the other backends are checked against."""

from collections.abc import Sequence

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
        if v.dtype != torch.int8:
            v.copy_(grad)
            continue
        # In float32, in which the scale is kept: what the others are to have the bits of.
        target, blocks = memory_order(v), torch.split(memory_order(grad).float(), BLOCK_SIZE)
        for b, block in enumerate(blocks):
            scales[i][b] = block.abs().max() / 127
            integers = (block / scales[i][b]).round().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            target[b * BLOCK_SIZE : (b + 1) * BLOCK_SIZE] = integers.to(torch.int8)


def _in_float64(forget: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:
    return [
        dequantize(f, scales[i], torch.float64) if f.dtype == torch.int8 else f.double() for i, f in enumerate(forget)
    ]
