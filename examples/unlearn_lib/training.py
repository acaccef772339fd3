"""The Trainer of a run: its arguments, what it tells and writes, and how it ends."""

import argparse
import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from shared_lib.errors import InputError, TrainingError
from transformers import TrainerCallback

from blur_optim.integrations.stopping import StopAtHoldout, load_ended, reached_at
from blur_optim.integrations.transformers import BLURTrainer, BLURTrainingArguments
from blur_optim.losses.forward import adapter_owner

from .data import NEVER_SEEN, Data
from .tokens import collate


def make_arguments(options: argparse.Namespace, folder: Path) -> BLURTrainingArguments:
    """Return the Trainer's arguments; checkpoints go to ``folder``.

    Raises:
        InputError: this machine can't do what is asked for.
    """
    try:
        return BLURTrainingArguments(
            str(folder),
            **_method(options),
            **_schedule(options),
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            bf16=options.bf16,
            **(_checkpointing() if options.gradient_checkpointing else {}),
            use_cpu=options.cpu or not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.accelerator.is_available(),
            ddp_find_unused_parameters=False,
            seed=options.seed,
            save_strategy="steps" if options.save_steps else "epoch",
            save_steps=options.save_steps or 500,
            save_total_limit=1,
            logging_steps=options.log_steps,
            logging_first_step=True,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
        )
    except ValueError as error:
        raise InputError(f"These options cannot be used here: {str(error).splitlines()[0]}") from error


def _method(options: argparse.Namespace) -> dict[str, Any]:
    same = ("retain_loss", "beta", "gamma", "retain_weight", "rule", "normalize", "scope", "stash", "metric", "damping")
    return {"forget_loss": options.method, "epoch_over": "forget", **{name: getattr(options, name) for name in same}}


def _checkpointing() -> dict[str, Any]:
    # The newer of two names that transformers has for it, where it has both.
    names = {field.name for field in fields(BLURTrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _schedule(options: argparse.Namespace) -> dict[str, Any]:
    scheduler = "constant_with_warmup" if options.scheduler == "constant" and options.warmup else options.scheduler
    return {
        "learning_rate": options.lr,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        "gradient_accumulation_steps": options.accumulation,
        "lr_scheduler_type": scheduler,
        "warmup_steps": options.warmup,
    }


def count_steps(options: argparse.Namespace, rows: int, processes: int) -> int:
    """Return how many steps the Trainer will take."""
    batches = math.ceil(rows / (options.batch_size * processes))
    return options.max_steps or math.ceil(options.epochs * math.ceil(batches / options.accumulation))


def make_trainer(
    model: Any, args: BLURTrainingArguments, data: Data, logbook: "Logbook", options: argparse.Namespace
) -> BLURTrainer:
    """Return the Trainer. KL compares with a copy of the model where there is no adapter to switch off."""
    needs_copy = args.retain_loss == "kl" and adapter_owner(model) is None
    trainer = BLURTrainer(
        model,
        args,
        collate,
        forget_dataset=data.forget,
        retain_dataset=data.retain,
        reference=copy.deepcopy(model) if needs_copy else None,
    )
    if getattr(trainer, "is_fsdp_enabled", False):
        raise InputError("FSDP was asked for by accelerate, and is not for this script. Use examples/fsdp2.py.")
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
        trainer.remove_callback(callback)
    if options.stop_at is not None:
        holdout = data.sets[NEVER_SEEN]
        trainer.add_callback(StopAtHoldout(trainer, holdout, every=options.stop_every, rows=options.eval_rows))
    trainer.add_callback(logbook)  # Last: what is refused when training begins leaves no log.
    return trainer


def train(trainer: BLURTrainer, checkpoint: Path | None) -> None:
    """Train to the end, from a checkpoint where there is one. One that was written at the end is only loaded."""
    if checkpoint is not None and reached_at(checkpoint) is not None:
        load_ended(trainer, checkpoint)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def stop_checkpointing(model: Any) -> None:
    """Keep activations again, and cache them while generating."""
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    model.config.use_cache = True


@contextmanager
def explaining(options: argparse.Namespace) -> Iterator[None]:
    """Tell what to do where memory did not suffice, or the reference is another model's.

    Raises:
        TrainingError, InputError: in the place of torch's and this library's own.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the memory of the GPU did not suffice. Try a --batch-size smaller than {options.batch_size} with more "
            "--accumulation, --gradient-checkpointing, --stash int8 or --lora."
        ) from error
    except (ValueError, FileNotFoundError) as error:  # Its file is missing, damaged or another model's.
        known = ("reference", "log-probabilit", "`holdout`")
        if not any(word in str(error) for word in known):
            raise
        if "`holdout`" in str(error):
            raise InputError(f"--stop-at: {error}") from error
        if "finite" in str(error):
            raise InputError(f"--model: {error} Are its weights finite?") from error
        raise InputError(f"{error} Begin anew with --overwrite.") from error


class Logbook(TrainerCallback):
    """Writes every log as a line of JSON, prints it in short, and moves the bar; on the first process alone."""

    def __init__(self, path: Path, progress: Progress, speaks: bool) -> None:
        self.path, self.progress, self.speaks = path, progress, speaks
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Begin with what was logged before the checkpoint that the run goes on from."""
        if self.speaks:
            self.path.write_text("".join(json.dumps(log) + "\n" for log in state.log_history), encoding="utf-8")
            self.bar = self.progress.add_task("unlearning", total=state.max_steps, note="", completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Move the bar."""
        if self.speaks:
            self.progress.update(self.bar, completed=state.global_step, note=f"step {state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Write and print the last entry."""
        if not self.speaks:
            return
        log = state.log_history[-1]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(log) + "\n")
        if "blur_cosine" in log:
            self.progress.console.print(_in_short(log))
        if "stop_forget_log_prob" in log:
            self.progress.console.print(
                f"step {log['step']:>5}  forget {log['stop_forget_log_prob']:.3f} nats a token, to stop at "
                f"{log['stop_holdout_log_prob']:.3f}"
            )


def _in_short(log: dict[str, Any]) -> str:
    return (
        f"step {log['step']:>5}  forget loss {log['forget_loss']:.4f}  retain loss {log['retain_loss']:.4f}  "
        f"cosine {log['blur_cosine']:+.3f}  lr {log['learning_rate']:.2g}"
    )
