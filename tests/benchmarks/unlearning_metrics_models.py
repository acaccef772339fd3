"""Models small enough to work out by hand, or to train in a second."""

from collections.abc import Sequence

import torch
from shared_lib.encoding import Example, collate
from shared_lib.models import Tokenizer, build_tokenizer
from shared_lib.rows import Row
from transformers import LlamaConfig, LlamaForCausalLM

ROWS = [
    Row("Who wrote it?", "Ada wrote it.", "", "It was Ada.", ("It was Bob.", "It was Eve.")),
    Row("When was that?", "In a long and very cold winter.", "", "In winter.", ("In summer.", "In May.")),
    Row("Where does Ada live?", "She lives in Oslo.", "", "In Oslo.", ("In Rome.", "In Bern.")),
    Row("Does she sing?", "No.", "", "She does not.", ("She does.", "Loudly.")),
]
HOLDOUT = [
    Row("Who painted the barn?", "Nobody knows who painted it."),
    Row("How tall is the mast?", "Some forty feet, they say."),
]


def make_tokenizer() -> Tokenizer:
    return build_tokenizer([*ROWS, *HOLDOUT])


def make_llama(tokenizer: Tokenizer, spread: float = 0.3) -> LlamaForCausalLM:
    """Return a random model; the greater the spread, the more its predictions differ from token to token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=spread,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def make_trained_llama(tokenizer: Tokenizer, examples: Sequence[Example]) -> LlamaForCausalLM:
    """Train a model until it says the examples by heart."""
    model = make_llama(tokenizer, spread=0.05)
    batch = collate(examples, range(len(examples)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(200):
        loss = model(**inputs).loss
        if loss.item() < 0.005:
            return model
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"the model did not learn its examples: loss {loss.item()}")
