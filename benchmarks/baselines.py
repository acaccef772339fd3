"""What people do today, rendered from its description: the original code's way, plain torch calls, torch.compile."""

from collections.abc import Sequence

import torch
from torch import Tensor


def original_dots(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> tuple[float, float]:
    """The original research code: three products per parameter, each read on the host."""
    dot = norm = 0.0
    for f, r in zip(forget, retain, strict=True):
        dot += (r * f).sum().item()
        norm += (f * f).sum().item()
    return dot, norm


def original_combine(forget: Sequence[Tensor], retain: Sequence[Tensor], xi: float) -> list[Tensor]:
    """The original research code: the update in new tensors."""
    return [r + xi * f for f, r in zip(forget, retain, strict=True)]


def original_update(forget: Sequence[Tensor], retain: Sequence[Tensor], gamma: float) -> list[Tensor]:
    """Clones, host reads, new tensors: the projection as the original code takes it."""
    forget, retain = [f.clone() for f in forget], [r.clone() for r in retain]
    dot, norm = original_dots(forget, retain)
    return original_combine(forget, retain, gamma - dot / norm)


def torch_dots(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> Tensor:
    """Three torch.dot a tensor, summed on the device."""
    rows = [
        torch.stack(
            [torch.dot(r.view(-1), f.view(-1)), torch.dot(f.view(-1), f.view(-1)), torch.dot(r.view(-1), r.view(-1))]
        )
        for f, r in zip(forget, retain, strict=True)
    ]
    return torch.stack(rows).double().sum(0, keepdim=True)


def plain_dots(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> Tensor:
    """What one writes for torch.compile: products and sums in float32."""
    rows = [
        torch.stack([(r.float() * f.float()).sum(), f.float().square().sum(), r.float().square().sum()])
        for f, r in zip(forget, retain, strict=True)
    ]
    return torch.stack(rows).double().sum(0, keepdim=True)


def plain_blend_(retain: Sequence[Tensor], forget: Sequence[Tensor], coefficients: Tensor) -> None:
    a, b = coefficients.float().flatten()
    for r, f in zip(retain, forget, strict=True):
        r.copy_(a * f.float() + b * r.float())
