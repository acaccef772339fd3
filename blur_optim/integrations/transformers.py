"""A transformers Trainer that unlearns with BLUR: two data sets, two losses, everything else the Trainer's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from blur_optim.integrations.objectives import (
    Loss,
    Reference,
    compares_answers,
    make_forget_loss,
    make_retain_loss,
)
from blur_optim.integrations.pairs import PairCollator, PairedDataset, PairSampler, single_batches
from blur_optim.integrations.record import RecordCallback
from blur_optim.integrations.trainer_step import BLURStepMixin, blur_options
from blur_optim.losses import ReferenceLogProbs
from blur_optim.losses.reference import adapter_owner
from blur_optim.losses.reference_ranks import on_the_first
from blur_optim.step.rules import UserRule

try:
    from transformers import Trainer, TrainerCallback, TrainingArguments
except ImportError as error:
    raise ImportError(
        "`transformers` and `accelerate` must be installed for BLURTrainer. `pip install 'blur_optim[transformers]'`."
    ) from error

REFERENCE_FILE = "reference.safetensors"


@dataclass
class BLURTrainingArguments(TrainingArguments):
    """``TrainingArguments`` with the losses and BLUR's options (arXiv:2506.08164).

    ``max_grad_norm`` is the Trainer's own clipping, of the update u: the Trainer takes that norm for its log whether it
    clips or not, so BLUR's closed form would save nothing, and this one works under every precision and wrapper.

    Raises:
        ValueError: a value is out of range, or ``stash="recompute"``, which a Trainer's step does not allow.
        TypeError: a value is of the wrong type.
    """

    forget_loss: str = field(
        default="npo", metadata={"help": "'ga', 'npo', 'simnpo', 'dpo' or 'idk'; a function goes to BLURTrainer."}
    )
    retain_loss: str = field(default="nll", metadata={"help": "'nll' or 'kl'; a function goes to BLURTrainer."})
    beta: float | None = field(
        default=None, metadata={"help": "Inverse temperature of npo and dpo (default 0.1), simnpo (default 2.5)."}
    )
    simnpo_delta: float = field(default=0.0, metadata={"help": "Reward margin of simnpo."})
    gamma: float = field(default=1.0, metadata={"help": "Weight of the forget gradient, >= 0."})
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the retain gradient, the paper's alpha."})
    rule: str = field(default="blur", metadata={"help": "How the two gradients combine; see docs/method.md."})
    normalize: bool = field(default=False, metadata={"help": "Apply the rule to gradients of length 1."})
    scope: str = field(default="global", metadata={"help": "Over what to compare: 'global', 'group', 'parameter'."})
    stash: str = field(
        default="reference", metadata={"help": "Where forget gradients wait: 'reference', 'bfloat16', 'int8', 'cpu'."}
    )
    backend: str | None = field(default=None, metadata={"help": "Kernels to use; the fastest unless given."})
    epoch_over: str = field(
        default="longer", metadata={"help": "The data set that an epoch reads once: 'longer', 'forget', 'retain'."}
    )
    reference_file: str | None = field(
        default=None,
        metadata={"help": f"Keeps what npo and dpo compare with; output_dir/{REFERENCE_FILE} unless given."},
    )
    record: str | None = field(
        default=None,
        metadata={"help": "File of what each step saw, as 'run.jsonl'; python -m blur_optim.record.plot."},
    )
    record_every: int = field(default=1, metadata={"help": "Record each step whose number divides by this."})
    record_alignment: bool = field(
        default=False, metadata={"help": "Record the cosine within each parameter too; see blur_optim.record.recorder."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("forget_loss", "retain_loss"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(
                    f"`{name}` must be a name in these arguments, which are saved with every checkpoint, got "
                    f"{getattr(self, name)!r}. Pass a function to the trainer: BLURTrainer({name}=...)."
                )
        self.blur_options()

    def blur_options(self) -> dict[str, Any]:
        """What :class:`blur_optim.BLUR` is made with."""
        return blur_options(
            gamma=self.gamma,
            retain_weight=self.retain_weight,
            rule=self.rule,
            normalize=self.normalize,
            scope=self.scope,
            stash=self.stash,
            backend=self.backend,
        )


class BLURTrainer(BLURStepMixin, Trainer):
    """Train a model to forget one data set and keep another.

    A step reads ``gradient_accumulation_steps`` micro-batches of ``per_device_train_batch_size`` rows of **each** data
    set, and a loss is the mean over micro-batches of their means. Evaluation is the Trainer's own: pass
    ``eval_dataset={"forget": ..., "retain": ...}`` for both losses of the model. With a PEFT model the adapter alone is
    trained, and its base is the reference.

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
            DPO have the log-probabilities of the forget data computed once, before the first step, and kept in a file;
            KL takes the PEFT adapter off.
        rule: a function, instead of the name in ``args``.

    Raises:
        TypeError: ``args`` or a data set is of the wrong kind.
        ValueError: a loss is unknown, there is no reference for it, or the Trainer is set up for DeepSpeed or an
            optimizer that steps inside backward.
    """

    def __init__(
        self,
        model: Any = None,
        args: BLURTrainingArguments | None = None,
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
        if not isinstance(args, BLURTrainingArguments):
            raise TypeError(f"`args` must be BLURTrainingArguments, got {type(args).__name__}.")
        if "train_dataset" in kwargs:
            raise TypeError("`train_dataset` must not be given. Pass forget_dataset and retain_dataset.")
        pairs = PairedDataset(forget_dataset, retain_dataset, args.epoch_over)
        super().__init__(model, args, data_collator, train_dataset=pairs, **kwargs)
        chosen = forget_loss or args.forget_loss
        retain_loss = retain_loss or args.retain_loss
        self.reference_log_probs = reference if isinstance(reference, ReferenceLogProbs) else None
        #: Makes a batch of pairs; a loader of one's own has to use it.
        self.pair_collator = PairCollator(self._collator(), self.reference_log_probs)
        self._stores_reference = reference is None and compares_answers(chosen)
        _check_reference(self.model, reference, chosen, retain_loss)
        shared = self._reference(reference)
        self.start_blur(
            make_forget_loss(chosen, shared, beta=args.beta, delta=args.simnpo_delta),
            make_retain_loss(retain_loss, shared),
            **{**args.blur_options(), **({} if rule is None else {"rule": rule})},
        )
        self.add_callback(_PrepareReference(self))
        if args.record is not None:
            options = {"every": args.record_every, "alignment": args.record_alignment}
            self.add_callback(RecordCallback(self, args.record, **options))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The loader of pairs."""
        self._pending = []  # An interrupted run may have left some.
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

    # -- What the losses compare with --------------------------------------------------------------------------------

    @property
    def reference_path(self) -> Path:
        """Where the reference's log-probabilities are kept."""
        return Path(self.args.reference_file or os.path.join(self.args.output_dir, REFERENCE_FILE))

    def _reference(self, reference: Any) -> Reference:
        if not isinstance(reference, nn.Module):
            return Reference()
        reference.requires_grad_(False).eval().to(self.args.device)
        return Reference(reference, self.accelerator.autocast)

    def prepare_reference(self) -> None:
        """Compute what the forget loss compares with, or load it where a run is resumed; called when training begins.

        Not before: under FSDP no process holds the whole model, which only runs once it is sharded.

        Raises:
            FileNotFoundError: a run is resumed, and the reference of its first part is missing.
            ValueError: the reference's file belongs to another model.
        """
        if self._stores_reference and self.reference_log_probs is None:
            self.reference_log_probs = self._load_reference() if self.state.global_step else self._compute_reference()
        self.pair_collator.reference = self.reference_log_probs

    def _compute_reference(self) -> ReferenceLogProbs:
        rank, ranks = self.args.process_index, self.args.world_size
        model = self.model_wrapped if getattr(self, "is_fsdp_enabled", False) else self.model
        if getattr(model, "_tp_size", None) and ranks > 1:
            raise ValueError(
                "`reference` must be given for a tensor-parallel model, whose processes need the same batches. Compute "
                "it before: ReferenceLogProbs.load_or_compute(file, model, batches), the same batches on all."
            )
        # In the precision of training, or the first step would find a difference to the reference that is none.
        with self.accelerator.autocast():
            return ReferenceLogProbs.load_or_compute(
                self.reference_path,
                model,
                self._reference_batches(rank, ranks),
                progress=self.is_world_process_zero() and not self.args.disable_tqdm,
                across_ranks=ranks > 1 or None,
            )

    def _load_reference(self) -> ReferenceLogProbs:
        # The first process has written it, perhaps where others can't read.
        return on_the_first(self._read_reference) if self.args.world_size > 1 else self._read_reference()

    def _read_reference(self) -> ReferenceLogProbs:
        path = self.reference_path
        if not path.exists():
            raise FileNotFoundError(
                f"`reference_file` must be the file of the run that is resumed, got {str(path)!r}, which is missing. "
                "The model that is resumed from has changed: pass the reference=, the model as it was before."
            )
        return ReferenceLogProbs.load(path)

    def _reference_batches(self, rank: int, ranks: int) -> Iterator[Any]:
        forget = self.train_dataset.forget
        # With fewer rows than processes some have none of their own, and compute one twice.
        rows = range(rank, len(forget), ranks) or range(1)
        # The lesser, so that a smaller batch in training (auto_find_batch_size) is one here too.
        size = min(self.args.per_device_eval_batch_size, self._train_batch_size)
        for batch in self._loader(Subset(forget, rows), size, self.pair_collator.side):
            yield from single_batches(batch)


class _PrepareReference(TrainerCallback):
    def __init__(self, trainer: BLURTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.prepare_reference()


def _check_reference(model: Any, reference: Any, forget_loss: Any, retain_loss: Any) -> None:
    if isinstance(reference, str) and (reference != "adapter" or adapter_owner(model) is None):
        raise ValueError(
            f"`reference` must be a model, ReferenceLogProbs, or 'adapter' with a PEFT model, got {reference!r} with a "
            f"{type(model).__name__}."
        )
    if isinstance(reference, nn.Module) and {id(p) for p in reference.parameters()} & {
        id(p) for p in model.parameters()
    }:
        raise ValueError(
            "`reference` must be another model than the one that is trained, got one that shares its parameters. Pass "
            "copy.deepcopy(model), or 'adapter' with a PEFT model."
        )
    needs_model = retain_loss == "kl" and not isinstance(reference, nn.Module) and adapter_owner(model) is None
    if needs_model:
        raise ValueError(
            f"`reference` must be a frozen model for the loss 'kl', which compares whole distributions, got "
            f"{reference!r}. Pass reference=copy.deepcopy(model), or train a PEFT adapter."
        )
