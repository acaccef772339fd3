"""BLUR in a LightningModule: manual optimisation, two phases in a training step, everything else Lightning's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from blur_optim.integrations.trainer_checks import checked_loss
from blur_optim.optimizer import BLUR
from blur_optim.record.recorder import Recorder

try:
    from lightning.pytorch import Callback, LightningModule
except ImportError as error:
    raise ImportError("`lightning` must be installed for BLURModule. `pip install 'blur_optim[lightning]'`.") from error


class LightningBLUR(BLUR):
    """:class:`blur_optim.BLUR` for Lightning, which hands every optimizer a closure, also one that computes nothing."""

    def step(self, forget: Any = None, retain: Any = None, *, closure: Any = None) -> Any:  # type: ignore[override]
        """As :meth:`BLUR.step`; ``closure`` runs the module's hooks before the step, on the update in ``p.grad``."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        return super().step(forget, retain)


class BLURModule(LightningModule):
    """A LightningModule whose ``training_step`` is one BLUR step.

    Example::

        class Unlearn(BLURModule):
            def training_step(self, batch, index):
                self.blur_step(forget=[batch["forget"]], retain=[batch["retain"]])
            def forget_loss(self, batch): ...
            def retain_loss(self, batch): ...
            def configure_optimizers(self):
                return LightningBLUR(self.parameters(), torch.optim.AdamW, lr=1e-5)

    Lists of several batches are micro-batches: each loss is their mean. Pairs of batches come from a
    ``CombinedLoader`` of two loaders. ``Trainer(gradient_clip_val=...)`` and ``accumulate_grad_batches`` are for
    automatic optimisation, and Lightning refuses them here: use ``LightningBLUR(max_grad_norm=...)`` and longer lists.
    """

    #: Records each step; :class:`RecordCallback` sets it.
    recorder: Recorder | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def forget_loss(self, batch: Any) -> Tensor:
        """The forget loss of one micro-batch, 0-d: descending it forgets."""
        raise NotImplementedError("Define `forget_loss(self, batch)`.")

    def retain_loss(self, batch: Any) -> Tensor:
        """The retain loss of one micro-batch, 0-d."""
        raise NotImplementedError("Define `retain_loss(self, batch)`.")

    def blur_step(self, forget: Sequence[Any], retain: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Run both phases, take one step, log ``forget_loss``, ``retain_loss`` and ``blur_cosine``, and record the step
        where there is a :class:`RecordCallback`.

        Learning-rate schedulers are yours to step, as always under manual optimisation.

        Args:
            forget, retain: lists of micro-batches, at least one in each.
        Returns:
            The two losses, 0-d, detached: means over micro-batches.
        Raises:
            TypeError: ``configure_optimizers`` gave something else than one :class:`LightningBLUR`, or ``forget`` or
                ``retain`` is a batch rather than a list of batches, or a loss is not a 0-d tensor.
            ValueError: one of the lists is empty.
        """
        optimizer, blur = self._optimizers()
        _check_batches("forget", forget)
        _check_batches("retain", retain)
        with blur.forget():
            forget_loss = self._run_phase("forget", self.forget_loss, forget)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        with blur.retain(grad_scale=scaler):
            retain_loss = self._run_phase("retain", self.retain_loss, retain)
        optimizer.step()
        optimizer.zero_grad()
        self.log_dict({"forget_loss": forget_loss, "retain_loss": retain_loss}, prog_bar=True)
        if blur.statistics is not None:
            self.log("blur_cosine", blur.statistics.cosine.float())
        if self.recorder is not None:
            self.recorder.record(forget_loss=forget_loss, retain_loss=retain_loss)
        return forget_loss, retain_loss

    def _optimizers(self) -> tuple[Any, LightningBLUR]:
        """The optimizer as Lightning has wrapped it, and the one inside."""
        optimizer: Any = self.optimizers()
        blur = getattr(optimizer, "optimizer", None)
        if not isinstance(blur, LightningBLUR):
            raise TypeError(
                f"`configure_optimizers` must give one LightningBLUR, got {type(blur or optimizer).__name__}."
            )
        return optimizer, blur

    def _run_phase(self, name: str, compute: Callable[[Any], Tensor], batches: Sequence[Any]) -> Tensor:
        total = torch.zeros((), device=self.device)
        for position, batch in enumerate(batches, start=1):
            # Each phase has to end reduced over the processes.
            with self._no_sync() if position < len(batches) else nullcontext():
                loss = checked_loss(f"{name}_loss", compute(batch)) / len(batches)
                self.manual_backward(loss)
            total += loss.detach()
        return total

    def _no_sync(self) -> AbstractContextManager[Any]:
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        context: AbstractContextManager[Any] = nullcontext() if block is None else block()
        return context


def _check_batches(name: str, batches: Any) -> None:
    if not isinstance(batches, list | tuple):
        raise TypeError(f"`{name}` must be a list of batches, got {type(batches).__name__}. Wrap one batch: [batch].")
    if not batches:
        raise ValueError(f"`{name}` must hold at least one batch, got none.")


class RecordCallback(Callback):
    """Record what each ``blur_step`` saw (in transformers' Trainer: ``integrations.record.RecordCallback``).

    Example: ``Trainer(callbacks=[RecordCallback("run.jsonl", alignment=True)])``.

    Each line has the two losses, of the first process's micro-batches. A run that is resumed from a checkpoint goes on
    in the file at the checkpoint's step.

    Args:
        path, **options: as :class:`blur_optim.record.recorder.Recorder` takes them.

    Raises:
        TypeError: when training begins, if the module is no :class:`BLURModule`.
    """

    def __init__(self, path: str | os.PathLike[str] | None, **options: Any) -> None:
        self.path, self.options = path, options

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not isinstance(pl_module, BLURModule):
            raise TypeError(f"RecordCallback needs a BLURModule, got {type(pl_module).__name__}.")
        options = {"model": pl_module, "step": trainer.global_step, **self.options}
        pl_module.recorder = Recorder(self.path, pl_module._optimizers()[1], **options)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close(pl_module)

    @staticmethod
    def _close(pl_module: Any) -> None:
        if isinstance(pl_module, BLURModule) and pl_module.recorder is not None:
            pl_module.recorder.close()
            pl_module.recorder = None
