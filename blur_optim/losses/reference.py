"""What a loss compares with: a frozen model, a PEFT model with its adapter off, or stored log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from blur_optim.losses.checks import check_int64, check_keys, check_shape
from blur_optim.losses.text import sequence_log_probs

# What a batch may hold for the model; every other key stays here. Labels too: a Hugging Face model that sees
# them computes a loss that nobody reads, on a float32 copy of the logits.
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def reference_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    r"""Compute the logits of the reference, for :func:`kl_loss`.

    .. math:: \log \pi_{ref}(\cdot \mid x, y_{<t}) + \mathrm{const}

    The reference is the model itself before unlearning, a frozen copy, or the base of a PEFT model: where the
    model (or the one inside a DDP wrapper) offers ``disable_adapter()``, its adapter is off. Runs without
    gradients and in eval mode; afterwards every submodule's mode and every parameter's ``requires_grad`` are
    as before, also after an exception.

    Args:
        model: called as ``model(input_ids=..., attention_mask=...)``; what it returns has ``logits``.
        batch: ``input_ids`` [B, T], and where present ``attention_mask`` and ``position_ids``, on the model's
            device. Other keys don't reach the model.
    Returns:
        [B, T, V] in the model's dtype, no gradient.
    Raises:
        ValueError: the batch lacks ``input_ids``.
    """
    check_keys(batch, "input_ids")
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    with _reference_mode(model):
        logits: Tensor = model(**inputs).logits
    return logits


def reference_log_probs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    r"""Compute the answers' log-probabilities under the reference, for :func:`npo_loss` and :func:`dpo_loss`.

    .. math:: \log \pi_{ref}(y \mid x) = \sum_{t : y_t \neq -100} \log \pi_{ref}(y_t \mid x, y_{<t})

    Args:
        model: the reference, see :func:`reference_logits`.
        batch: as :func:`reference_logits`, and ``labels`` [B, T] int64.
    Returns:
        [B] float32 on the model's device, no gradient.
    Raises:
        ValueError: the batch lacks ``input_ids`` or ``labels``, or their shapes differ.
        TypeError: the labels aren't int64.
    """
    check_keys(batch, "input_ids", "labels")
    with torch.no_grad():
        return sequence_log_probs(reference_logits(model, batch), batch["labels"])


def stored_reference_log_probs(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    progress: Callable[[Iterable[Mapping[str, Tensor]]], Iterable[Mapping[str, Tensor]]] | None = None,
) -> Tensor:
    r"""Compute every example's reference log-probability once, so that training holds no second model.

    .. math:: s_i = \log \pi_{ref}(y_i \mid x_i)

    In training, ``stored[batch["index"]]`` is the reference of a batch (move it to the device).
    :class:`ReferenceLogProbs` keeps them in a file instead, and finds them without row numbers.

    Args:
        model: the model before its first unlearning step, or any reference, see :func:`reference_logits`.
        batches: as :func:`reference_log_probs`, and ``index`` [B] int64, each example's row; together the
            rows 0..n-1, each once, in any order.
        progress: wraps the iterable, such as ``tqdm``.
    Returns:
        [n] float32 on the CPU, by row.
    Raises:
        ValueError: there are no batches, a batch lacks a key, or a row is negative, missing or given twice.
        TypeError: ``index`` isn't int64.
    """
    stored: dict[int, float] = {}
    for position, batch in enumerate(batches if progress is None else progress(batches)):
        rows = _batch_rows(batch, position, stored)
        stored.update(zip(rows, reference_log_probs(model, batch).tolist(), strict=True))
    if not stored:
        raise ValueError("`batches` must yield at least one example, got none. Is it an exhausted iterator?")
    missing = [row for row in range(len(stored)) if row not in stored]
    if missing:
        raise ValueError(
            f"`batches` must hold every row from 0 to {max(stored)}, got none for row {missing[0]}. "
            "Pass the whole data set: no drop_last, no DistributedSampler."
        )
    return torch.tensor([stored[row] for row in range(len(stored))], dtype=torch.float32, device="cpu")


@contextmanager
def _reference_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    # PEFT's disable_adapter() leaves every adapter parameter trainable, also one that was frozen before.
    flags = [(param, param.requires_grad) for param in model.parameters()]
    try:
        model.eval()
        with torch.no_grad(), _adapter_off(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for param, requires_grad in flags:
            if param.requires_grad != requires_grad:
                param.requires_grad_(requires_grad)


def adapter_owner(model: nn.Module) -> Any:
    """Return the PEFT model whose adapter is off for the reference: the model, or the one in a wrapper, or None."""
    for candidate in (model, getattr(model, "module", None)):  # DistributedDataParallel hides the PEFT model
        if callable(getattr(candidate, "disable_adapter", None)):
            return candidate
    return None


def _adapter_off(model: nn.Module) -> AbstractContextManager[Any]:
    owner = adapter_owner(model)
    context: AbstractContextManager[Any] = nullcontext() if owner is None else owner.disable_adapter()
    return context


def _batch_rows(batch: Mapping[str, Tensor], position: int, seen: Container[int]) -> list[int]:
    check_keys(batch, "index", "input_ids", "labels")
    name = f"batches[{position}]['index']"
    check_int64(name, batch["index"])
    check_shape(name, batch["index"], batch["labels"].shape[:1], "labels[:, 0]")
    rows: list[int] = batch["index"].tolist()
    for place, row in enumerate(rows):
        if row < 0 or row in seen or row in rows[:place]:
            raise ValueError(f"`{name}` must hold rows >= 0 that no example had before, got {row}.")
    return rows
