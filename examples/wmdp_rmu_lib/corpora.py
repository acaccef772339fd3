"""Passages of text from files and from the Hugging Face hub, and batches of them."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from shared_lib.errors import InputError
from shared_lib.formats import Record, holds_rows, read_text, records_of
from shared_lib.models import Tokenizer
from shared_lib.records import short
from torch import Tensor

Batch = dict[str, Tensor]  # input_ids, attention_mask: [B, T] int64


class Corpus(NamedTuple):
    """Token ids by passage: to train on, and held out from it."""

    name: str
    train: list[list[int]]
    held_out: list[list[int]]


class Hub(NamedTuple):
    """A data set of the hub, as written on the command line: NAME:CONFIG:SPLIT:FIELD."""

    name: str
    config: str | None
    split: str
    field: str

    @classmethod
    def parse(cls, option: str, source: str, split: str) -> "Hub":
        """Fill in the defaults.

        Raises:
            InputError: there are more than four parts.
        """
        parts = source.split(":")
        if len(parts) > 4:
            raise InputError(f"{option}: {source} must have at most four parts, NAME:CONFIG:SPLIT:FIELD.")
        name, config, split_, field = parts + [""] * (4 - len(parts))
        return cls(name, config or None, split_ or split, field or "text")


def read_corpus(
    option: str,
    source: str,
    tokenizer: Tokenizer,
    length: int,
    held_out: int,
    batch: int,
    min_chars: int = 0,
    passage_chars: int = 1000,
) -> Corpus:
    """Read, filter, encode and split a corpus.

    Args:
        length: passages are cut to this many tokens. One that has a single token has nothing to predict and is dropped.
        held_out: how many passages are kept from training, evenly spaced.
    Raises:
        InputError: the source isn't there, a row is not as it should be (names line and field), or it is too short.
    """
    texts = [text for text in read_texts(option, source, passage_chars) if len(text) > min_chars]
    encoded = [ids for ids in (tokenizer(text)["input_ids"][:length] for text in texts) if len(ids) > 1]
    if len(encoded) < held_out + batch:
        raise InputError(
            f"{option}: {source} must have at least {held_out + batch} passages of more than {min_chars} characters, "
            f"--held-out and --batch together, got {len(encoded)}."
        )
    chosen = {i * len(encoded) // held_out for i in range(held_out)}
    parts = [[ids for i, ids in enumerate(encoded) if (i in chosen) is out] for out in (False, True)]
    return Corpus(Path(source).stem if Path(source).is_file() else source, *parts)


def read_texts(option: str, source: str, passage_chars: int) -> Iterator[str]:
    """Yield the passages of a source."""
    path = Path(source)
    if path.is_file() and not holds_rows(path):
        yield from passages(read_text(path), passage_chars)
        return
    field = "text" if path.is_file() else Hub.parse(option, source, "train").field
    for where, row in read_records(option, source):
        yield text_field(row, field, where)


def passages(text: str, chars: int) -> Iterator[str]:
    """Join lines until there are so many characters; a longer line is a passage by itself."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and len("\n".join([*lines, line])) > chars:
            yield "\n".join(lines).strip()
            lines = []
        lines.append(line)
    if lines:
        yield "\n".join(lines).strip()


def read_records(option: str, source: str, split: str = "train") -> Iterator[Record]:
    """Yield the rows of a file or of a data set of the hub, each with its place for messages.

    Args:
        split: of the hub's data set, unless the source names one.
    """
    path = Path(source)
    if path.is_file():
        yield from records_of(path)
        return
    hub = Hub.parse(option, source, split)
    from datasets import load_dataset

    try:
        rows = load_dataset(hub.name, hub.config, split=hub.split)
    except Exception as error:  # The hub, the network and the data set each have their own exceptions.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{option}: {hub.name} is no file here, and loading it from the Hugging Face hub failed: {reason[0]}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{hub.name}, split {hub.split}, row {number}", row


def text_field(row: Any, name: str, where: str) -> str:
    """Return a field that is a string, which may be empty: the filter of lengths comes later.

    Raises:
        InputError: it is something else; names place and field.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: the line must be one JSON object, got {short(row)}.")
    if not isinstance(row.get(name), str):
        got = short(row[name]) if name in row else f"no such field, only {short(list(row))}"
        raise InputError(f'{where}: field "{name}" must be a string, got {got}.')
    return row[name]


def collate(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Batch:
    """Pad on the right; which id pads does not matter, for it is masked, and attention is causal."""
    width = max(map(len, sequences))
    ids = [[*ids, *[0] * (width - len(ids))] for ids in sequences]
    mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def endless_batches(passages: Sequence[list[int]], size: int, seed: int, device: torch.device | str) -> Iterator[Batch]:
    """Yield batches of exactly ``size`` forever, each epoch in a new order."""
    rng = random.Random(seed)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += rng.sample(range(len(passages)), len(passages))
        yield collate([passages[i] for i in queue[:size]], device)
        queue = queue[size:]


def alternating(streams: Sequence[Iterator[Batch]]) -> Iterator[tuple[int, Batch]]:
    """Yield from the streams in turn, each batch with the number of its stream."""
    while True:
        for number, stream in enumerate(streams):
            yield number, next(stream)
