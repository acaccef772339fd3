"""Models that are trained on the spot: small Llamas of a few sizes, with a tokenizer of their own."""

from collections.abc import Iterable
from pathlib import Path

import torch
from shared_lib.models import SMALL_LLAMA, save_model, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

# By name: (hidden size, intermediate size, layers, vocabulary). Four heads each.
SIZES = {
    "0.8m": (128, 352, 3, 2048),
    "1m": (160, 432, 3, 2048),
    "3m": (256, 704, 3, 2048),
    "10m": (384, 1024, 5, 4096),
    "100m": (768, 2048, 12, 8192),
}


def save_small_model(folder: Path, size: str, texts: Iterable[str], seed: int) -> None:
    """Write an untrained Llama, and a tokenizer trained on ``texts``, to ``folder``."""
    hidden, intermediate, layers, vocabulary = SIZES[size]
    tokenizer = train_tokenizer(texts, vocabulary)
    shape = SMALL_LLAMA | {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
    }
    torch.manual_seed(seed)
    save_model(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)), tokenizer, folder)
