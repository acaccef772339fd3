"""The model: loaded from a folder, the hub or a GGUF file, with or without an adapter, and saved."""

import argparse
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from shared_lib import models as shared
from shared_lib.errors import InputError, is_path
from shared_lib.models import Model, Tokenizer
from transformers import AutoConfig, PretrainedConfig

MAX_LENGTH = 512


def load_tokenizer(options: argparse.Namespace) -> Tokenizer:
    """Load the model's tokenizer.

    Raises:
        InputError: it can't be loaded, or has no end-of-text token.
    """
    with _loading(options):
        tokenizer = shared.load_tokenizer(options.model, options.gguf_file)
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model: the tokenizer of {options.model} must have an end-of-text token, but has none.")
    return tokenizer


def load_config(options: argparse.Namespace) -> PretrainedConfig:
    """Load the model's configuration, and set --max-length where it was not given.

    Raises:
        InputError: it can't be loaded, the model is quantized, or shorter than --max-length.
    """
    with _loading(options):
        config = AutoConfig.from_pretrained(
            options.model, **({"gguf_file": options.gguf_file} if options.gguf_file else {})
        )
    if getattr(config, "quantization_config", None) and not options.gguf_file:
        raise InputError(
            f"--model: {options.model} must not be quantized, for its weights are trained and saved. Take the model "
            "that it was made from, or a GGUF file with --gguf-file, which is dequantised."
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit and options.max_length and options.max_length > limit:
        raise InputError(
            f"--max-length: must be at most {limit}, as many as the model reads, got {options.max_length}."
        )
    options.max_length = options.max_length or min(MAX_LENGTH, limit or MAX_LENGTH)
    return config


def load_model(options: argparse.Namespace, device: torch.device) -> Model:
    """Load the weights, all of them plain tensors.

    Raises:
        InputError: they can't be loaded.
    """
    with _loading(options):
        model = shared.load_model(options.model, device, options.gguf_file, getattr(torch, options.dtype))
    # A dequantised model is plain, and the Trainer would refuse one that says otherwise.
    for name in ("is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    return model


def add_adapter(model: Model, options: argparse.Namespace) -> Any:
    """Put a LoRA adapter on the model.

    Raises:
        InputError: peft isn't installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("--lora: peft must be installed. `pip install peft`.") from error
    names = options.lora_targets
    targets = names if names == "all-linear" else [name.strip() for name in names.split(",") if name.strip()]
    # Each checkpoint would say so of a folder with a GGUF file. The vocabulary is never modified here.
    warnings.filterwarnings("ignore", message="Could not find a config file in", category=UserWarning)
    torch.manual_seed(options.seed)
    tied = _are_tied(model)
    config = LoraConfig(
        r=options.lora,
        lora_alpha=options.lora_alpha or 2 * options.lora,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        **(_embeddings_too(model) if options.lora_embeddings else {}),
    )
    try:
        with warnings.catch_warnings():  # peft reads the older of two names that transformers has for one attribute.
            warnings.simplefilter("ignore", FutureWarning)
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError) as error:  # TypeError: an adapter on what is trained whole.
        also = " --lora-embeddings trains the token embeddings whole." if options.lora_embeddings else ""
        raise InputError(f"--lora-targets: {str(error).splitlines()[0]}{also}") from error
    if options.lora_embeddings and tied and not _are_tied(adapted.base_model.model):
        raise InputError(
            "--lora-embeddings: this model's output layer is its token embeddings, and peft would train a copy for the "
            "input alone. It keeps them one from version 0.18 on, if they are named embed_tokens. Leave the option out."
        )
    return adapted


def _embeddings_too(model: Model) -> dict[str, Any]:
    """Return what a LoraConfig needs to train the token embeddings, and the output layer with them where it is them."""
    from peft import LoraConfig

    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    known = {field.name for field in fields(LoraConfig)}
    tying = {"ensure_weight_tying": True} if _are_tied(model) and "ensure_weight_tying" in known else {}
    return {"modules_to_save": [name.rpartition(".")[2]], **tying}


def _are_tied(model: Any) -> bool:
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    return output is not None and output.weight is embeddings.weight


def finish(model: Any, options: argparse.Namespace) -> Any:
    """Return what will be saved: merged unless the adapter is kept, in its dtype."""
    if options.keep_adapter:
        return model
    merged = model.merge_and_unload() if options.lora else model
    return merged.to(getattr(torch, options.save_dtype)) if options.save_dtype else merged


def write(model: Any, tokenizer: Tokenizer, folder: Path, card: str) -> None:
    """Write model, tokenizer and card; the folder appears under its name only when it is whole.

    Raises:
        OSError: they could not be written, such as for a full disk.
    """
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    for old in (unfinished, folder):
        shutil.rmtree(old, ignore_errors=True)
    shared.save_model(model, tokenizer, unfinished)
    (unfinished / "README.md").write_text(card, encoding="utf-8")  # In the place of the one that peft writes.
    os.replace(unfinished, folder)


@contextmanager
def _loading(options: argparse.Namespace) -> Iterator[None]:
    name = options.model
    if not Path(name).is_dir() and is_path(name) and "/" in name:
        raise InputError(f"--model: there is no folder {name}.")
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # The hub and each format of files have their own.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = " ".join(lines[:3] if lines[0].endswith(":") else lines[:1])
        hint = "" if Path(name).exists() else " There is no folder of that name here."
        raise InputError(f"--model: {name} could not be loaded: {reason}{hint}{_gguf_hint(options)}") from error


def _gguf_hint(options: argparse.Namespace) -> str:
    files = sorted(path.name for path in Path(options.model).glob("*.gguf")) if Path(options.model).is_dir() else []
    return f" It has GGUF files: try --gguf-file {files[0]}." if files and not options.gguf_file else ""
