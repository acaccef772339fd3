"""The ways to take an unlearning step on a sharded model."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from blur_optim import BLUR
from blur_optim.losses import ga_loss, nll_loss
from blur_optim.parallel.ranks import like, to_local
from blur_optim.step.stash import STASHES

Step = Callable[[], object]


class Problem:
    """A model, a batch to forget and one to retain.

    Args:
        before_forward: called before each forward pass.
    """

    def __init__(self, model: PreTrainedModel, batch: int, length: int, before_forward: Callable[[], object]) -> None:
        self.model, self.before_forward = model, before_forward
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.ids = torch.zeros(batch, length, dtype=torch.long, device=self.params[0].device)

    def forget_loss(self) -> Tensor:
        return ga_loss(self._logits(), self.ids)

    def retain_loss(self) -> Tensor:
        return nll_loss(self._logits(), self.ids)

    def _logits(self) -> Tensor:
        self.before_forward()
        return self.model(input_ids=self.ids).logits


def weighted_sum(problem: Problem) -> tuple[AdamW, Step]:
    """The gradients of both losses add up in ``p.grad``, one after the other: as little memory as training takes."""
    adamw = AdamW(problem.params, lr=1e-5, fused=True)

    def step() -> None:
        problem.forget_loss().backward()
        problem.retain_loss().backward()
        adamw.step()
        adamw.zero_grad()

    return adamw, step


def blur(problem: Problem, stash: str) -> tuple[BLUR, Step]:
    opt = BLUR(problem.params, AdamW, stash=stash, lr=1e-5, fused=True)
    return opt, lambda: opt.step(problem.forget_loss, problem.retain_loss)


def original(problem: Problem) -> tuple[AdamW, Step]:
    """Clones of both gradient sets and the update beside them, as the original research code has it.

    Two things are cheaper here: the graph of the forget loss is freed before the retain loss is computed, and no
    product is read on the host.
    """
    adamw = AdamW(problem.params, lr=1e-5, fused=True)

    def clones(loss: Tensor) -> list[Tensor]:
        loss.backward()
        grads = [to_local(p.grad).clone() for p in problem.params]
        adamw.zero_grad()
        return grads

    def step() -> None:
        forget, retain = clones(problem.forget_loss()), clones(problem.retain_loss())
        dot = sum((r * f).sum() for f, r in zip(forget, retain, strict=True))
        norm = sum((f * f).sum() for f in forget)
        xi = 1.0 - dot / norm
        for p, f, r in zip(problem.params, forget, retain, strict=True):
            p.grad = like(r + xi * f, p)
        adamw.step()
        adamw.zero_grad()

    return adamw, step


#: By name: a title, and what makes the optimizer and its step.
METHODS: dict[str, tuple[str, Callable[[Problem], tuple[AdamW | BLUR, Step]]]] = {
    "weighted_sum": ("weighted sum", weighted_sum),
    **{name: (f"BLUR, {name}", partial(blur, stash=name)) for name in STASHES},
    "original": ("original code", original),
}
