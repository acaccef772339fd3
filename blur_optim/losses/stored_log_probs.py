"""Reference log-probabilities computed once, kept in a file, and found by what an example says."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from blur_optim.losses.checks import import_optional
from blur_optim.losses.fingerprints import example_keys, missing_keys, model_fingerprint
from blur_optim.losses.forward import model_inputs
from blur_optim.losses.log_prob_file import import_safetensors, read_log_probs, write_log_probs
from blur_optim.losses.reference import reference_log_probs
from blur_optim.losses.reference_ranks import (
    NO_BATCHES,
    check_ranks,
    complete_across_ranks,
    input_device,
    is_fsdp,
    on_the_first,
    reshard,
)

Batches = Iterable[Mapping[str, Tensor]]


class ReferenceLogProbs:
    r"""The reference's log-probabilities of known examples, so that training holds no second model.

    .. math:: \log \pi_{ref}(y_i \mid x_i)

    Made by :meth:`load_or_compute`, before the first unlearning step; then ``reference(batch)`` is what
    :func:`npo_loss` and :func:`dpo_loss` compare with::

        reference = ReferenceLogProbs.load_or_compute("reference.safetensors", model, data_loader)
        ...
        loss = npo_loss(sequence_log_probs(model(**inputs).logits, batch["labels"]), reference(batch))

    An example is known by its tokens and labels: neither its row nor its padding matters, see
    :func:`blur_optim.losses.fingerprints.example_keys`.

    Attributes:
        model: the fingerprint of the reference's weights.
        computed: how many examples :meth:`load_or_compute` did not find in the file.
    """

    def __init__(self, model: str, log_probs: Mapping[bytes, float]) -> None:
        self.model = model
        self.computed = 0
        self._log_probs = dict(log_probs)

    def __len__(self) -> int:
        return len(self._log_probs)

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Look up the examples of a batch.

        Args:
            batch: as :func:`reference_log_probs`.
        Returns:
            [B] float32 on the labels' device, no gradient.
        Raises:
            ValueError: an example isn't stored, or the batch is not as it should be.
            TypeError: the labels aren't int64.
        Cost: one copy of the batch to the CPU. Look a batch up before it goes to the GPU, and nothing waits.
        """
        keys = example_keys(batch)
        missing = [row for row, key in enumerate(keys) if key not in self._log_probs]
        if missing:
            raise ValueError(
                f"`batch` must hold examples whose log-probabilities are stored, got {len(missing)} of {len(keys)} "
                f"that are not, the first in row {missing[0]}. Call ReferenceLogProbs.load_or_compute with all data "
                "that training reads, encoded and cut in the same way."
            )
        found = [self._log_probs[key] for key in keys]
        return torch.tensor(found, dtype=torch.float32, device=batch["labels"].device)

    @classmethod
    def load_or_compute(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        batches: Batches,
        *,
        save_every: float = 30.0,
        progress: bool | Callable[[Batches], Batches] = True,
        across_ranks: bool | None = None,
    ) -> ReferenceLogProbs:
        """Read the examples' log-probabilities from a file, compute those that it lacks, and write them to it.

        The file is written every so often, and at the end, also if that is an exception or Ctrl-C: the next call
        goes on from there. It is replaced as a whole, so it is never half-written. What it holds of other examples
        stays. The model's modes, its ``requires_grad`` and the random state are as before.

        ``across_ranks``, all ranks call it, each with the batches that it is to compute, at least one (those of one
        tensor-parallel group with the same), and each gets all log-probabilities. Rank 0 alone reads and writes the
        file. An exception on one rank is one on all, once what is computed is written; but for one in the model itself,
        and for Ctrl-C, which lose what was computed since the file was last written.

        Args:
            path: a safetensors file, which need not exist; nor need its folder.
            model: the model before its first unlearning step, or any reference. A PEFT adapter counts as it is, as
                one that was trained before is part of the model that is to forget.
            batches: the whole data set, as for :func:`reference_log_probs`, such as a DataLoader. On any device,
                in any order; an example that occurs more than once is computed once.
            save_every: seconds; not more than these and one batch of work are lost if the process is killed.
            progress: whether to show a tqdm bar; or what wraps the iterable instead of tqdm.
            across_ranks: whether the ranks of torch.distributed share the work, as they have to under FSDP. Unless
                given: if the model is under FSDP. With False, ranks that run one model together, such as those of a
                tensor-parallel group, pass the same batches.
        Raises:
            RuntimeError: another rank has failed, and not with a ValueError or OSError, which are the same here; says
                which rank, and what it said.
            ValueError: there are no batches, or no process group; the file holds another model's log-probabilities or
                is of another kind; or a log-probability isn't finite.
            ImportError: safetensors, numpy or tqdm isn't installed; gives the command.
            OSError: the file can't be read or written.
        """
        if not save_every >= 0:
            raise ValueError(f"`save_every` must be a number of seconds >= 0, got {save_every!r}.")
        import_safetensors()
        batches = _with_progress(batches, progress)
        path = Path(path)
        stored = cls(model_fingerprint(model), {})
        try:
            if is_fsdp(model) if across_ranks is None else across_ranks:
                stored._complete_across_ranks(path, model, batches, save_every)
            else:
                stored._open(path)
                stored._complete(path, model, batches, save_every)
        finally:
            reshard(model)
        return stored

    @classmethod
    def load(cls, *paths: str | os.PathLike[str]) -> ReferenceLogProbs:
        """Read one file or more, such as the parts that several processes computed.

        No model is needed, so none is compared: for training that resumes with a model that changed.

        Raises:
            ValueError: no path is given, or a file holds another model's log-probabilities or is of another kind.
            FileNotFoundError: a file is missing.
            ImportError: safetensors or numpy isn't installed; gives the command.
        """
        if not paths:
            raise ValueError("`paths` must name at least one file, got none.")
        first, *others = map(Path, paths)
        stored = cls(*read_log_probs(first))
        for path in others:
            stored._take(path, f"Only files of one model can be read together, and the first is {str(first)!r}.")
        return stored

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all to one file; nothing is left half-written.

        Raises:
            OSError: it can't be written.
        """
        write_log_probs(Path(path), self.model, self._log_probs)

    def _take(self, path: Path, remedy: str) -> None:
        model, log_probs = read_log_probs(path)
        if model != self.model:
            raise ValueError(
                f"`path` must name a file with the log-probabilities of the model {self.model}, got {str(path)!r} "
                f"with those of {model}. {remedy}"
            )
        self._log_probs |= log_probs

    def _open(self, path: Path) -> dict[bytes, float]:
        if path.exists():
            self._take(
                path,
                "If `model` was trained since, read the file with ReferenceLogProbs.load. For another "
                "reference give another path, or delete the file.",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        return self._log_probs

    def _complete(self, path: Path, model: nn.Module, batches: Batches, save_every: float) -> None:
        position, saved, saved_at = -1, 0, time.monotonic()
        try:
            for position, batch in enumerate(batches):
                if keys := missing_keys(batch, self._log_probs):
                    self._log_probs |= _compute(model, batch, keys, position)
                    self.computed += len(keys)
                if self.computed > saved and time.monotonic() - saved_at >= save_every:
                    self.save(path)
                    saved, saved_at = self.computed, time.monotonic()
        finally:
            if self.computed > saved:
                self.save(path)
        if position < 0:
            raise ValueError(NO_BATCHES)

    def _complete_across_ranks(self, path: Path, model: nn.Module, batches: Batches, save_every: float) -> None:
        check_ranks()
        self._log_probs = on_the_first(lambda: self._open(path))
        compute = partial(_compute, model)
        self.computed = complete_across_ranks(
            self._log_probs, batches, compute, lambda: self.save(path), save_every, in_step=is_fsdp(model)
        )


def _compute(
    model: nn.Module, batch: Mapping[str, Tensor], keys: Mapping[int, bytes], position: int
) -> dict[bytes, float]:
    found = _log_probs_of(model, batch, list(keys))
    for row, value in zip(keys, found, strict=True):
        if not math.isfinite(value):
            raise ValueError(
                f"`model` must give every example a finite log-probability, got {value} for row {row} of "
                f"batches[{position}]."
            )
    return dict(zip(keys.values(), found, strict=True))


def _log_probs_of(model: nn.Module, batch: Mapping[str, Tensor], rows: list[int]) -> list[float]:
    """Compute the log-probabilities of some rows, on the model's device."""
    size = len(batch["labels"])
    device = next((input_device(param) for param in model.parameters()), batch["labels"].device)
    inputs = {**model_inputs(batch), "labels": batch["labels"]}
    if getattr(inputs.get("position_ids"), "ndim", 2) == 1:  # The same for all rows.
        inputs["position_ids"] = inputs["position_ids"][None]
    # A whole batch stays as it is, so that its numbers are those of reference_log_probs.
    some = len(rows) < size and all(_has_rows(name, value, size) for name, value in inputs.items())
    if some:
        inputs = {name: value.expand(size, *value.shape[1:])[rows] for name, value in inputs.items()}
    inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
    found: list[float] = reference_log_probs(model, inputs, with_adapter=True).tolist()
    return found if some else [found[row] for row in rows]


def _has_rows(name: str, value: object, size: int) -> bool:
    if name == "position_ids" and isinstance(value, Tensor) and value.dim() == 3:  # Of images: [3, B, T].
        return False
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) in (1, size)


def _with_progress(batches: Batches, progress: bool | Callable[[Batches], Batches]) -> Batches:
    if callable(progress):
        return progress(batches)
    if not progress:
        return batches
    wrapped: Batches = import_optional("tqdm.auto").tqdm(batches, desc="reference log-probabilities", unit="batch")
    return wrapped
