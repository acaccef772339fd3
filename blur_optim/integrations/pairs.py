"""Two data sets read side by side: each item, and each batch, has a forget and a retain half."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from blur_optim.losses import ReferenceLogProbs
from blur_optim.losses.forward import with_positions
from blur_optim.losses.text import IGNORE_INDEX

Collator = Callable[[list[Any]], Any]
# A preference example has two answers, each with tokens of its own: what to say instead, and what to forget.
ANSWERS = ("chosen", "rejected")
REFERENCE_KEY = "reference_log_probs"


class PairedDataset(Dataset[dict[str, Any]]):
    """Items ``{"forget": forget[i], "retain": retain[j]}`` for an index ``(i, j)``.

    Args:
        forget, retain: map-style data sets, with a length of at least 1.
        epoch_over: whose length an epoch has: ``"longer"``, ``"forget"`` or ``"retain"``. Of the other, the shorter is
            read several times in an epoch, the longer over several epochs.
    Raises:
        TypeError: a data set has no length.
        ValueError: a data set is empty, or ``epoch_over`` is none of the three.
    """

    def __init__(self, forget: Any, retain: Any, epoch_over: str = "longer") -> None:
        self.sizes = {"forget": _length("forget_dataset", forget), "retain": _length("retain_dataset", retain)}
        self.forget, self.retain = forget, retain
        self.set_epoch_over(epoch_over)

    def set_epoch_over(self, epoch_over: str) -> None:
        """Let an epoch have another length."""
        lengths = {**self.sizes, "longer": max(self.sizes.values())}
        if epoch_over not in lengths:
            raise ValueError(f"`epoch_over` must be one of {sorted(lengths)}, got {epoch_over!r}.")
        self._length = lengths[epoch_over]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        # A plain number, for those who only want to look: both read in order.
        i, j = (index, index) if isinstance(index, int) else index
        return {"forget": self.forget[i % self.sizes["forget"]], "retain": self.retain[j % self.sizes["retain"]]}


class PairSampler(Sampler[tuple[int, int]]):
    """Indices of pairs, shuffled: each side is read to its end, in a new order each time, before any row comes again.

    The order depends on the seed and the epoch alone, so every process has the same, and a resumed run goes on with
    what the interrupted one would have read.

    Args:
        dataset: what to read.
        seed: of the two orders.
        epoch: returns the number of the epoch that begins, from 0.
    """

    def __init__(self, dataset: PairedDataset, seed: int, epoch: Callable[[], int]) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start = self.epoch() * len(self)
        forget, retain = (self._rows(side, start) for side in ("forget", "retain"))
        yield from zip(forget, retain, strict=True)

    def _rows(self, side: str, start: int) -> Iterator[int]:
        size, turn, order = self.dataset.sizes[side], -1, torch.empty(0)
        for position in range(start, start + len(self)):
            if position // size != turn:
                turn = position // size
                order = torch.randperm(size, generator=_generator(self.seed, side, turn))
            yield int(order[position % size])


class PairCollator:
    """Collate each half of the pairs with the collator of a single data set.

    A half whose items are ``{"chosen": ..., "rejected": ...}`` (for DPO) becomes a dict of two batches. A batch without
    any label to train on, as cut prompts leave it, is warned of, once for each half.

    Args:
        collate: makes a batch of a list of items.
        reference: adds ``reference_log_probs`` [B] to forget batches: looked up here, where the batch is on the CPU,
            the step need not wait for a copy.
        positions: give batches that are padded on the left ``position_ids``, see
            :func:`blur_optim.losses.forward.with_positions`.
    """

    def __init__(
        self, collate: Collator, reference: ReferenceLogProbs | None = None, *, positions: bool = False
    ) -> None:
        self.collate, self.reference, self.positions = collate, reference, positions
        self._warned: set[str] = set()

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = {side: self.side([pair[side] for pair in pairs]) for side in ("forget", "retain")}
        for side, half in batch.items():
            self._check_labels(side, half)
        return {**batch, "forget": self._with_reference(batch["forget"])}

    def side(self, items: list[Any]) -> Any:
        """Collate the items of one half, without what the reference knows of them."""
        if isinstance(items[0], Mapping) and set(items[0]) == set(ANSWERS):
            return {name: self._collated([item[name] for item in items]) for name in ANSWERS}
        return self._collated(items)

    def _collated(self, items: list[Any]) -> Any:
        batch = self.collate(items)
        return with_positions(batch) if self.positions and isinstance(batch, Mapping) else batch

    def _check_labels(self, side: str, half: Any) -> None:
        if side not in self._warned and isinstance(half, Mapping) and any(map(_is_untrained, single_batches(half))):
            self._warned.add(side)
            warnings.warn(
                f"`{side}_dataset` gave a batch in which every label is {IGNORE_INDEX}: nothing in it is trained on. "
                "Were long prompts cut before their answers?",
                stacklevel=2,
            )

    def _with_reference(self, batch: Any) -> Any:
        if self.reference is not None:
            for part in single_batches(batch):
                part[REFERENCE_KEY] = self.reference(part)
        return batch


def single_batches(batch: Any) -> list[Any]:
    """The batches in a half: one, or two where its examples have two answers."""
    return [batch[name] for name in ANSWERS] if all(name in batch for name in ANSWERS) else [batch]


def _is_untrained(batch: Any) -> bool:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    # Nothing predicts the first column.
    return isinstance(labels, Tensor) and labels.dim() == 2 and bool((labels[:, 1:] == IGNORE_INDEX).all())


def _length(name: str, dataset: Any) -> int:
    try:
        size = len(dataset)
    except TypeError:
        raise TypeError(
            f"`{name}` must have a length and items by number, got {type(dataset).__name__}. Read a stream into a list "
            "first, or take its first rows."
        ) from None
    if size == 0:
        raise ValueError(f"`{name}` must hold at least one row, got none.")
    return size


def _generator(seed: int, side: str, turn: int) -> torch.Generator:
    # Mixed, so that neither the two sides nor neighbouring seeds share an order.
    return torch.Generator().manual_seed((seed * 1_000_003 + turn) * 2 + (side == "retain"))
