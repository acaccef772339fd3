"""Selective synaptic dampening (SSD, arXiv:2308.07707): shrink the weights that matter to what is forgotten."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..two_gradients import TwoGradients


class Dampening(TwoGradients):
    r"""Measure the diagonal Fisher of both losses for half of the steps, then dampen from gentle to strong.

    .. math:: \theta_i \leftarrow \min\bigl(\lambda\, I_{r,i} / I_{f,i},\, 1\bigr)\,\theta_i
        \quad\text{where}\quad I_{f,i} > \alpha\, I_{r,i}

    with I the mean squared gradient of a batch of rows, λ = γ, and α falling from 1000 to 1 along the second half of
    the steps, each from the weights before: so the looks along the way see every strength. It has no learning rate.
    The paper's I_D is of all data; here it is of the rows to keep.

    Args:
        steps: all that will be taken.
    """

    def __init__(self, params: Iterable[nn.Parameter], gamma: float, steps: int, **base_kwargs: Any) -> None:
        super().__init__(params, gamma, **base_kwargs)
        self.measured, self.rest = steps // 2, max(1, steps - steps // 2 - 1)
        self.taken = 0
        self.forget_fisher = [torch.zeros_like(p) for p in self.params]
        self.retain_fisher = [torch.zeros_like(p) for p in self.params]
        self.before = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self, forget_grads: list[Tensor], retain_grads: list[Tensor]) -> None:
        if self.taken < self.measured:
            torch._foreach_addcmul_(self.forget_fisher, forget_grads, forget_grads)
            torch._foreach_addcmul_(self.retain_fisher, retain_grads, retain_grads)
        else:
            self.dampen(1000.0 ** (1 - (self.taken - self.measured) / self.rest))
        self.base.step()  # Of no gradients: the schedule wants to see it.
        self.taken += 1

    def dampen(self, alpha: float) -> None:
        """Set the parameters to what selectivity ``alpha`` makes of those before."""
        for p, before, f, r in zip(self.params, self.before, self.forget_fisher, self.retain_fisher, strict=True):
            factor = torch.where(f > alpha * r, (self.gamma * r / f).clamp(max=1), 1.0)
            p.copy_(before * factor)
