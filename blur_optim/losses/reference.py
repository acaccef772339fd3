"""What a loss compares with: a frozen model, a PEFT model with its adapter off, or stored log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blur_optim.losses.checks import check_int64, check_keys, check_shape, upcast
from blur_optim.losses.forward import adapter_owner, check_one_answer_a_row, model_logits
from blur_optim.losses.text import sequence_log_probs


def reference_logits(model: nn.Module, batch: Mapping[str, Tensor], *, with_adapter: bool = False) -> Tensor:
    r"""Compute the logits of the reference, for :func:`kl_loss`.

    .. math:: \log \pi_{ref}(\cdot \mid x, y_{<t}) + \mathrm{const}

    The reference is the model itself before unlearning, a frozen copy, or the base of a PEFT model: where the
    model (or the one inside a DDP wrapper) offers ``disable_adapter()``, its adapter is off. That is the model
    before unlearning only where unlearning began with an adapter that did nothing, such as a fresh LoRA: see
    :func:`adapter_changes`. Runs without gradients and in eval mode; afterwards every submodule's mode and every
    parameter's ``requires_grad`` are as before, also after an exception.

    Args:
        model: see :func:`blur_optim.losses.forward.run_model`.
        batch: ``input_ids`` [B, T], and what else ``forward`` takes, on the model's device. ``labels``, ``index``,
            ``reference_log_probs`` and strings don't reach the model.
        with_adapter: leave a PEFT adapter on: the model as it is.
    Returns:
        [B, T, V] in the model's dtype, no gradient.
    Raises:
        ValueError: the batch lacks ``input_ids``, or holds a tensor that the model does not read.
    """
    with _reference_mode(model, with_adapter):
        return model_logits(model, batch)


def adapter_changes(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    r"""Whether a PEFT adapter changes what the model says of a batch, so that its base is another model.

    .. math:: \mathrm{mean}_t \, KL(\pi_{on} \| \pi_{off}) > \epsilon

    A fresh adapter changes nothing, or no more than rounding (DoRA; in bfloat16 it rounds by more than is taken for
    nothing here). One that was trained, one that decomposes the weights (PiSSA, OLoRA), prompt tuning, and a second
    adapter on a first do.

    Args:
        model: a PEFT model, or a wrapper of one.
        batch: as :func:`reference_logits`.
    Returns:
        False without an adapter. :math:`\epsilon` is 1e-6 nats for logits in float32 and float64, 3e-3 for 16 bits,
        whose rounding alone (2^-8 of logits of about 10) moves the KL by some 1e-3.
    Cost: two forwards, one synchronisation.
    """
    if adapter_owner(model) is None:
        return False
    on, off = (reference_logits(model, batch, with_adapter=with_adapter) for with_adapter in (True, False))
    # Row by row: in float32 the logits of a whole batch are large.
    rows = [_divergence(*logits) for logits in zip(on, off, strict=True)]
    mask, divergence = batch.get("attention_mask"), torch.stack(rows)
    if mask is not None and mask.shape == divergence.shape:
        divergence = divergence[mask != 0]
    return bool(divergence.mean() > (1e-6 if on.dtype.itemsize >= 4 else 3e-3))


def reference_log_probs(model: nn.Module, batch: Mapping[str, Tensor], *, with_adapter: bool = False) -> Tensor:
    r"""Compute the answers' log-probabilities under the reference, for :func:`npo_loss` and :func:`dpo_loss`.

    .. math:: \log \pi_{ref}(y \mid x) = \sum_{t : y_t \neq -100} \log \pi_{ref}(y_t \mid x, y_{<t})

    Args:
        model: the reference, see :func:`reference_logits`.
        batch: as :func:`reference_logits`, and ``labels`` [B, T] int64.
        with_adapter: leave a PEFT adapter on: the model as it is.
    Returns:
        [B] float32 on the model's device, no gradient.
    Raises:
        ValueError: the batch lacks ``input_ids`` or ``labels``, their shapes differ, or several answers were flattened
            into one row.
        TypeError: the labels aren't int64.
    """
    check_keys(batch, "input_ids" if "inputs_embeds" not in batch else "inputs_embeds", "labels")
    check_one_answer_a_row(batch)
    with torch.no_grad():
        return sequence_log_probs(reference_logits(model, batch, with_adapter=with_adapter), batch["labels"])


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
        model: the model before its first unlearning step, or any reference. A PEFT adapter counts as it is.
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
        stored.update(zip(rows, reference_log_probs(model, batch, with_adapter=True).tolist(), strict=True))
    if not stored:
        raise ValueError("`batches` must yield at least one example, got none. Is it an exhausted iterator?")
    missing = [row for row in range(len(stored)) if row not in stored]
    if missing:
        raise ValueError(
            f"`batches` must hold every row from 0 to {max(stored)}, got none for row {missing[0]}. "
            "Pass the whole data set: no drop_last, no DistributedSampler."
        )
    return torch.tensor([stored[row] for row in range(len(stored))], dtype=torch.float32, device="cpu")


def _divergence(logits: Tensor, others: Tensor) -> Tensor:
    log_probs, other_log_probs = (F.log_softmax(upcast(x), dim=-1) for x in (logits, others))
    return (log_probs.exp() * (log_probs - other_log_probs)).sum(-1)


@contextmanager
def _reference_mode(model: nn.Module, with_adapter: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    # PEFT's disable_adapter() leaves every adapter parameter trainable, also one that was frozen before.
    flags = [(param, param.requires_grad) for param in model.parameters()]
    try:
        model.eval()
        with torch.no_grad(), nullcontext() if with_adapter else _adapter_off(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for param, requires_grad in flags:
            if param.requires_grad != requires_grad:
                param.requires_grad_(requires_grad)


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
