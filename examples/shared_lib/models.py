"""The model that learns and forgets: a small Llama with a tokenizer of its own, or any causal LM."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from .encoding import PROMPT, Batch, encode_rows
from .errors import InputError, is_path
from .rows import Row

Model = PreTrainedModel
Tokenizer = PreTrainedTokenizerBase

# 0.66M parameters with its vocabulary. Of the shapes tried on 400 rows of TOFU the first to know them: two
# layers in batches of 16 take 55 CPU-seconds, three layers in batches of 32 take 120.
SMALL_LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
VOCABULARY = 2048


def quiet_transformers() -> None:
    """Keep transformers' own progress bars and advice out of the story."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def save_small_llama(folder: Path, rows: Sequence[Row], seed: int) -> None:
    """Write an untrained small Llama, and a tokenizer trained on the rows, to ``folder``."""
    tokenizer = build_tokenizer(rows)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SMALL_LLAMA))
    save_model(model, tokenizer, folder)


def build_tokenizer(rows: Sequence[Row]) -> Tokenizer:
    """Train a byte-level BPE tokenizer on all texts of the rows."""
    return train_tokenizer(texts_of(rows), VOCABULARY)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most ``vocabulary`` tokens; 0 pads and 1 ends a text."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


def texts_of(rows: Sequence[Row]) -> Iterator[str]:
    """Yield every text of the rows, the prompts as the model meets them."""
    for row in rows:
        yield f"{PROMPT.format(question=row.question)} {row.answer}"
        yield from (row.paraphrased_question, row.paraphrased_answer, *row.perturbed_answers)


def save_model(model: Model, tokenizer: Tokenizer, folder: Path) -> None:
    """Write model and tokenizer to ``folder``.

    Raises:
        OSError: they could not be written, such as for a full disk.
    """
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # safetensors and tokenizers wrap the operating system's error in their own.
        raise OSError(f"the model could not be written: {error}") from error


def load_model(
    source: str | Path, device: str, gguf_file: str | None = None, dtype: torch.dtype = torch.float32
) -> Model:
    """Load a causal LM in ``dtype``; with ``gguf_file``, dequantize that file of ``source``."""
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **extra)
    if gguf_file:  # Its weights are plain ones now; what says otherwise would keep it from being saved.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model.to(device)


def load_tokenizer(source: str | Path, gguf_file: str | None = None) -> Tokenizer:
    """Load the tokenizer of a causal LM, or that in ``gguf_file`` of ``source``."""
    return AutoTokenizer.from_pretrained(source, **({"gguf_file": gguf_file} if gguf_file else {}))


def logits_of(model: Model, batch: Batch) -> torch.Tensor:
    """Return the model's logits, ``[B, T, V]``."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def check_model(name: str, rows: Sequence[Row]) -> None:
    """See that the model's configuration and tokenizer load and that every row fits, before any training.

    Raises:
        InputError: they don't; says which row is too long.
    """
    if not Path(name).is_dir() and is_path(name) and "/" in name:
        raise InputError(f"--model: there is no folder {name}.")
    try:
        config, tokenizer = AutoConfig.from_pretrained(name), load_tokenizer(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"--model: {name} could not be loaded: {str(error).strip().splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model: the tokenizer of {name} must have an end-of-text token, but has none.")
    limit = getattr(config, "max_position_embeddings", None) or 10**9
    for i, (prompt, answer) in enumerate(encode_rows(tokenizer, rows), start=1):
        check_vocabulary(f"--data: row {i} of the chosen authors", [*prompt, *answer], tokenizer, config)
        if len(prompt) + len(answer) > limit:
            raise InputError(
                f"--data: question and answer must fit the model's {limit} tokens, row {i} of the chosen authors "
                f"has {len(prompt) + len(answer)} ({rows[i - 1].question[:40]!r}...)."
            )


def check_vocabulary(where: str, ids: Iterable[int], tokenizer: Tokenizer, config: PretrainedConfig) -> None:
    """See that a model of this configuration has a row of its embedding for each id.

    Raises:
        InputError: it hasn't; says which token.
    """
    size = getattr(config.get_text_config(), "vocab_size", None) or 10**9
    highest = max(ids, default=0)
    if highest >= size:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise InputError(
            f"{where}: the tokenizer must make tokens that the model knows, 0 to {size - 1}, got {highest} "
            f"({token!r}). It has {len(tokenizer)}: were some added without model.resize_token_embeddings()?"
        )


def check_device(name: str) -> None:
    """See that tensors can be put on the device.

    Raises:
        InputError: they can't.
    """
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device: {name!r} cannot be used here: {str(error).splitlines()[0][:60]}...") from error
