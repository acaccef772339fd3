"""HAMU (arXiv:2606.02119): the retain step, made to gain a fixed amount of forgetting."""

import torch
from torch import Tensor

from blur_optim.step.rules import Dots


class ForgetGain:
    r"""Descend the retain loss within a radius, under the condition that the forget loss falls by q or more (HAMU-Q).

    .. math:: \min_u -\langle g_r, u\rangle \quad\text{subject to}\quad \langle g_f, u\rangle \ge q,\; \|u\| \le \|g_r\|

    which is :math:`u = g_r` where that gains enough, and otherwise
    :math:`u = q\, g_f/\|g_f\|^2 + \tau\, g_r^\perp` with :math:`g_r^\perp` what of :math:`g_r` is orthogonal to
    :math:`g_f` and τ such that the radius is used up (0 where q alone exceeds it). Scalars of the dots alone, so it is
    a rule; a class, since q is remembered: γ times :math:`\|g_f\|^2` of the first step, at which γ means what it does
    for BLUR.
    """

    def __init__(self) -> None:
        self.gain: Tensor | None = None

    def __call__(self, dots: Dots, gamma: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        if self.gain is None:
            self.gain = gamma * dots.forget_norm_sq
        if dots.forget_norm_sq <= 0 or dots.retain_forget >= self.gain:
            return torch.zeros_like(gamma), alpha
        along = dots.retain_forget / dots.forget_norm_sq
        orthogonal = dots.retain_norm_sq - along * dots.retain_forget
        room = (dots.retain_norm_sq - self.gain**2 / dots.forget_norm_sq).clamp(min=0)
        tau = torch.where(orthogonal > 0, (room / orthogonal).sqrt(), 0.0)
        return self.gain / dots.forget_norm_sq - tau * along, tau
