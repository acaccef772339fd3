"""A transformers Trainer that unlearns with BLUR: two data sets, two losses, everything else the Trainer's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from blur_optim.integrations.arguments import (
    REFERENCE_FILE,
    BLURArguments,
    BLURTrainingArguments,
    check_best_model,
)
from blur_optim.integrations.objectives import Loss, make_forget_loss, make_retain_loss
from blur_optim.integrations.pairs import PairCollator, PairedDataset, PairSampler
from blur_optim.integrations.record import RecordCallback
from blur_optim.integrations.run_start import STATE_KEY, describe_run, warn_of_differences
from blur_optim.integrations.trainer_reference import ReferenceMixin
from blur_optim.integrations.trainer_step import BLURStepMixin
from blur_optim.losses import ReferenceLogProbs
from blur_optim.losses.forward import takes_positions, with_positions
from blur_optim.step.rules import UserRule

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "`transformers` and `accelerate` must be installed for BLURTrainer. `pip install 'blur_optim[transformers]'`."
    ) from error

__all__ = ["REFERENCE_FILE", "BLURTrainer", "BLURTrainingArguments"]


class BLURTrainer(ReferenceMixin, BLURStepMixin, Trainer):
    """Train a model to forget one data set and keep another.

    A step reads ``gradient_accumulation_steps`` micro-batches of ``per_device_train_batch_size`` rows of **each** data
    set, and a loss is the mean over micro-batches of their means. Evaluation is the Trainer's own: pass
    ``eval_dataset={"forget": ..., "retain": ...}`` for both losses of the model. With a PEFT model the adapter alone is
    trained; a fresh one leaves the base as the reference.

    Example::

        args = BLURTrainingArguments("out", forget_loss="npo", gamma=1.0, learning_rate=1e-5)
        BLURTrainer(model, args, forget_dataset=forget, retain_dataset=retain, data_collator=collator).train()

    Args:
        model, args, data_collator, **kwargs: as the Trainer takes them; ``args`` are :class:`BLURTrainingArguments`.
            Any collator of a single data set will do: it is called for each half apart.
        forget_dataset, retain_dataset: rows with a length. The shorter is cycled, reshuffled at each turn.
        forget_loss, retain_loss: functions ``(model, batch) -> loss`` [0-d] instead of the names in ``args``. With
            ``remove_unused_columns`` (the Trainer's default) batches hold what the model's ``forward`` takes.
        reference: what ``"npo"``, ``"dpo"`` and ``"kl"`` compare with: a frozen model, log-probabilities made before,
            or ``"adapter"``: the model with its PEFT adapter off, one more forward in each step. Unless given, NPO and
            DPO have the log-probabilities of the forget data computed once, before the first step, of the model as it
            then is, and kept in a file; KL takes the PEFT adapter off, if that is the model as it is when the run
            begins.
        rule: a function, instead of the name in ``args``.

    Raises:
        TypeError: ``args`` or a data set is of the wrong kind.
        ValueError: a loss is unknown, there is no reference for it, ``compute_loss_func`` is given or ``compute_loss``
            overridden (neither would be called), nothing is trainable, the best checkpoint would be the one that forgot
            least, or the Trainer is set up for an optimizer that steps inside backward.
    """

    def __init__(
        self,
        model: Any = None,
        args: BLURArguments | None = None,
        data_collator: Any = None,
        *,
        forget_dataset: Any,
        retain_dataset: Any,
        forget_loss: str | Loss | None = None,
        retain_loss: str | Loss | None = None,
        reference: nn.Module | ReferenceLogProbs | str | None = None,
        rule: UserRule | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, BLURArguments):
            raise TypeError(f"`args` must be BLURTrainingArguments, got {type(args).__name__}.")
        if "train_dataset" in kwargs:
            raise TypeError("`train_dataset` must not be given. Pass forget_dataset and retain_dataset.")
        _check_not_overridden(type(self))
        pairs = PairedDataset(forget_dataset, retain_dataset, args.epoch_over)
        super().__init__(model, args, data_collator, train_dataset=pairs, **kwargs)
        self._own_losses, self.chosen_rule = (forget_loss, retain_loss), rule
        self._run: dict[str, Any] = {}  # What the last run was begun with.
        check_best_model(args, self.eval_dataset, forget_dataset)
        self.start_reference(reference)
        #: Makes a batch of pairs; a loader of one's own has to use it.
        self.pair_collator = PairCollator(
            self._collator(), self.reference_log_probs, positions=takes_positions(self.model)
        )
        self.read_arguments()
        self.add_callback(_BeginRun(self))
        self.add_callback(_Record(self))

    # -- What a run begins with --------------------------------------------------------------------------------------

    @property
    def chosen_losses(self) -> tuple[str | Loss, str | Loss]:  # type: ignore[override]
        """The forget and the retain loss: names, or functions."""
        forget, retain = self._own_losses
        return forget or self.args.forget_loss, retain or self.args.retain_loss

    def read_arguments(self) -> None:
        """Make losses and options of what ``args`` are now: a search, or a user, may have changed them since.

        Raises:
            ValueError, TypeError: as the trainer itself.
        """
        self.args.check_losses()
        (forget, retain), shared = self.chosen_losses, self.make_reference()
        options = {**self.args.blur_options(), **({} if self.chosen_rule is None else {"rule": self.chosen_rule})}
        self.start_blur(
            make_forget_loss(forget, shared, beta=self.args.beta, delta=self.args.simnpo_delta),
            make_retain_loss(retain, shared),
            **options,
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Wrap the optimizer that ``args.optim`` names, or that was passed in ``optimizers``, with BLUR."""
        self.read_arguments()
        return super().create_optimizer(*args, **kwargs)

    def begin_run(self) -> None:
        """Let what ``args`` are now hold, and say what a resumed run was begun with otherwise; called when training
        begins."""
        self.read_arguments()
        begun = dict(self.state.stateful_callbacks.get(STATE_KEY, {}))
        resumed, now = bool(self.state.global_step), describe_run(self)
        if resumed:
            warn_of_differences(begun, now)
            if "reference_file" in begun:
                self.use_reference_file(begun["reference_file"])
        before = begun if resumed else self._run
        # What has not changed stays as the param groups have it, where a scheduler may have changed it.
        self.apply_options({name for name in now if name in before and before[name] != now[name]})
        self.prepare_reference()
        self._run = now
        named = self.reference_file_of_model
        self.state.stateful_callbacks[STATE_KEY] = now if named is None else {**now, "reference_file": named}

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, with the positions that training has under padding on the left."""
        if self.pair_collator.positions and isinstance(inputs, Mapping):
            inputs = with_positions(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    # -- Batches of pairs --------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The loader of pairs."""
        self._pending = []  # An interrupted run may have left some.
        self.train_dataset.set_epoch_over(self.args.epoch_over)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        self.pair_collator.collate = self._collator()  # Of the `data_collator` of now.
        loader: DataLoader[Any] = self.accelerator.prepare(
            self._loader(
                self.train_dataset,
                self._train_batch_size,
                self.pair_collator,
                # At the first step of an epoch the state counts whole ones, also where a run is resumed in the middle.
                sampler=PairSampler(self.train_dataset, seed, lambda: int(self.state.epoch or 0)),
                drop_last=self.args.dataloader_drop_last,
            )
        )
        return loader

    def _loader(self, dataset: Any, batch_size: int, collate: Any, **options: Any) -> DataLoader[Any]:
        workers = self.args.dataloader_num_workers
        if workers:
            options["prefetch_factor"] = self.args.dataloader_prefetch_factor
            options["persistent_workers"] = self.args.dataloader_persistent_workers
        pin = self.args.dataloader_pin_memory and torch.accelerator.is_available()
        return DataLoader(dataset, batch_size, collate_fn=collate, num_workers=workers, pin_memory=pin, **options)

    def _collator(self) -> Callable[[list[Any]], Any]:
        # Drops what the model's forward does not take, unless remove_unused_columns is off.
        collate: Callable[[list[Any]], Any] = self._get_collator_with_removed_columns(self.data_collator)
        return collate


class _BeginRun(TrainerCallback):
    def __init__(self, trainer: BLURTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.begin_run()


class _Record(RecordCallback):
    """Records where ``args.record`` names a file when the run begins."""

    def __init__(self, trainer: BLURTrainer) -> None:
        super().__init__(trainer, "")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.record is not None:
            self.path, self.options = args.record, {"every": args.record_every, "alignment": args.record_alignment}
            super().on_train_begin(args, state, control, **kwargs)


def _check_not_overridden(cls: type[BLURTrainer]) -> None:
    # What a Trainer beside this one in the bases has is not meant for two losses.
    own = cls.__mro__[: cls.__mro__.index(BLURTrainer)]
    if any("compute_loss" in vars(base) for base in own):
        raise ValueError(
            f"`compute_loss` must not be overridden, got {cls.__name__}'s own: it knows one loss, and would never be "
            "called in training. Override compute_forget_loss and compute_retain_loss, or pass forget_loss= and "
            "retain_loss=; for evaluation alone, prediction_step."
        )
