"""DualOptim (arXiv:2504.15827): each loss with Adam moments of its own, in turn."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..two_gradients import Closure, TwoGradients, angle


class DualMoments(TwoGradients):
    r"""Step down the forget loss, then down the retain loss at where that led, with separate moments.

    .. math::
        \theta' = \theta - \gamma\eta\, A_f(\nabla f(\theta)), \qquad
        \theta'' = \theta' - \eta\, A_r(\nabla r(\theta'))

    with :math:`A_f, A_r` the steps of two AdamWs. The paper's two learning rates are γη and η. Decay is the second
    one's alone, so that it is as strong as elsewhere.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        gamma: float,
        base: Callable[..., Optimizer] = AdamW,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(params, gamma, base, **base_kwargs)
        self.forget_base = base(self.params, **(base_kwargs | {"weight_decay": 0.0}))

    def step(self, forget: Closure, retain: Closure) -> tuple[Tensor, Tensor]:
        """Take one step; the retain closure sees what the forget step made."""
        forget_loss, forget_grads = self._gradients(forget)
        for group, other in zip(self.forget_base.param_groups, self.base.param_groups, strict=True):
            group["lr"] = self.gamma * other["lr"]
        for p, grad in zip(self.params, forget_grads, strict=True):
            p.grad = grad
        self.forget_base.step()
        self.forget_base.zero_grad()
        retain_loss, retain_grads = self._gradients(retain)
        self.seen = angle(forget_grads, retain_grads)
        self.base_step(retain_grads)
        return forget_loss, retain_loss
