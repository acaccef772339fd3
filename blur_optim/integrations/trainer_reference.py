"""What a Trainer's losses compare with: made, checked and found again when a run begins."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Subset

from blur_optim.integrations.arguments import REFERENCE_FILE
from blur_optim.integrations.objectives import Loss, Reference, compares_answers
from blur_optim.integrations.pairs import single_batches
from blur_optim.losses import ReferenceLogProbs, adapter_changes
from blur_optim.losses.fingerprints import model_fingerprint
from blur_optim.losses.forward import adapter_owner
from blur_optim.losses.reference_ranks import on_the_first


class ReferenceMixin:
    """Of :class:`blur_optim.integrations.transformers.BLURTrainer`: everything about ``reference=``."""

    # The Trainer's, as far as they are used here.
    args: Any
    accelerator: Any
    model: Any
    model_wrapped: Any
    state: Any
    train_dataset: Any
    pair_collator: Any
    _train_batch_size: int
    chosen_losses: tuple[str | Loss, str | Loss]

    def start_reference(self, given: nn.Module | ReferenceLogProbs | str | None) -> None:
        """Take the ``reference`` that a user passed.

        Raises:
            ValueError: it is not one for these losses and this model.
        """
        _check_reference(self.model, given, self.chosen_losses[1])
        self._given_reference = given
        self.reference_log_probs = given if isinstance(given, ReferenceLogProbs) else None
        self._reference_of: weakref.ref[Any] | None = (
            None  # The model whose the stored ones are, if they were made here.
        )
        self._checked_adapter_of: weakref.ref[Any] | None = None
        self._reference_file: Path | None = None
        if isinstance(given, nn.Module):
            given.requires_grad_(False).eval().to(self.args.device)

    def make_reference(self) -> Reference:
        """What the losses are made with."""
        _check_reference(self.model, self._given_reference, self.chosen_losses[1])
        if isinstance(self._given_reference, nn.Module):
            # Asked for anew each time: a search makes a new accelerator for each trial.
            return Reference(self._given_reference, lambda: self.accelerator.autocast())
        return Reference()

    @property
    def reference_file_of_model(self) -> str | None:
        """The file's name where ``model_init`` makes the models, each with a file of its own."""
        return None if self._reference_file is None else str(self._reference_file)

    def use_reference_file(self, path: str) -> None:
        """Go on with the file of the run that is resumed."""
        self._reference_file = Path(path)

    @property
    def reference_path(self) -> Path:
        """Where the reference's log-probabilities are kept."""
        named = self.args.reference_file or os.path.join(self.args.output_dir, REFERENCE_FILE)
        return self._reference_file or Path(named)

    def prepare_reference(self) -> None:
        """Compute what the losses compare with, or load it where a run is resumed; called when training begins.

        Not before: under FSDP no process holds the whole model, which only runs once it is sharded.

        Raises:
            FileNotFoundError: a run is resumed, and the reference of its first part is missing.
            ValueError: the reference's file belongs to another model, or the PEFT adapter that KL would switch off
                is part of the model that is to forget.
        """
        stored = self._given_reference is None and compares_answers(self.chosen_losses[0])
        if stored and (self.reference_log_probs is None or self._is_of_another_model()):
            self.reference_log_probs = self._load_reference() if self.state.global_step else self._compute_reference()
            self._reference_of = weakref.ref(self.model)
        self.pair_collator.reference = self.reference_log_probs
        begins = not self.state.global_step and not _is(self._checked_adapter_of, self.model)
        if self.chosen_losses[1] == "kl" and self._given_reference is None and begins:
            self._check_adapter()
        self._checked_adapter_of = weakref.ref(self.model)

    def _is_of_another_model(self) -> bool:
        # model_init gives one for each run and each trial of a search.
        return self._reference_of is not None and not _is(self._reference_of, self.model)

    def _check_adapter(self) -> None:
        """Refuse KL against the model with its adapter off, where that is not the model as it is now."""
        retain = self.train_dataset.retain
        rows = [retain[i] for i in range(min(self._train_batch_size, len(retain)))]  # The same on every process.
        batch = self._prepare_inputs(self.pair_collator.side(rows))  # type: ignore[attr-defined]
        with self.accelerator.autocast():
            changes = adapter_changes(self._whole_model(), batch)
        if changes:
            raise ValueError(
                "`reference` must be given for the loss 'kl' with a PEFT adapter that does something already (it was "
                "trained, or is one of several, or of virtual tokens, or was made by PiSSA or OLoRA), got None: with "
                "the adapter off the model is another than the one that is to forget. Pass "
                "reference=copy.deepcopy(model), or reference='adapter' if the bare base is meant."
            )

    def _whole_model(self) -> Any:
        return self.model_wrapped if getattr(self, "is_fsdp_enabled", False) else self.model

    def _compute_reference(self) -> ReferenceLogProbs:
        rank, ranks = self.args.process_index, self.args.world_size
        model = self._whole_model()
        if getattr(model, "_tp_size", None) and ranks > 1:
            raise ValueError(
                "`reference` must be given for a tensor-parallel model, whose processes need the same batches. Compute "
                "it before: ReferenceLogProbs.load_or_compute(file, model, batches), the same batches on all."
            )
        if getattr(self, "model_init", None) is not None:  # One file for each model that it makes.
            self._reference_file = None
            path = self.reference_path
            self._reference_file = path.with_stem(f"{path.stem}-{model_fingerprint(model)[:8]}")
        # In the precision of training, or the first step would find a difference to the reference that is none.
        with self.accelerator.autocast():
            return ReferenceLogProbs.load_or_compute(
                self.reference_path,
                model,
                self._reference_batches(rank, ranks),
                progress=self.is_world_process_zero() and not self.args.disable_tqdm,  # type: ignore[attr-defined]
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
        for batch in self._loader(Subset(forget, rows), size, self.pair_collator.side):  # type: ignore[attr-defined]
            yield from single_batches(batch)


def _is(reference: weakref.ref[Any] | None, model: Any) -> bool:
    return reference is not None and reference() is model


def _check_reference(model: Any, reference: Any, retain_loss: Any) -> None:
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
