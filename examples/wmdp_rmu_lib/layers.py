"""Which parameters are trained, the activations of a layer, and those of the model as it was."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from shared_lib.errors import InputError
from shared_lib.models import Model
from torch import Tensor, nn
from torch.func import functional_call

from blur_optim.losses import capture_activations

from .corpora import Batch


def decoder_layers(model: Model) -> nn.ModuleList:
    """Return the model's layers: its list of as many modules as the configuration says.

    Raises:
        InputError: there is no such list, or several.
    """
    count = model.config.num_hidden_layers
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if len(found) != 1:
        raise InputError(f"--model: {type(model).__name__} must have one list of {count} layers, got {len(found)}.")
    return found[0]


def choose_trained(model: Model, layers: Sequence[int], pattern: str) -> dict[str, nn.Parameter]:
    """Freeze every parameter but those of the layers that match.

    Args:
        pattern: as of a shell, for names within a layer, such as ``mlp.down_proj.weight``.
    Returns:
        The trained parameters by their full names.
    Raises:
        InputError: a layer doesn't exist, or in one of them nothing matches.
    """
    modules = decoder_layers(model)
    check_layers("--layers", layers, len(modules))
    chosen: set[int] = set()
    for number in layers:
        names = dict(modules[number].named_parameters())
        matching = [id(param) for name, param in names.items() if fnmatchcase(name, pattern)]
        if not matching:
            raise InputError(
                f"--param-pattern: in layer {number} nothing is called {pattern!r}; there are {', '.join(names)}."
            )
        chosen.update(matching)
    for param in model.parameters():
        param.requires_grad_(id(param) in chosen)
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def check_layers(option: str, layers: Sequence[int], count: int) -> None:
    """See that the layers exist."""
    for number in layers:
        if number >= count:
            raise InputError(f"{option}: the model's layers are 0 to {count - 1}, got {number}.")


class _LayerReached(Exception):
    """Ends a forward pass; never leaves this module."""


def activations(model: Model, layer: int, batch: Batch, parameters: dict[str, Tensor] | None = None) -> Tensor:
    """Return what a layer puts out, ``[B, T, H]``, attached to its graph. The layers above do not run.

    Args:
        parameters: values to take in place of the model's own, by name.
    """
    module = decoder_layers(model)[layer]
    inputs = {**batch, "use_cache": False}
    with capture_activations(module) as captured, _stopped_after(module):
        if parameters is None:
            model(**inputs)
        else:
            functional_call(model, parameters, (), inputs)
    return captured.output


@contextmanager
def _stopped_after(module: nn.Module) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _LayerReached

    handle = module.register_forward_hook(stop)
    try:
        yield
    except _LayerReached:
        pass
    finally:
        handle.remove()


class SwappedFrozen:
    """The activations of the model as it was, from the model itself with the trained parameters' first values.

    Memory: those values. For Zephyr-7B's three down-projections 0.35 GB in bfloat16.
    """

    def __init__(self, model: Model, trained: dict[str, nn.Parameter], layer: int) -> None:
        self.model, self.layer = model, layer
        self.values = {name: param.detach().clone() for name, param in trained.items()}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        return activations(self.model, self.layer, batch, self.values)


class CopiedFrozen:
    """The same from a second model, as in the original code. Memory: that of the model."""

    def __init__(self, model: Model, trained: dict[str, nn.Parameter], layer: int) -> None:
        self.model, self.layer = copy.deepcopy(model).requires_grad_(False), layer

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        return activations(self.model, self.layer, batch)


FROZEN = {"swap": SwappedFrozen, "copy": CopiedFrozen}


@torch.no_grad()
def median_norm(model: Model, layer: int, batches: Sequence[Batch]) -> float:
    """Return the median over tokens of the activations' norm: the scale that a steering vector is to be seen on."""
    norms = [
        torch.linalg.vector_norm(activations(model, layer, batch).float(), dim=-1)[batch["attention_mask"] != 0]
        for batch in batches
    ]
    return torch.cat(norms).median().item()
