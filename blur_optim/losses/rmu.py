"""Representation misdirection (RMU): losses on the activations of one layer, and their capture."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from blur_optim.losses.checks import check_activations, check_floating, check_positive, check_shape, masked_mean, upcast


def steering_vector(
    hidden_size: int,
    coefficient: float = 6.5,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Draw the fixed random vector to which RMU steers the activations on forget data.

    .. math:: c \cdot u / \|u\|, \quad u_j \sim \mathrm{Uniform}[0, 1)      (arXiv:2403.03218)

    Args:
        hidden_size: H, the width of the steered layer.
        coefficient: c, the vector's norm, > 0. The paper's 6.5 is for Zephyr-7B; wider activations need more.
        generator: source of randomness, on any device; without one, the CPU's global generator.
        device: where the vector lies; torch's default device unless given.
        dtype: of the vector; the direction is the same for each.
    Returns:
        [H], no gradient.
    Raises:
        ValueError: the hidden size or the coefficient isn't positive.
    """
    check_positive("hidden_size", hidden_size)
    check_positive("coefficient", coefficient)
    # Drawn in one dtype and on the generator's device: a seed means one direction wherever it is used.
    source = torch.device("cpu") if generator is None else generator.device
    uniform = torch.rand(hidden_size, generator=generator, device=source, dtype=torch.float32).cpu().double()
    vector: Tensor = coefficient * uniform / torch.linalg.vector_norm(uniform)
    return vector.to(device or torch.get_default_device(), dtype)


def rmu_forget_loss(activations: Tensor, steering_vector: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Average the squared distance of one layer's activations on forget data to the steering vector.

    .. math:: \frac{1}{|M| H} \sum_{(i,t) \in M} \|h_{i,t} - c \, u / \|u\|\|^2      (arXiv:2403.03218)

    The paper's equations have no 1/H, its code has: here and in :func:`rmu_retain_loss`.

    Args:
        activations: [B, T, H], see :func:`capture_activations`.
        steering_vector: [H], see :func:`steering_vector`; gets no gradient.
        mask: [B, T] bool or integers, nonzero where a token takes part (such as ``attention_mask``); None
            for every token.
    Returns:
        0-d float32; 0 where the mask is empty.
    Raises:
        TypeError: an input isn't floating point, or the mask is.
        ValueError: the shapes aren't [B, T, H], [H] and [B, T].
    """
    check_activations(activations)
    check_floating("steering_vector", steering_vector)
    check_shape("steering_vector", steering_vector, activations.shape[2:], "activations[0, 0]")
    return _activation_loss(activations, steering_vector, mask)


def rmu_retain_loss(activations: Tensor, frozen_activations: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Average the squared distance of one layer's activations on retain data to the frozen model's.

    .. math:: \frac{1}{|M| H} \sum_{(i,t) \in M} \|h_{i,t} - h^{frozen}_{i,t}\|^2      (arXiv:2403.03218)

    Args:
        activations: [B, T, H], see :func:`capture_activations`.
        frozen_activations: [B, T, H], those of the model before unlearning; get no gradient.
        mask: [B, T] bool or integers, nonzero where a token takes part; None for every token.
    Returns:
        0-d float32; 0 where the mask is empty.
    Raises:
        TypeError, ValueError: as :func:`rmu_forget_loss`.
    """
    check_activations(activations)
    check_floating("frozen_activations", frozen_activations)
    check_shape("frozen_activations", frozen_activations, activations.shape, "activations")
    return _activation_loss(activations, frozen_activations, mask)


class CapturedActivations:
    """Hold what a module returned last; made by :func:`capture_activations`."""

    def __init__(self) -> None:
        self._output: Tensor | None = None

    @property
    def output(self) -> Tensor:
        """Return the last forward's output, [B, T, H] for a decoder layer, attached to its graph.

        Raises:
            RuntimeError: the module hasn't run yet.
        """
        if self._output is None:
            raise RuntimeError(
                "`output` must be read after a forward of the captured module, got none so far. "
                "Run the model inside `with capture_activations(module)`."
            )
        return self._output

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(first, Tensor):
            raise TypeError(
                f"`module` must return a tensor or a tuple that starts with one, got {type(first).__name__} "
                f"from {type(module).__name__}. Capture a layer, not the whole model."
            )
        self._output = first


@contextmanager
def capture_activations(module: nn.Module) -> Iterator[CapturedActivations]:
    r"""Record what a module returns, with its gradient, for the RMU losses (arXiv:2403.03218).

    .. math:: h_{i,t} = M_\ell(x_{i,\leq t})

    Layers above the module still run, but a loss on ``output`` sends them no gradient. A compiled model runs as it was
    before ``torch.compile``: compiled code does not look for hooks that came after it.

    Args:
        module: layer l, such as ``model.model.layers[7]``; returns [B, T, H], or a tuple that starts with it.
    Returns:
        A context manager. Its value's ``output`` is the last forward's output, readable after the block too;
        the hook is gone by then, also after an exception.
    Raises:
        TypeError: in the forward, if the module returns neither a tensor nor a tuple that starts with one.
        RuntimeError: if ``output`` is read before any forward.
    """
    captured = CapturedActivations()
    handle = module.register_forward_hook(captured._record)
    try:
        with _uncompiled():
            yield captured
    finally:
        handle.remove()


def _uncompiled() -> AbstractContextManager[Any]:
    # Nothing to undo before dynamo was loaded, and within compiled code it is dynamo that sees the hook.
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return nullcontext()
    context: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return context


def _activation_loss(activations: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        mask = activations.new_ones(activations.shape[:2], dtype=torch.bool)
    if mask.is_floating_point():
        raise TypeError(f"`mask` must be bool or integers, got {mask.dtype}. Pass `mask != 0`.")
    check_shape("mask", mask, activations.shape[:2], "activations[..., 0]")
    distance = (upcast(activations) - upcast(target.detach())).square().mean(dim=-1)
    return masked_mean(distance, mask != 0)
