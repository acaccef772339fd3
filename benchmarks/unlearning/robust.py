"""Bi-level steps that a noisy gradient cannot throw off: rules and an optimizer that remember.

With batches of a few rows both gradients are mostly noise, and so is :math:`c = \\langle g_r, g_f\\rangle/\\|g_f\\|^2`.
What is averaged over steps is noise no longer.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from blur_optim.step.rules import Dots, blur

from .two_gradients import TwoGradients, dot

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


class Bloop(TwoGradients):
    r"""Project the retain gradient on what is orthogonal to the *averaged* forget gradient.

    .. math:: u = \gamma g_f + g_r - \frac{\langle g_r, m\rangle}{\|m\|^2} m, \quad m = E[g_f]    (arXiv:2407.02158)

    The update has a third direction, so this is no rule: it keeps one more gradient set, and takes passes of its own.
    """

    def __init__(self, params: Iterable[nn.Parameter], gamma: float, decay: float = DECAY, **base_kwargs: Any) -> None:
        super().__init__(params, gamma, **base_kwargs)
        self.decay = decay
        self.mean = [torch.zeros_like(p) for p in self.params]

    def update(self, forget_grads: list[Tensor], retain_grads: list[Tensor]) -> None:
        torch._foreach_lerp_(self.mean, forget_grads, 1 - self.decay)  # Its scale does not matter: nor does its bias.
        c = dot(retain_grads, self.mean) / dot(self.mean, self.mean).clamp(min=torch.finfo(torch.float64).tiny)
        triples = zip(forget_grads, retain_grads, self.mean, strict=True)
        u = [self.gamma * f + r - c.to(m.dtype) * m for f, r, m in triples]
        self.seen |= {
            "forget_coefficient": self.gamma,
            "retain_coefficient": 1.0,
            "update_norm": float(dot(u, u).sqrt()),
        }
        self.base_step(u)
