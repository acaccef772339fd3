"""Text to batches: prompts and answers as token ids, padded, with -100 wherever no loss is wanted."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .rows import Row

PROMPT = "Question: {question}\nAnswer:"
IGNORE_INDEX = -100

Batch = dict[str, Tensor]  # input_ids, attention_mask, labels: [B, T] int64; index: [B] int64


class Example(NamedTuple):
    """The ids of one prompt and of its answer; the answer ends with the end-of-text token."""

    prompt: list[int]
    answer: list[int]


def encode(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> Example:
    """Tokenize prompt and answer apart, so that the prompt's ids never depend on the answer."""
    prompt = tokenizer(PROMPT.format(question=question))["input_ids"]
    if prompt[-1] == tokenizer.eos_token_id and len(prompt) > 1:
        prompt = prompt[:-1]  # Some tokenizers end every text.
    ids = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
    return Example(prompt, [*ids, tokenizer.eos_token_id])


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Example]:
    """Encode each row's question and answer."""
    return [encode(tokenizer, row.question, row.answer) for row in rows]


def collate(examples: Sequence[Example], index: Sequence[int], device: torch.device | str = "cpu") -> Batch:
    """Pad ``examples[i] for i in index`` on the right. Labels are -100 on prompts and padding."""
    chosen = [examples[i] for i in index]
    width = max(len(prompt) + len(answer) for prompt, answer in chosen)

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)

    # The padding id does not matter: it is masked, and attention is causal.
    return {
        "input_ids": padded([prompt + answer for prompt, answer in chosen], 0),
        "attention_mask": padded([[1] * len(prompt + answer) for prompt, answer in chosen], 0),
        "labels": padded([[IGNORE_INDEX] * len(prompt) + answer for prompt, answer in chosen], IGNORE_INDEX),
        "index": torch.tensor(index, device=device),
    }


def batches_in_order(examples: Sequence[Example], size: int, device: torch.device | str = "cpu") -> list[Batch]:
    """Return all examples in batches of similar length, which wastes little on padding."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt) + len(examples[i].answer))
    return [collate(examples, order[i : i + size], device) for i in range(0, len(order), size)]


def shuffled_batches(
    examples: Sequence[Example], size: int, rng: random.Random, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """Yield one epoch in batches of similar length; lengths are jittered, so that no two epochs are alike."""
    jitter = [len(e.prompt) + len(e.answer) + 6 * rng.random() for e in examples]
    order = sorted(range(len(examples)), key=jitter.__getitem__)
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(chunks)
    for chunk in chunks:
        yield collate(examples, chunk, device)


def endless_batches(
    examples: Sequence[Example], size: int, seed: int, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """Yield batches of exactly ``size`` forever, each epoch in a new order."""
    rng = random.Random(seed)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += rng.sample(range(len(examples)), len(examples))
        yield collate(examples, queue[:size], device)
        queue = queue[size:]
