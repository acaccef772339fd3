"""One step: both gradients, each over all its micro-batches, then BLUR's update."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from blur_optim import BLUR

from .data import MicroBatch
from .losses import Loss


def step(
    model: FSDPModule,
    optimizer: BLUR,
    losses: tuple[Loss, Loss],
    parts: tuple[Sequence[MicroBatch], Sequence[MicroBatch]],
    sync_each: bool,
) -> Tensor:
    """Take one step. Return [2], this process's part of the forget and the retain loss.

    All forget micro-batches come before all retain micro-batches: BLUR needs the two gradients apart.
    """
    forget, retain = (
        lambda loss=loss, mine=mine: accumulate(model, loss, mine, sync_each)
        for loss, mine in zip(losses, parts, strict=True)
    )
    return torch.stack(optimizer.step(forget, retain))


def accumulate(model: FSDPModule, loss: Loss, parts: Sequence[MicroBatch], sync_each: bool) -> Tensor:
    """Add up the gradients of all parts, and reduce them over the processes once, with the last."""
    total = torch.zeros((), device=parts[0].batch["labels"].device)
    for number, part in enumerate(parts, start=1):
        # Without the last one BLUR would find no gradient: until then FSDP keeps it to itself.
        model.set_requires_gradient_sync(sync_each or number == len(parts))
        value = loss(part)
        value.backward()
        total += value.detach()
    return total


def set_learning_rate(optimizer: BLUR, lr: float, step_number: int, warmup: int) -> None:
    """Rise in a line over the first ``warmup`` steps. Known from the step alone, so there is no state to resume."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, (step_number + 1) / max(1, warmup))
