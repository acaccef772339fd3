"""Weights from safetensors into shards and back: no process ever holds more of a model than its shards."""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from shared_lib.errors import InputError, is_path
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

GENERATION = "generation_config.json"
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
FILE_BYTES = 5 * 10**9  # of an exported file, the size that the hub's own files have


def find_model(name: str) -> Path:
    """Return the folder of the model's files, or the path of its config.json.

    Raises:
        InputError: there is no such model.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            raise InputError(
                f"--model: {name} must hold *.safetensors, got none. To start from random weights, give the path of "
                "its config.json."
            )
        return path
    if is_path(name) and "/" in name:
        raise InputError(f"--model: there is no file or folder {name}.")
    from huggingface_hub import snapshot_download

    try:
        with _one_after_the_other():
            return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # The hub, the network and the name each have their own exceptions.
        raise InputError(f"--model: {name} is no file or folder here, nor on the hub: {_first_line(error)}") from error


@contextmanager
def _one_after_the_other() -> Iterator[None]:
    """Let the first process of each machine go first; the others then find what it has downloaded."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_first:
        dist.barrier()
    try:
        yield
    finally:
        if is_first:
            dist.barrier()


def load_config(source: Path) -> PretrainedConfig:
    """Load the configuration, ready for training.

    Raises:
        InputError: it can't be read, or the weights are quantized.
    """
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"--model: {source} could not be loaded: {_first_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"--model: {source} must have weights that can be trained, but they are quantized.")
    config.use_cache = False
    return config


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Raises:
        InputError: there is none.
    """
    folder = Path(name).parent if Path(name).is_file() else name
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # Each kind of tokenizer has its own exceptions.
        raise InputError(f"--tokenizer: {folder} could not be loaded: {_first_line(error)}") from error


def load_weights(model: nn.Module, source: Path, config: PretrainedConfig, seed: int) -> str:
    """Fill the shards. Return in words how.

    Raises:
        InputError: a tensor of the files has another shape than the configuration says.
    """
    if source.is_dir():
        tensors = unique_tensors(model)
        reader = HuggingFaceStorageReader(str(source))
        stored = reader.read_metadata().state_dict_metadata
        if tensors.keys() <= stored.keys():
            for name, tensor in tensors.items():
                if tensor.shape != stored[name].size:
                    raise InputError(
                        f"--model: {name} must have shape {tuple(tensor.shape)} as the configuration says, got "
                        f"{tuple(stored[name].size)} in {source}."
                    )
            dcp.load(tensors, storage_reader=reader)
            return "each process read its own shards"
    _broadcast_from_first(model, source, config, seed)
    return "random" if source.is_file() else "the first process read all and sent each its shards"


def _broadcast_from_first(model: nn.Module, source: Path, config: PretrainedConfig, seed: int) -> None:
    """For weights that transformers renames or merges while it loads them, and for random ones."""
    state: dict[str, Tensor] = {}
    if dist.get_rank() == 0:
        if source.is_file():
            torch.manual_seed(seed)
            state = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
        else:
            state = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name; those that are tied, once."""
    state = model.state_dict()
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return {name: state[name].detach() for name in names if name in state}


def export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, source: Path, folder: Path
) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    Args:
        source: the folder that the model came from; how to generate text is copied from there.
    """
    unfinished = folder.with_name(folder.name + ".unfinished")
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in unique_tensors(model).items()}
    writer = HuggingFaceStorageWriter(
        str(unfinished), _files_of(tensors), save_distributed=True, enable_consolidation=True
    )
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    dist.barrier()
    dcp.save(tensors, storage_writer=writer)
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished / "sharded")
        config = copy.deepcopy(model.config)
        config.dtype, config.use_cache = dtype, True
        config.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if (source / GENERATION).is_file():
            shutil.copyfile(source / GENERATION, unfinished / GENERATION)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.replace(folder)
    dist.barrier()


def _files_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Number the files, from 1, so that each holds what fits."""
    files, number, room = {}, 1, FILE_BYTES
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and room < FILE_BYTES:
            number, room = number + 1, FILE_BYTES
        files[name], room = number, room - size
    return files


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
