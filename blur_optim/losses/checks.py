"""What the losses share: argument checks, the precision they compute in, and optional imports."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def check_keys(batch: Mapping[str, Tensor], *names: str) -> None:
    if not all(name in batch for name in names):
        raise ValueError(f"`batch` must have the keys {list(names)}, got {sorted(batch)}.")


def check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"`{name}` must be floating point, got {tensor.dtype}.")


def check_int64(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int64:
        raise TypeError(f"`{name}` must have dtype torch.int64, got {tensor.dtype}.")


def check_shape(name: str, tensor: Tensor, shape: torch.Size, like: str) -> None:
    if tensor.shape != shape:
        raise ValueError(f"`{name}` must have shape {tuple(shape)} like `{like}`, got {tuple(tensor.shape)}.")


def check_labels(labels: Tensor) -> None:
    check_int64("labels", labels)
    if labels.dim() != 2:
        raise ValueError(f"`labels` must have shape [B, T], got {tuple(labels.shape)}.")


def check_logits(logits: Tensor, labels: Tensor) -> None:
    check_floating("logits", logits)
    check_labels(labels)
    if logits.dim() != 3:
        raise ValueError(f"`logits` must have shape [B, T, V], got {tuple(logits.shape)}.")
    check_shape("labels", labels, logits.shape[:2], "logits[..., 0]")


def check_activations(activations: Tensor) -> None:
    check_floating("activations", activations)
    if activations.dim() != 3:
        raise ValueError(f"`activations` must have shape [B, T, H], got {tuple(activations.shape)}.")


def check_per_example(**tensors: Tensor) -> None:
    first_name, first = next(iter(tensors.items()))
    if first.dim() != 1 or first.numel() == 0:
        raise ValueError(f"`{first_name}` must have shape [B] with B >= 1, got {tuple(first.shape)}.")
    for name, tensor in tensors.items():
        check_floating(name, tensor)
        check_shape(name, tensor, first.shape, first_name)


def check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"`{name}` must be positive, got {value!r}.")


def upcast(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def import_optional(name: str) -> Any:
    """Import a module that torch alone does not bring.

    Raises:
        ImportError: it isn't installed; gives the command.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"`{package}` must be installed to store log-probabilities. `pip install {package}`."
        ) from error
