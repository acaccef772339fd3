"""The one place where a model is run for a loss: what reaches it, and what of its output a loss is taken from.

The trained model and what it is compared with have to be run alike, or the comparison finds differences that are none.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from blur_optim.losses.text import IGNORE_INDEX

#: What a batch may hold beside the model's inputs. Labels do not reach the model: one of Hugging Face that sees them
#: computes a loss that nobody reads, on a float32 copy of the logits.
NOT_INPUTS = ("labels", "index", "reference_log_probs")

# What any model for text takes, and what transformers' attention takes from the kwargs of any model's forward.
_TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids")
_ATTENTION_INPUTS = (*(f"{n}_{s}" for n in ("cu_seq_lens", "max_length") for s in "qk"), "seq_idx")

# Kinds of transformers' models whose logits are not the next token's.
_OTHER_KINDS = ("ForMaskedLM", "ForTokenClassification", "ForSequenceClassification", "ForQuestionAnswering")


def run_model(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Call a causal model on all that a batch holds for it, without a cache.

    Everything in the batch goes to ``forward``, as in transformers' Trainer: positions, images, token types, the
    lengths of packed rows. Labels, ``index``, ``reference_log_probs`` and strings stay here.

    Args:
        model: what it returns has ``logits``.
        batch: ``input_ids`` [B, T] or ``inputs_embeds`` [B, T, H], and whatever else ``forward`` takes.
    Returns:
        What the model returns.
    Raises:
        ValueError: the batch holds a tensor that no ``forward`` in the model takes, no text at all, or the model is
            an encoder-decoder or masked model, whose logits mean something else.
    """
    inner = unwrapped(model)
    _check_kind(inner)
    inputs = model_inputs(batch)
    if "input_ids" not in inputs and "inputs_embeds" not in inputs:
        raise ValueError(f"`batch` must have the key 'input_ids' (or 'inputs_embeds'), got {sorted(batch)}.")
    _check_taken(model, inner, inputs)
    # A cache of keys is of no use here, and with one transformers 5 lets packed documents see each other.
    if "use_cache" in _named(inner):
        inputs.setdefault("use_cache", False)
    return model(**inputs)


def model_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the logits of a batch's own tokens, [B, T, V]: :func:`run_model`, less what is not in ``labels``.

    The virtual tokens of prompt tuning and p-tuning stand before the batch's own, and are cut off.

    Raises:
        ValueError: as :func:`run_model`.
    """
    return own_logits(model, batch, run_model(model, batch))


def own_logits(model: nn.Module, batch: Mapping[str, Any], output: Any) -> Tensor:
    """The logits in ``output`` of the tokens that are in the batch."""
    logits: Tensor = output.logits
    tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]
    extra = logits.shape[1] - tokens.shape[1] if logits.dim() == 3 else 0
    return logits[:, extra:] if extra > 0 and is_prompt_learning(model) else logits


def router_loss(model: nn.Module, output: Any) -> Tensor | None:
    """The load-balancing loss of a mixture of experts as its own loss has it, 0-d; None where its config asks for none.

    It is part of what a model is trained with where ``config.output_router_logits`` is on.

    Raises:
        ValueError: the model has such a loss, and its config no coefficient for it.
    """
    loss = output.get("aux_loss") if isinstance(output, Mapping) else getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        return None
    inner = unwrapped(model)
    config = getattr(inner, "config", None)
    places = (config, getattr(config, "text_config", None), inner)
    found = (getattr(place, "router_aux_loss_coef", None) for place in places)
    coefficient: float | None = next((value for value in found if value is not None), None)
    if coefficient is None:
        raise ValueError(
            "`model` must say by how much its router's loss counts, in `config.router_aux_loss_coef`, got "
            f"{type(inner).__name__} without. Set output_router_logits=False, or pass a retain loss of your own."
        )
    return coefficient * loss


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a batch holds for the model."""
    return {name: value for name, value in batch.items() if name not in NOT_INPUTS and not _is_text(value)}


def extra_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among a batch's inputs beside tokens, mask and positions: images, token types, embeddings, ..."""
    return {n: v for n, v in model_inputs(batch).items() if isinstance(v, Tensor) and n not in _TEXT_INPUTS}


def takes_positions(model: nn.Module) -> bool:
    """Whether ``forward`` takes ``position_ids`` [B, T], as they follow from the mask."""
    inner = unwrapped(model)
    of_images = "mrope_section" in str(getattr(inner, "config", ""))  # Three positions for each token.
    return "position_ids" in _named(inner) and not of_images and not is_prompt_learning(model)


