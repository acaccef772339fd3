"""The equations themselves, in float64 and plain PyTorch: what the other backends are checked against."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blur_optim.kernels.blocks import dequantize


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


def _in_float64(forget: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:
    return [
        dequantize(f, scales[i], torch.float64) if f.dtype == torch.int8 else f.double() for i, f in enumerate(forget)
    ]
