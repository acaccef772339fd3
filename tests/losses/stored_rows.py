"""A small causal model and some rows, whose log-probabilities are stored."""

from types import SimpleNamespace

import torch
from torch import nn

from blur_optim.losses import ReferenceLogProbs

NEEDS_SAFETENSORS = "safetensors isn't installed: nothing can be stored"
VOCABULARY = 13


class ToyModel(nn.Module):
    """A causal model that remembers every token attended to. Counts its calls, and raises on demand."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.dropout = nn.Dropout(0.5)
        self.frozen_norm = nn.LayerNorm(8).eval().requires_grad_(False)
        self.head = nn.Linear(8, VOCABULARY)
        self.rows = []  # how many, by call
        self.error_at = {}  # number of the call -> error

    def forward(self, input_ids, attention_mask=None):
        self.rows.append(len(input_ids))
        if len(self.rows) in self.error_at:
            raise self.error_at[len(self.rows)]
        tokens = self.dropout(self.embedding(input_ids))
        attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        memory, states = torch.zeros_like(tokens[:, 0]), []
        for token, mask in zip(tokens.unbind(1), attended.unbind(1), strict=True):
            memory = torch.where(mask[:, None] != 0, torch.tanh(0.7 * memory + token), memory)
            states.append(memory + 0.3 * token)
        return SimpleNamespace(logits=self.head(self.frozen_norm(torch.stack(states, dim=1))))


# Prompt and answer of each example.
EXAMPLES = [([1, 2, 3], [4, 5]), ([1, 2], [4, 5]), ([1], [2, 3, 4, 5]), ([7, 8, 9, 10], [11]), ([6], [6, 6])]


def collate(examples, side="right", extra=0, pad_id=0, ids_dtype=torch.int64, with_mask=True):
    width = max(len(prompt) + len(answer) for prompt, answer in examples) + extra

    def padded(sequences, value):
        padding = [[value] * (width - len(sequence)) for sequence in sequences]
        pairs = zip(sequences, padding, strict=True)
        return torch.tensor([s + p if side == "right" else p + s for s, p in pairs])

    batch = {
        "input_ids": padded([prompt + answer for prompt, answer in examples], pad_id).to(ids_dtype),
        "labels": padded([[-100] * len(prompt) + answer for prompt, answer in examples], -100),
    }
    if with_mask:
        batch["attention_mask"] = padded([[1] * len(prompt + answer) for prompt, answer in examples], 0)
    return batch


def batches_of(*groups):
    return [collate([EXAMPLES[i] for i in group]) for group in groups]


ALL = batches_of([0, 1], [2, 3], [4])
PATH_NAME = "reference.safetensors"


def compute(path, model, batches=ALL, **options):
    return ReferenceLogProbs.load_or_compute(path, model, batches, **{"progress": False, **options})


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)
