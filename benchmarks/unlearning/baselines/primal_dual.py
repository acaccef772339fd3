"""Primal-dual unlearning (PDU, arXiv:2506.05314): retaining is a constraint, and its multiplier a variable."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..two_gradients import TwoGradients

DUAL_STEP = 1.0  # the released code's
SLACK = 0.02  # nats per token that the retain loss may rise: 2 % of the probability of a row that is known


class PrimalDual(TwoGradients):
    r"""Descend the Lagrangian of "least forget loss under a bound on the retain loss", and ascend in its multiplier.

    .. math:: u = \gamma g_f + \lambda g_r, \qquad \lambda \leftarrow \max(0,\, \lambda + \eta\,(r - \varepsilon))

    λ begins at 1, and ε is the retain loss of the first step plus ``SLACK``. The paper's own forget loss, bounded
    below, is ``margin``: see ``losses``.
    """

    def __init__(self, params: Iterable[nn.Parameter], gamma: float, **base_kwargs: Any) -> None:
        super().__init__(params, gamma, **base_kwargs)
        self.multiplier, self.bound = 1.0, None

    def step(self, forget: Any, retain: Any) -> tuple[Tensor, Tensor]:
        """Take one step, then move the multiplier by what the retain loss was."""
        forget_loss, retain_loss = super().step(forget, retain)
        loss = float(retain_loss)
        if self.bound is None:
            self.bound = loss + SLACK
        self.multiplier = max(0.0, self.multiplier + DUAL_STEP * (loss - self.bound))
        return forget_loss, retain_loss

    def update(self, forget_grads: list[Tensor], retain_grads: list[Tensor]) -> None:
        self.seen |= {"forget_coefficient": self.gamma, "retain_coefficient": self.multiplier}
        pairs = zip(forget_grads, retain_grads, strict=True)
        self.base_step([self.gamma * f + self.multiplier * r for f, r in pairs])
