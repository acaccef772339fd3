"""A tiny task and model for the loop of the benchmark."""

from dataclasses import replace
from typing import Any

import torch
import unlearning  # noqa: F401  (puts shared_lib on the path)
from shared_lib.encoding import Example
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from unlearning.jobs import Job
from unlearning.loop import (
    Unlearning,
)
from unlearning.losses import Before
from unlearning.settings import Settings
from unlearning.tracks.task import Task

VOCABULARY = 24
SETTINGS = Settings(
    "tiny", "short", "tofu", "", "forget01", steps=4, looks=2, batch_size=2, relearned_rows=2, relearning_steps=8
)
LOSSES = ["ga+nll", "npo+kl", "simnpo+nll", "dpo+nll", "hinge+kl", "margin+nll", "rmu+rmu"]


def make_examples(count: int, first: int) -> list[Example]:
    """Prompts and answers of one length each, so that every row has as many tokens in a mean as any other."""
    rng = torch.Generator().manual_seed(first)
    tokens = torch.randint(2, VOCABULARY, (count, 7), generator=rng).tolist()
    return [Example(row[:3], [*row[3:], 1]) for row in tokens]


def make_task() -> Task:
    forget, retain, untouched = make_examples(6, 1), make_examples(6, 2), make_examples(3, 3)
    refusals = [Example(example.prompt, [2, 3, 1]) for example in forget]
    others = retain + untouched
    return Task(
        None, others + forget, others, forget, retain, untouched, refusals, judge=lambda model, kept: ({}, None)
    )


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


TASK = make_task()


def unlearn(
    before: Before, method: str = "npo+nll/blur", seed: int = 1, lr: float = 1e-2, **changes: Any
) -> Unlearning:
    run = Unlearning(Job("sweep", method, 0.1, lr, seed), before, TASK, replace(SETTINGS, **changes))
    run.run()
    return run


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model: torch.nn.Module, start: dict[str, Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