def with_positions(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch with ``position_ids`` that count the tokens attended to, where it is padded on the left.

    Without them a model with learned positions takes the padding for text, and a row's log-probability depends on the
    rows beside it. A batch that has positions, or more than text, stays as it is. Cost: on a GPU's batch, one
    synchronisation.
    """
    if "position_ids" in batch or extra_inputs(batch) or not is_left_padded(batch):
        return batch
    return {**batch, "position_ids": positions_from(batch["attention_mask"])}


def positions_from(mask: Tensor) -> Tensor:
    """[B, T] int64: the number of tokens attended to before each."""
    return ((mask != 0).long().cumsum(-1) - 1).clamp(min=0)


def is_left_padded(batch: Mapping[str, Any]) -> bool:
    mask = batch.get("attention_mask")
    return isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() > 0 and bool((mask[:, 0] == 0).any())


def check_one_answer_a_row(batch: Mapping[str, Any]) -> None:
    """Refuse rows that several answers were flattened into, for a loss that is a mean over answers.

    Where ``position_ids`` begin anew within a row (padding-free collators), or ``cu_seq_lens_q`` cut it, the row holds
    several sequences that do not see each other. Their sum is not the log-probability of an answer. Text that was
    joined and cut into rows without either is one sequence, and passes.

    Raises:
        ValueError: labels are in more than one sequence of a row.
    Cost: where there are ``position_ids``, on a GPU's batch, one synchronisation.
    """
    labels, positions, lengths = (batch.get(name) for name in ("labels", "position_ids", "cu_seq_lens_q"))
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return
    flattened = isinstance(lengths, Tensor) and lengths.numel() > len(labels) + 1
    if not flattened and isinstance(positions, Tensor) and positions.dim() <= 2:
        flattened = _begins_anew(positions.expand_as(labels), labels, batch.get("attention_mask"))
    if flattened:
        raise ValueError(
            "`batch` must hold one answer in each row for NPO, SimNPO and DPO, which are means over answers, got rows "
            "that several were flattened into (`position_ids` begin anew). Use a collator that pads, or a loss that "
            "is a mean over tokens ('ga', 'margin', 'nll', 'kl')."
        )


def _begins_anew(positions: Tensor, labels: Tensor, mask: Any) -> bool:
    """Whether a row has labels in more than one run of positions. Padding does not matter: it has no labels."""
    anew = positions[:, 1:] <= positions[:, :-1]
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        anew = anew & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    number = torch.nn.functional.pad(anew.long().cumsum(1), (1, 0))
    counted = labels != IGNORE_INDEX
    last = torch.where(counted, number, -1).amax(1)
    first = torch.where(counted, number, labels.shape[1]).amin(1)
    return bool((last > first).any())


def unwrapped(model: Any) -> Any:
    """The model itself, without data parallelism, compilation and PEFT around it."""
    *_, inner = _layers_of(model)
    return inner


def adapter_owner(model: nn.Module) -> Any:
    """Return the PEFT model whose adapter can be switched off: the model, or the one in a wrapper, or None."""
    return next((layer for layer in _layers_of(model) if callable(getattr(layer, "disable_adapter", None))), None)


def is_prompt_learning(model: nn.Module) -> bool:
    """Whether PEFT puts virtual tokens before a batch's own."""
    return bool(getattr(getattr(adapter_owner(model), "active_peft_config", None), "is_prompt_learning", False))


def _layers_of(model: Any) -> Iterator[Any]:
    """The model and what it wraps, from the outside in."""
    while model is not None:
        yield model
        # Not by attribute, for some wrappers hand on what they are asked for.
        children = model._modules if isinstance(model, nn.Module) else {}
        inside = children.get("_orig_mod")
        if inside is None and None in _named(model):  # A model that has a part of that name takes arguments.
            inside = children.get("module")
        base = getattr(model, "get_base_model", None) if inside is None else None
        model = base() if callable(base) else inside


def _check_kind(inner: Any) -> None:
    config = getattr(inner, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder model, whose labels its decoder is fed with"
    elif getattr(inner, "loss_type", None) in _OTHER_KINDS:
        kind = f"one of the kind {inner.loss_type}"
    else:
        return
    raise ValueError(
        f"`model` must be a causal model, whose logits predict the next token, got {type(inner).__name__}, {kind}. "
        "Pass losses of your own for it: forget_loss=, retain_loss= (model, batch) -> loss."
    )


def _check_taken(model: nn.Module, inner: Any, inputs: Mapping[str, Any]) -> None:
    named = _named(inner)
    if None in named:  # **kwargs: of text always; of anything else if there is somebody to read it.
        others = [name for name in inputs if name not in (*_TEXT_INPUTS, *_ATTENTION_INPUTS)]
        if not others:
            return
        named = frozenset((*_TEXT_INPUTS, *_ATTENTION_INPUTS)).union(*map(_named, model.modules()))
    unread = sorted(name for name in inputs if name not in named)
    if unread:
        raise ValueError(
            f"`batch` must hold what the model's forward takes, got {unread}, which {type(inner).__name__} does not "
            "read. Leave them out in the collator, or pass losses of your own, which see the whole batch."
        )


def _named(module: Any) -> frozenset[str | None]:
    """The names of the arguments of a module's ``forward``; None among them where it takes any."""
    kind: Any = type(module)  # Not what was put on the instance, such as accelerate's autocast.
    return _arguments(kind)


@cache
def _arguments(kind: Any) -> frozenset[str | None]:
    try:
        parameters = list(inspect.signature(kind.forward).parameters.values())
    except (AttributeError, TypeError, ValueError):
        return frozenset([None])
    return frozenset(None if p.kind is p.VAR_KEYWORD else p.name for p in parameters)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value))
