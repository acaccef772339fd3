"""Geometric-disentanglement unlearning (GU, arXiv:2511.17100): forget along what the retain gradient does not see."""

import torch
from torch import Tensor

from ..two_gradients import TwoGradients


class RetainNormal(TwoGradients):
    r"""Take from the forget gradient what lies along the retain gradient in Adam's metric, tensor by tensor.

    .. math:: u = \gamma\Bigl(g_f - \frac{\langle g_r, H g_f\rangle}{\langle g_r, H g_r\rangle} g_r\Bigr) + g_r, \quad
        H = \mathrm{diag}\bigl(1 / (\sqrt{\hat v} + \epsilon)\bigr)

    with :math:`\hat v` the base AdamW's own second moment, of u, so that the forget part of the step that AdamW takes
    leaves r as it is to first order. The paper's retain subspace may have more directions than this batch's gradient.
    """

    def update(self, forget_grads: list[Tensor], retain_grads: list[Tensor]) -> None:
        u = [
            self.gamma * (f - _along(f, r, scale) * r) + r
            for f, r, scale in zip(forget_grads, retain_grads, self._preconditioner(), strict=True)
        ]
        self.base_step(u)

    def _preconditioner(self) -> list[Tensor]:
        """Return H of the steps so far; before the first one, of no metric: 1."""
        group = self.base.param_groups[0]
        result = []
        for p in self.params:
            state = self.base.state.get(p)
            if not state:
                result.append(torch.ones_like(p))
                continue
            corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** int(state["step"]))
            result.append(1 / (corrected.sqrt() + group["eps"]))
        return result


def _along(f: Tensor, r: Tensor, scale: Tensor) -> Tensor:
    size = (r * scale * r).sum()
    return torch.where(size > 0, (r * scale * f).sum() / size, 0.0)
