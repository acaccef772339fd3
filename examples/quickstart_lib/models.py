"""The model that learns and forgets: a small Llama with a tokenizer of its own, or any causal LM."""

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .encoding import PROMPT
from .errors import InputError
from .rows import Row

SMALL_LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
VOCABULARY = 2048


def build_tokenizer(rows: Sequence[Row]) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer on all texts of the rows."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


def _texts(rows: Iterable[Row]) -> Iterable[str]:
    for row in rows:
        yield f"{PROMPT.format(question=row.question)} {row.answer}"
        yield from (row.paraphrased_question, row.paraphrased_answer, *row.perturbed_answers)


def build_small_llama(tokenizer: PreTrainedTokenizerBase, seed: int, **sizes: int) -> PreTrainedModel:
    """Make an untrained Llama of under a million parameters."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **(SMALL_LLAMA | sizes)))
