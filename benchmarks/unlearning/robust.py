"""Bi-level steps that a noisy gradient cannot throw off: rules and an optimizer that remember.

With batches of a few rows both gradients are mostly noise, and so is :math:`c = \\langle g_r, g_f\\rangle/\\|g_f\\|^2`.
What is averaged over steps is noise no longer.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from blur_optim.step.rules import Dots, blur

DECAY = 0.9


class _Average:
    """An exponential average, without the bias of a start at zero."""

    def __init__(self, decay: float) -> None:
        self.decay, self.total, self.weight = decay, 0.0, 0.0

    def add(self, value: Tensor) -> Tensor:
        if not value.isfinite():  # This step will be skipped; the next ones are to find the average as it was.
            return value
        self.total = self.decay * self.total + (1 - self.decay) * value
        self.weight = self.decay * self.weight + (1 - self.decay)
        return self.total / self.weight


class AveragedDots:
    r"""The paper's rule on running averages: :math:`c = E[\langle g_r, g_f\rangle] / E[\|g_f\|^2]`.

    A step whose forget gradient is small by chance no longer gets a huge c.
    """

    def __init__(self, decay: float = DECAY) -> None:
        self.dot, self.norm = _Average(decay), _Average(decay)

    def __call__(self, dots: Dots, gamma: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        averages = Dots(self.dot.add(dots.retain_forget), self.norm.add(dots.forget_norm_sq), dots.retain_norm_sq)
        return blur(averages, gamma, alpha)


class AveragedCosine:
    r"""The paper's rule with the running average of the cosine: :math:`c = E[\cos]\,\|g_r\|/\|g_f\|`.

    The norms, which a step knows well and which change by orders of magnitude, are its own.
    """

    def __init__(self, decay: float = DECAY) -> None:
        self.cosine = _Average(decay)

    def __call__(self, dots: Dots, gamma: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        norms = (dots.forget_norm_sq * dots.retain_norm_sq).sqrt()
        cosine = self.cosine.add(torch.where(norms > 0, dots.retain_forget / norms, 0.0))
        return blur(dots._replace(retain_forget=cosine * norms), gamma, alpha)


class Bloop:
    r"""Project the retain gradient on what is orthogonal to the *averaged* forget gradient.

    .. math:: u = \gamma g_f + g_r - \frac{\langle g_r, m\rangle}{\|m\|^2} m, \quad m = E[g_f]    (arXiv:2407.02158)

    The update has a third direction, so this is no rule: it keeps one more gradient set, and takes passes of its own.

    Args:
        params: as for ``base``.
        gamma: weight of the forget gradient; >= 0.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        gamma: float,
        base: Callable[..., Optimizer] = AdamW,
        decay: float = DECAY,
        **base_kwargs: Any,
    ) -> None:
        self.params, self.gamma, self.decay = list(params), gamma, decay
        self.base = base(self.params, **base_kwargs)
        self.mean = [torch.zeros_like(p) for p in self.params]
        self.seen: dict[str, float] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @property
    def statistics(self) -> "Bloop":
        return self

    def to_dict(self) -> dict[str, float]:
        """Return what the last step saw; the coefficients are those of g_f, g_r."""
        return self.seen

    def step(self, forget: Callable[[], Tensor], retain: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Take one step; the closures return a loss and call backward."""
        forget_loss, forget_grads = self._gradients(forget)
        retain_loss, retain_grads = self._gradients(retain)
        torch._foreach_lerp_(self.mean, forget_grads, 1 - self.decay)  # Its scale does not matter: nor does its bias.
        c = _dot(retain_grads, self.mean) / _dot(self.mean, self.mean).clamp(min=torch.finfo(torch.float64).tiny)
        for p, f, r, m in zip(self.params, forget_grads, retain_grads, self.mean, strict=True):
            p.grad = self.gamma * f + r - c.to(m.dtype) * m
        self._note(forget_grads, retain_grads)
        self.base.step()
        self.base.zero_grad()
        return forget_loss, retain_loss

    def _gradients(self, closure: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        loss = closure()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        self.base.zero_grad()
        return loss.detach(), grads

    def _note(self, forget: list[Tensor], retain: list[Tensor]) -> None:
        dot, f, r = _dot(retain, forget), _dot(forget, forget), _dot(retain, retain)
        update = [p.grad for p in self.params if p.grad is not None]
        self.seen = {
            "cosine": float(torch.where(f * r > 0, dot / (f * r).sqrt(), 0.0)),
            "dot_retain_forget": float(dot),
            "forget_norm": float(f.sqrt()),
            "retain_norm": float(r.sqrt()),
            "forget_coefficient": self.gamma,
            "retain_coefficient": 1.0,
            "update_norm": float(_dot(update, update).sqrt()),
        }


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum()
