"""End training when what is to be forgotten is as improbable as what was never seen: a callback for a Trainer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blur_optim.losses import sequence_log_probs, token_counts
from blur_optim.losses.forward import model_logits

try:
    from transformers import TrainerCallback, TrainerState
except ImportError as error:
    raise ImportError(
        "`transformers` must be installed for StopAtHoldout. `pip install 'blur_optim[transformers]'`."
    ) from error

#: The key of ``TrainerState.stateful_callbacks`` that a checkpoint carries the level under.
STATE_KEY = "blur_stop"
# What is to be forgotten of a row with two answers: BLURTrainer's name for it, and open-unlearning's.
_FORGOTTEN = ("rejected", "original")


class StopAtHoldout(TrainerCallback):
    r"""End training when the rows to forget are as improbable as rows that the model has never seen.

    .. math:: \bar\ell_{\theta}(F) \le \bar\ell_{\theta_0}(H), \qquad
        \bar\ell_\theta(D) = \sum_{(x, y) \in D} \log \pi_\theta(y \mid x) \Big/ \sum_{(x, y) \in D} |y|

    the mean log-probability per token of the answers, in nats: minus the logarithm of their perplexity. The level on
    the right is taken once, from the model before the first step, and stays: unlearning that does harm lowers the
    probability of held-out rows too, and must not follow what it has lowered itself. A model that never saw F would
    find F about as probable as H; beyond that, what is forgotten costs the retain data for nothing.

    Each check adds ``stop_forget_log_prob`` and ``stop_holdout_log_prob`` to the trainer's log. The level and whether
    it was reached travel in the checkpoints, so that a resumed run ends where the whole one would; where the level was
    reached in the checkpoint that a run is resumed from, :func:`reached_at` says so.

    Example::

        trainer.add_callback(StopAtHoldout(trainer, holdout_rows, every=10))

    Args:
        trainer: a :class:`~blur_optim.integrations.transformers.BLURTrainer`, or open-unlearning's.
        holdout: rows of the kind that the forget rows are, of which the model has seen none.
        every: steps between two checks; each costs a forward pass over the forget rows.
        rows: use at most this many of each, evenly spaced; None for all.
    Raises:
        ValueError: ``every`` or ``rows`` is not positive, or there are no rows; when training begins, the rows to
            forget are as improbable as the others already.
        RuntimeError: when training begins, the checkpoint was made without this callback, or after it had ended the
            run.
    """

    def __init__(self, trainer: Any, holdout: Sequence[Any], *, every: int = 10, rows: int | None = None) -> None:
        for name, value in (("every", every), ("rows", rows)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value!r}.")
        self.trainer, self.every = trainer, every
        self.holdout = _spaced("holdout", holdout, rows)
        self.forget = _spaced("forget_dataset", trainer.train_dataset.forget, rows)
        self.level = math.nan

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        memory = state.stateful_callbacks.get(STATE_KEY)
        if state.global_step == 0:
            self.level, known = self.log_prob(self.holdout), self.log_prob(self.forget)
            if known <= self.level:
                raise ValueError(
                    f"`holdout` must be less probable than the rows to forget, got {self.level:.4g} nats per token and "
                    f"{known:.4g} before the first step. Are these rows that the model has never seen, and those rows "
                    "that it knows?"
                )
            state.stateful_callbacks[STATE_KEY] = {"level": self.level, "reached": None}
        elif memory is None:
            raise RuntimeError(
                "`resume_from_checkpoint` must be a checkpoint of a run with StopAtHoldout, which takes its level from "
                f"the model before the first step, got one of step {state.global_step} without. Leave the callback "
                "out, or begin anew."
            )
        else:
            self.level = memory["level"]
            if memory["reached"] is not None:
                raise RuntimeError(
                    f"The run has ended at step {memory['reached']}, where the rows to forget were as improbable as "
                    "`holdout`. Call load_ended(trainer, checkpoint) in the place of train()."
                )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        now = self.log_prob(self.forget)
        self.trainer.log({"stop_forget_log_prob": now, "stop_holdout_log_prob": self.level})
        if now <= self.level:
            state.stateful_callbacks[STATE_KEY]["reached"] = state.global_step
            control.should_training_stop = True
            control.should_save = getattr(args.save_strategy, "value", args.save_strategy) != "no"

    @torch.no_grad()
    def log_prob(self, rows: Sequence[Any]) -> float:
        """The mean log-probability per token of the rows' answers, in nats; the same on all processes."""
        trainer = self.trainer
        # Sharded parameters are gathered by what is wrapped around them.
        model = trainer.model_wrapped if getattr(trainer, "is_fsdp_enabled", False) else trainer.model
        modes = [(module, module.training) for module in model.modules()]
        total = torch.zeros(2, dtype=torch.float64, device=trainer.args.device)
        model.eval()
        try:
            for batch, weights in self._batches(rows):
                total += self._sums(model, batch, weights)
        finally:
            for module, training in modes:
                module.training = training
        log_prob, tokens = trainer.accelerator.reduce(total, "sum").tolist()
        return float(log_prob / tokens)

    def _sums(self, model: nn.Module, batch: Mapping[str, Any], weights: Tensor) -> Tensor:
        inputs = self.trainer._prepare_inputs(batch)
        with self.trainer.accelerator.autocast():
            log_probs = sequence_log_probs(model_logits(model, inputs), inputs["labels"])
        counts = token_counts(inputs["labels"])
        kept = weights.to(log_probs.device)
        return torch.stack([(log_probs.double() * kept).sum(), (counts * kept).sum().double()])

    def _batches(self, rows: Sequence[Any]) -> Iterator[tuple[Mapping[str, Any], Tensor]]:
        """This process's share. Each has as many batches, for a sharded model runs on all at once."""
        rank, ranks = self.trainer.args.process_index, self.trainer.args.world_size
        each, size = math.ceil(len(rows) / ranks), self.trainer.args.per_device_eval_batch_size
        mine = [(rows[i], 1) if i < len(rows) else (rows[0], 0) for i in range(rank, each * ranks, ranks)]
        for start in range(0, each, size):
            part = mine[start : start + size]
            batch = self._collate([row for row, _ in part])
            yield batch, torch.tensor([weight for _, weight in part])

    @property
    def _collate(self) -> Callable[[list[Any]], Any]:
        pairs = getattr(self.trainer, "pair_collator", None)
        collate: Callable[[list[Any]], Any] = self.trainer.data_collator if pairs is None else pairs.side
        return collate


def reached_at(checkpoint: str | os.PathLike[str]) -> int | None:
    """The step at which a run had ended when it wrote this checkpoint; None where there are steps left to take."""
    state = _state(checkpoint)
    reached: int | None = (state.stateful_callbacks or {}).get(STATE_KEY, {}).get("reached")
    return state.global_step if reached is None and state.global_step >= state.max_steps else reached


def load_ended(trainer: Any, checkpoint: str | os.PathLike[str]) -> None:
    """Load model and state of a run that had ended: ``train(resume_from_checkpoint=...)`` would take another step.

    Args:
        trainer: made as for that run; its model is not sharded.
        checkpoint: one of which :func:`reached_at` tells a step.
    """
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = _state(checkpoint)


def _state(checkpoint: str | os.PathLike[str]) -> Any:
    return TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))


def _spaced(name: str, rows: Any, count: int | None) -> list[Any]:
    size = len(rows)
    if size == 0:
        raise ValueError(f"`{name}` must hold at least one row, got none.")
    wanted = min(size, count or size)
    return [_forgotten(rows[i * size // wanted]) for i in range(wanted)]


def _forgotten(row: Any) -> Any:
    return next((row[name] for name in _FORGOTTEN if isinstance(row, Mapping) and name in row), row)
