"""What tells one example, and one model, from another: hashes of their content."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Container, Iterator, Mapping

import torch
from torch import Tensor, nn

from blur_optim.losses.checks import check_keys, check_labels, check_shape
from blur_optim.losses.forward import adapter_owner, check_one_answer_a_row, extra_inputs
from blur_optim.losses.text import IGNORE_INDEX

KEY_BYTES = 16

_SAMPLES = 256  # words of each tensor, at least, where it has so many
_WRAPPED = ("base_layer", "original_module")  # what PEFT's layers call the layer that they adapt
_VIRTUAL_TOKENS = "prompt_encoder."  # where a PEFT model keeps those, outside of the model that it adapts


def example_keys(batch: Mapping[str, Tensor]) -> list[bytes]:
    r"""Hash what each example's :func:`reference_log_probs` depends on, and nothing else.

    That is, for a causal model, the tokens attended to and the labels, up to the last label other than -100. So
    an example has one key whatever its row, its batch, the side and width of its padding, the id that pads, the
    dtype of the ids, and whether there is an ``attention_mask`` at all (without one: if padded on the right). A
    label in the first column does not count, for nothing predicts it. ``position_ids`` do not count either: they
    are taken to go with the padding. Every other tensor does, of the columns that count where it has them: images,
    token types, embeddings.

    Args:
        batch: ``input_ids`` [B, T] integers or ``inputs_embeds`` [B, T, H], ``labels`` [B, T] int64, and where
            present ``attention_mask`` [B, T], nonzero where a token is attended to.
    Returns:
        B keys of 16 bytes.
    Raises:
        TypeError: the batch isn't a mapping, the labels aren't int64 or the ids aren't integers.
        ValueError: the batch lacks a key, the shapes differ, several answers were flattened into one row, or a tensor
            does not say which part of it belongs to which row.
    Cost: one copy of the batch to the CPU: on a GPU's batch, one synchronisation.
    """
    ids, labels, attended = torch.stack(_contents(batch)).cpu()
    check_one_answer_a_row(batch)
    extras = {name: _by_row(name, value, labels) for name, value in sorted(extra_inputs(batch).items())}
    counted = labels != IGNORE_INDEX
    counted[:, :1] = False
    # Padding that is counted after all, or that a label is predicted from, changes the log-probability.
    read = (attended != 0) | counted | counted.roll(-1, dims=1)
    read &= counted.flip(1).cumsum(1).flip(1) > 0
    contents = torch.stack([ids, labels.masked_fill(~counted, IGNORE_INDEX), attended], dim=-1)
    keys = [_key(row[kept]) for row, kept in zip(contents, read, strict=True)]
    return [_key_with(key, _parts(extras, row, read[row])) for row, key in enumerate(keys)] if extras else keys


def missing_keys(batch: Mapping[str, Tensor], known: Container[bytes]) -> dict[int, bytes]:
    """Return the keys that are not known, by row; of rows with the same key the first."""
    keys = example_keys(batch)
    return {row: key for row, key in enumerate(keys) if key not in known and key not in keys[:row]}


def _contents(batch: Mapping[str, Tensor]) -> list[Tensor]:
    if not isinstance(batch, Mapping):
        raise TypeError(f"`batch` must be a mapping such as a dict of tensors, got {type(batch).__name__}.")
    check_keys(
        batch, "inputs_embeds" if "input_ids" not in batch and "inputs_embeds" in batch else "input_ids", "labels"
    )
    labels = batch["labels"]
    ids = batch["input_ids"] if "input_ids" in batch else torch.zeros_like(labels)  # The embeddings say it all.
    mask = batch.get("attention_mask")
    attended = torch.ones_like(labels) if mask is None else mask != 0
    check_labels(labels)
    check_shape("input_ids", ids, labels.shape, "labels")
    check_shape("attention_mask", attended, labels.shape, "labels")
    if ids.is_floating_point():
        raise TypeError(f"`input_ids` must be integers, got {ids.dtype}.")
    return [ids.long(), labels, attended.long()]


def _key(content: Tensor) -> bytes:
    numbers = content.flatten().tolist()
    return hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=KEY_BYTES).digest()


def _by_row(name: str, value: Tensor, labels: Tensor) -> Tensor:
    """A tensor of the batch with one row for each of its rows, on the CPU."""
    rows = len(labels)
    if value.dim() and len(value) == rows:
        return value.detach().cpu()
    if rows == 1:
        return value.detach().cpu()[None]
    raise ValueError(
        f"`batch[{name!r}]` must have one row for each of the batch's {rows}, for an example to be known by its "
        f"content, got shape {tuple(value.shape)}. Use batches of one row, or compare with a frozen model: reference=."
    )


def _parts(extras: Mapping[str, Tensor], row: int, read: Tensor) -> Iterator[bytes]:
    for name, value in extras.items():
        part = value[row]
        if part.shape[:1] == read.shape:  # A value for each token: padding does not count.
            part = part[read]
        yield repr((name, str(part.dtype), tuple(part.shape))).encode()
        yield part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _key_with(key: bytes, parts: Iterator[bytes]) -> bytes:
    digest = hashlib.blake2b(key, digest_size=KEY_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def model_fingerprint(model: nn.Module) -> str:
    """Hash the weights of a model as it is, which :class:`ReferenceLogProbs` keeps the log-probabilities of.

    Of every parameter and persistent buffer, in order: dtype, shape, the sum of its words of 8 bytes as integers,
    and 256 or more of them, evenly spaced. It is the same on every device, sharded or not, and with or without a
    DDP wrapper or a PEFT adapter that does nothing yet: a LoRA whose second matrices are zero, a module to be saved
    that is a copy. It sees any one element that changed, a cast, another shape or order of the tensors, and another
    choice among several adapters. It does not see words rearranged within a tensor between the samples, nor anything
    but weights: code, configuration (such as the attention's implementation, a LoRA's scale), autocast.

    Args:
        model: the reference. Not modified.
    Returns:
        32 hexadecimal digits.
    Raises:
        ValueError: weights are on the meta device, such as offloaded ones.
    Cost: one read of the weights where they are. Sharded ones are gathered, one by one: a collective.
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in _weights(model):
        digest.update(repr((str(tensor.dtype), tuple(tensor.shape), *_summary(tensor))).encode())
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """The weights that count: of the model, and of a PEFT adapter that does something."""
    owner = adapter_owner(model)
    base = model if owner is None else getattr(owner, "get_base_model", lambda: owner)()
    prefixes = () if owner is None else tuple(_adapter_names(base))
    values = {name: v for name, v in base.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    adapter = {name: v for name, v in values.items() if name.startswith(prefixes)}
    yield from (_whole(name, v) for name, v in values.items() if name not in adapter)
    if owner is not None:
        state = owner.state_dict(keep_vars=True)
        adapter |= {name: v for name, v in state.items() if name.startswith(_VIRTUAL_TOKENS)}
    inert = [_does_nothing(name, value, values) for name, value in adapter.items()]  # Shards are gathered for each.
    if not all(inert):
        yield from (_whole(name, v) for name, v in adapter.items())
        names = getattr(owner, "active_adapters", ())
        yield torch.tensor(list(repr(names() if callable(names) else names).encode()), dtype=torch.uint8)


def _whole(name: str, value: Tensor) -> Tensor:
    if value.is_meta:
        raise ValueError(f"`model` must hold its weights, got {name!r} on the meta device. Load without offloading.")
    plain = value.detach()
    return plain.full_tensor() if hasattr(plain, "full_tensor") else plain  # A DTensor is gathered.


def _adapter_names(base: nn.Module) -> Iterator[str]:
    """Yield where a layer that wraps another holds anything but that other."""
    for path, module in base.named_modules(remove_duplicate=False):
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        parts = [name for name, _ in (*module.named_children(), *own)]
        if any(name in _WRAPPED for name in parts):
            yield from (f"{path}.{name}".lstrip(".") for name in parts if name not in _WRAPPED)


def _does_nothing(name: str, value: Tensor, values: Mapping[str, Tensor]) -> bool:
    """Whether a tensor of an adapter leaves the model's output as it is, if all others do."""
    parts = name.split(".")
    if "lora_A" in parts or "lora_embedding_A" in parts:  # What it gives is multiplied with B.
        return True
    if "lora_B" in parts or "lora_embedding_B" in parts:
        return not bool(_whole(name, value).any())
    if "modules_to_save" in parts:
        place = parts.index("modules_to_save")
        original = values.get(".".join([*parts[:place], "original_module", *parts[place + 2 :]]))
        return original is not None and torch.equal(_whole(name, value), _whole(name, original))
    return False


def _summary(tensor: Tensor) -> tuple[int, list[int], list[int]]:
    flat = tensor.reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:  # A view of int64 has to begin at a multiple of its size.
        flat = flat.clone()
    whole = flat.numel() // 8 * 8
    words = flat[:whole].view(torch.int64)  # Their sum wraps around: it is the same in any order, so on any device.
    return int(words.sum()), words[:: max(1, words.numel() // _SAMPLES)].tolist(), flat[whole:].tolist()
