"""What the benchmark's own optimizers share: both gradients apart, a step made of them, and what it saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

Closure = Callable[[], Tensor]


class TwoGradients:
    """Take ``step(forget, retain)`` as BLUR does, over a base optimizer; a method says in ``update`` what it does.

    Args:
        params: as for ``base``.
        gamma: the weight of the forget gradient; >= 0.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        gamma: float,
        base: Callable[..., Optimizer] = AdamW,
        **base_kwargs: Any,
    ) -> None:
        self.params, self.gamma = list(params), gamma
        self.base = base(self.params, **base_kwargs)
        self.seen: dict[str, float] = {}

    def update(self, forget_grads: list[Tensor], retain_grads: list[Tensor]) -> None:
        """Change the parameters. Both lists are in the order of ``params``; they may be overwritten."""
        raise NotImplementedError

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @property
    def statistics(self) -> TwoGradients:
        return self

    def to_dict(self) -> dict[str, float]:
        """Return what the last step saw."""
        return self.seen

    def step(self, forget: Closure, retain: Closure) -> tuple[Tensor, Tensor]:
        """Take one step; the closures return a loss and call backward."""
        forget_loss, forget_grads = self._gradients(forget)
        retain_loss, retain_grads = self._gradients(retain)
        self.seen = angle(forget_grads, retain_grads)
        self.update(forget_grads, retain_grads)
        return forget_loss, retain_loss

    def base_step(self, update: Sequence[Tensor]) -> None:
        """Let the base optimizer step along ``update``."""
        for p, grad in zip(self.params, update, strict=True):
            p.grad = grad
        self.base.step()
        self.base.zero_grad()

    def _gradients(self, closure: Closure) -> tuple[Tensor, list[Tensor]]:
        loss = closure()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        self.base.zero_grad()
        return loss.detach(), grads


def angle(forget_grads: Sequence[Tensor], retain_grads: Sequence[Tensor]) -> dict[str, float]:
    """Return the norms of both gradients, their dot and their cosine."""
    dot_, f, r = dot(retain_grads, forget_grads), dot(forget_grads, forget_grads), dot(retain_grads, retain_grads)
    return {
        "cosine": float(torch.where(f * r > 0, dot_ / (f * r).sqrt(), 0.0)),
        "dot_retain_forget": float(dot_),
        "forget_norm": float(f.sqrt()),
        "retain_norm": float(r.sqrt()),
    }


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the dot product of two lists of tensors: 0-d float64."""
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum()
