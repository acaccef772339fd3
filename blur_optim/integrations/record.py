"""A file of what each step of a Trainer saw: :class:`blur_optim.record.recorder.Recorder` as a callback."""

from __future__ import annotations

import os
from typing import Any

from blur_optim.integrations.trainer_step import BLURStepMixin
from blur_optim.record.recorder import Recorder

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "`transformers` must be installed for RecordCallback. `pip install 'blur_optim[transformers]'`."
    ) from error


class RecordCallback(TrainerCallback):
    """Record the steps of a trainer. ``BLURTrainingArguments(record="run.jsonl")`` adds one; in open-unlearning do so
    by hand: ``trainer.add_callback(RecordCallback(trainer, "run.jsonl"))``.

    Each line has ``forget_loss`` and ``retain_loss``, the means of the step's micro-batches on the main process. A run
    that is resumed from a checkpoint goes on in the file at the checkpoint's step.

    Args:
        trainer: the trainer that it is added to.
        path, **options: as :class:`blur_optim.record.recorder.Recorder` takes them.
    """

    def __init__(self, trainer: BLURStepMixin, path: str | os.PathLike[str], **options: Any) -> None:
        self.trainer, self.path, self.options = trainer, path, options
        self.recorder: Recorder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()  # One that a run has left which ended in an error.
        blur, model = self.trainer.blur, kwargs.get("model")
        self.recorder = Recorder(self.path, blur, model=model, step=state.global_step, **self.options)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not at the end of the step: the scheduler has then set the next learning rate.
        if self.recorder is not None and self.trainer.last_losses is not None:
            forget, retain = self.trainer.last_losses
            self.recorder.record(step=state.global_step + 1, forget_loss=forget, retain_loss=retain)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None
