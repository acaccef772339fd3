"""The bi-level step in the metric of the retain loss, written plainly: for ablations, and to hold the library to.

``blur-metric`` and all that only sets an option of it is ``BLUR(..., metric="retain")``; see ``methods``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from blur_optim.step.rules import RULES, Dots

from .two_gradients import TwoGradients, dot

# M^-1 g_f is in steps of the retain loss, of which M^-1 g_r is about one. A bounded forget loss has a gradient that
# falls exponentially with what is forgotten (NPO on TOFU: 1e-6 of its first at log p -6.5, 1e-36 at -29); scaled up
# without end it would go on for ever, and overflow.
FLOOR = 1e-8


class RetainMetric(TwoGradients):
    r"""Combine in the metric of the retain loss, M = AdamW's denominator fed by g_r alone.

    .. math::
        v &\leftarrow \beta_2 v + (1 - \beta_2)\, g_r^2, \qquad \hat v = v / (1 - \beta_2^t) \\
        M &= \mathrm{diag}\bigl((\hat v + \delta \bar v)^p\bigr) + \epsilon, \qquad
        s = 1 / \max(\mathrm{rms}(M^{-1} g_f), 10^{-8}) \\
        (a, b) &= \mathrm{rule}(\langle g_r, s g_f\rangle_{M^{-1}}, \|s g_f\|_{M^{-1}}^2, \|g_r\|_{M^{-1}}^2), \qquad
        m \leftarrow \beta_1 m + (1 - \beta_1)\,(a s\, g_f + b\, g_r) \\
        \theta &\leftarrow (1 - \eta\lambda)\,\theta - \eta\, M^{-1} m / (1 - \beta_1^t)

    γ: root mean square of the forget part of the step in units of the learning rate, whatever the loss's scale; down to
    ``FLOOR``, from where on the forget part fades with its gradient.

    Args:
        damping: δ; \bar v is the mean of \hat v over all coordinates as the step before left it (at first: this
            step's), or with ``damping_scope="parameter"`` this step's over the tensor's own.
        second_moment_of: "retain", or "sum" for g_r^2 replaced by the square of γ g_f + g_r, as AdamW has it.
        power: p; 1/2 as AdamW, 1 as the diagonal Fisher.
        floor: of the root mean square, 1e-8 in the equation.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        gamma: float,
        *,
        lr: float,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        damping: float = 0.01,
        damping_scope: str = "all",
        second_moment_of: str = "retain",
        power: float = 0.5,
        floor: float = FLOOR,
        rule: str = "blur",
        base: Any = None,
    ) -> None:
        super().__init__(params, gamma, SGD, lr=lr)
        self.weight_decay, self.betas, self.eps, self.damping = weight_decay, betas, eps, damping
        self.damping_scope, self.second_moment_of, self.power = damping_scope, second_moment_of, power
        self.floor, self.rule = floor, RULES[rule]
        self.moments = [torch.zeros_like(p) for p in self.params]
        self.second_moments = [torch.zeros_like(p) for p in self.params]
        self.steps = 0
        self.mean: Tensor | None = None
        self.count = sum(p.numel() for p in self.params)

    @torch.no_grad()
    def update(self, forget_grads: list[Tensor], retain_grads: list[Tensor]) -> None:
        self.steps += 1
        inverse = self._inverse_metric(forget_grads, retain_grads)
        steps = torch._foreach_mul(forget_grads, inverse)
        rms = (dot(steps, steps) / self.count).sqrt()
        scale = torch.where(rms > 0, 1 / rms.clamp(min=self.floor), 0.0)
        dots = Dots(
            scale * dot(retain_grads, steps),
            scale**2 * dot(forget_grads, steps),
            dot(retain_grads, torch._foreach_mul(retain_grads, inverse)),
        )
        a, b = self.rule(dots, torch.full_like(rms, self.gamma), torch.ones_like(rms))
        self._note(dots, a * scale, b)
        u = [float(a * scale) * f + float(b) * r for f, r in zip(forget_grads, retain_grads, strict=True)]
        torch._foreach_lerp_(self.moments, u, 1 - self.betas[0])
        lr = self.param_groups[0]["lr"]
        torch._foreach_mul_(self.params, 1 - lr * self.weight_decay)
        step = torch._foreach_mul(self.moments, inverse)
        torch._foreach_add_(self.params, step, alpha=-lr / (1 - self.betas[0] ** self.steps))
        self.base.step()  # Of no gradients: the schedule wants to see it.

    def _inverse_metric(self, forget_grads: list[Tensor], retain_grads: list[Tensor]) -> list[Tensor]:
        source = retain_grads
        if self.second_moment_of == "sum":
            source = torch._foreach_add(retain_grads, forget_grads, alpha=self.gamma)
        beta = self.betas[1]
        torch._foreach_mul_(self.second_moments, beta)
        torch._foreach_addcmul_(self.second_moments, source, source, 1 - beta)
        corrected = torch._foreach_div(self.second_moments, 1 - beta**self.steps)
        own = [v.mean() for v in corrected]
        overall = torch.stack([v.sum() for v in corrected]).sum() / self.count
        before, self.mean = self.mean if self.mean is not None else overall, overall
        means = own if self.damping_scope == "parameter" else [before] * len(own)
        return [
            1 / ((v + self.damping * mean) ** self.power + self.eps) for v, mean in zip(corrected, means, strict=True)
        ]

    def _note(self, dots: Dots, a: Tensor, b: Tensor) -> None:
        norms = dots.forget_norm_sq * dots.retain_norm_sq
        self.seen |= {
            "metric_cosine": float(torch.where(norms > 0, dots.retain_forget / norms.sqrt(), 0.0)),
            "forget_coefficient": float(a),
            "retain_coefficient": float(b),
        }
