"""JSON lines to batches. Which rows a step takes is known from its number alone, so a checkpoint need not hold more."""

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from shared_lib.encoding import PROMPT
from shared_lib.errors import InputError
from shared_lib.formats import records_of
from shared_lib.records import short, text_field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100

Batch = dict[str, Tensor]  # input_ids, labels: [B, T] int64


class Example(NamedTuple):
    """Token ids; the first ``prompt`` of them have no label."""

    ids: list[int]
    prompt: int

    @property
    def predicted(self) -> int:
        """How many labels count; nothing predicts the first token."""
        return len(self.ids) - max(1, self.prompt)


class MicroBatch(NamedTuple):
    """What a process computes at a time.

    Args:
        token_share: of the step's labels, and example_share of its sequences, that are here, times the number of
            processes, over which FSDP takes the mean. So a sum of shares times means is the mean over the step.
    """

    batch: Batch
    token_share: float
    example_share: float


def read_examples(option: str, path: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Example]:
    """Encode every line of a file.

    Raises:
        InputError: there is no such file, it is empty, or a line is not as it should be; names line and field.
    """
    if not path.is_file():
        raise InputError(f"{option}: there is no file {path}.")
    examples = [_encode(tokenizer, *_texts(where, fields), where, length) for where, fields in records_of(path)]
    if not examples:
        raise InputError(f"{option}: {path} must hold at least one line, got none.")
    return examples


def _texts(where: str, fields: Any) -> tuple[str, str]:
    """Return prompt and completion; a text is a completion without a prompt."""
    if not isinstance(fields, dict):
        raise InputError(f"{where}: the line must be one JSON object, got {short(fields)}.")
    if "text" in fields:
        return "", text_field(fields, "text", where)
    if "question" in fields and "prompt" not in fields:
        return PROMPT.format(question=text_field(fields, "question", where)), " " + text_field(fields, "answer", where)
    if "prompt" in fields or "completion" in fields:
        return text_field(fields, "prompt", where), text_field(fields, "completion", where)
    raise InputError(
        f'{where}: the object must have the field "text", or "prompt" and "completion", or "question" and "answer", '
        f"got {short(list(fields))}."
    )


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, where: str, length: int) -> Example:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    before = tokenizer(prompt)["input_ids"] if prompt else []
    if before[-1:] == end and len(before) > 1:
        before = before[:-1]  # Some tokenizers end every text.
    after = tokenizer(completion, add_special_tokens=not prompt)["input_ids"]
    example = Example([*before, *after, *(end if after[-1:] != end else [])][:length], len(before))
    if example.predicted < 1:
        raise InputError(
            f"{where}: something to predict must lie within --length, {length} tokens, got {len(before)} tokens of "
            f"prompt and {len(after)} of completion."
        )
    return example


def rows_of_step(count: int, batch: int, step: int, seed: int) -> list[int]:
    """Return which of ``count`` examples a step takes: shuffled epochs, one after another, in pieces of ``batch``."""
    places = range(step * batch, (step + 1) * batch)
    return [_epoch(count, place // count, seed)[place % count] for place in places]


@lru_cache(maxsize=8)
def _epoch(count: int, number: int, seed: int) -> list[int]:
    return random.Random(f"{seed} {number}").sample(range(count), count)


def micro_batches(
    examples: Sequence[Example], rows: Sequence[int], size: int, rank: int, ranks: int, device: torch.device
) -> list[MicroBatch]:
    """Return this rank's part of a step in batches of ``size``."""
    chosen = [examples[row] for row in rows]
    tokens = sum(example.predicted for example in chosen)
    each = len(chosen) // ranks
    mine = chosen[rank * each : (rank + 1) * each]
    parts = [mine[i : i + size] for i in range(0, each, size)]
    return [
        MicroBatch(
            collate(part, device), sum(e.predicted for e in part) * ranks / tokens, len(part) * ranks / len(chosen)
        )
        for part in parts
    ]


def collate(examples: Sequence[Example], device: torch.device) -> Batch:
    """Pad on the right. No attention mask: what is padded comes after everything that could attend to it."""
    width = max(len(example.ids) for example in examples)
    ids = [e.ids + [0] * (width - len(e.ids)) for e in examples]
    labels = [[IGNORE_INDEX] * e.prompt + e.ids[e.prompt :] + [IGNORE_INDEX] * (width - len(e.ids)) for e in examples]
    return {"input_ids": torch.tensor(ids, device=device), "labels": torch.tensor(labels, device=device)}
