"""What people do today: the original code's way (from its description), plain torch calls, torch.compile, packages."""

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer


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


Loss = Callable[[], Tensor]
#: Is shown gradients that are kept beside ``p.grad``, so that a tracker can name their memory.
Hold = Callable[[Iterable[Tensor]], None]


def original_step(
    params: Sequence[Tensor], optimizer: Optimizer, forget: Loss, retain: Loss, gamma: float, hold: Hold
) -> None:
    """The original research code: both forward passes first, and the first graph kept until the end of the step.

    Up to four gradient sets: two clones, ``p.grad``, and the update, which takes its place parameter by parameter.
    """
    forget_loss, retain_loss = forget(), retain()
    forget_loss.backward(retain_graph=True)
    forget_grads = [p.grad.clone() for p in params]
    hold(forget_grads)
    optimizer.zero_grad()
    retain_loss.backward()
    retain_grads = [p.grad.clone() for p in params]
    hold(retain_grads)
    dot, norm = original_dots(forget_grads, retain_grads)
    xi = gamma - dot / norm
    for p, f, r in zip(params, forget_grads, retain_grads, strict=True):
        p.grad = r + xi * f
    optimizer.step()
    optimizer.zero_grad()


def torchjd_step(
    params: Sequence[Tensor],
    optimizer: Optimizer,
    forget: Loss,
    retain: Loss,
    gamma: float,
    hold: Hold,
    lean: bool = False,
) -> None:
    """TorchJD's Jacobian of both losses, and the method's two coefficients from its Gramian.

    ``mtl_backward`` is for parameters that belong to one loss alone, of which there are none here.

    Args:
        lean: one loss after the other, and the Gramian parameter by parameter: the ways to save memory that its
            documentation names.
    """
    from torchjd.aggregation import GramianWeightedAggregator, Weighting
    from torchjd.autojac import backward, jac_to_grad

    class BLURWeighting(Weighting):
        def forward(self, gramian: Tensor, /) -> Tensor:
            xi = gamma - gramian[1, 0] / gramian[0, 0]
            return torch.stack([xi, torch.ones_like(xi)])

    with warnings.catch_warnings():
        # It differentiates both losses at once by vmap, for which scaled_dot_product_attention has no batching rule.
        warnings.filterwarnings("ignore", "There is a performance drop")
        backward([forget(), retain()], inputs=params, parallel_chunk_size=1 if lean else None)
    hold(p.jac for p in params)
    jac_to_grad(params, GramianWeightedAggregator(BLURWeighting()), optimize_gramian_computation=lean)
    optimizer.step()
    optimizer.zero_grad()


def pcgrad_step(optimizer: Optimizer, forget: Loss, retain: Loss) -> None:
    """PCGrad of the package pytorch-optimizer."""
    from pytorch_optimizer import PCGrad

    wrapper = PCGrad(optimizer, reduction="sum")
    wrapper.pc_backward([forget(), retain()])
    wrapper.step()
    wrapper.zero_grad()
