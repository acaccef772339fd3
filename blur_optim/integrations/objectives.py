"""Losses by name, as functions of a model and a batch, and the references that some of them need."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from blur_optim.integrations.pairs import ANSWERS, REFERENCE_KEY
from blur_optim.losses import (
    capture_activations,
    dpo_loss,
    ga_loss,
    kl_loss,
    logit_margin_loss,
    nll_loss,
    npo_loss,
    reference_log_probs,
    reference_logits,
    rmu_forget_loss,
    rmu_retain_loss,
    run_model,
    sequence_log_probs,
    simnpo_loss,
    steering_vector,
    token_counts,
)
from blur_optim.losses.checks import check_positive
from blur_optim.losses.forward import (
    adapter_owner,
    check_one_answer_a_row,
    model_inputs,
    own_logits,
    positions_from,
    router_loss,
)
from blur_optim.losses.forward import model_logits as logits_of

#: ``(model, batch) -> loss``: the model as the loop has wrapped it, one half's batch on its device, a 0-d tensor.
Loss = Callable[[Any, Any], Tensor]

FORGET_LOSSES = ("ga", "npo", "simnpo", "dpo", "idk", "margin")
#: Which of them have an inverse temperature, beta.
TEMPERED_LOSSES = ("npo", "simnpo", "dpo", "idk")
RETAIN_LOSSES = ("nll", "kl")
_COMPARE_ANSWERS = ("npo", "dpo", "idk")


class Reference:
    """What a loss compares with: stored log-probabilities, a frozen model, or the trained one with its adapter off.

    Args:
        model: a frozen model, with its own adapter where it has one; None for the trained model itself with its PEFT
            adapter off.
        context: entered around a frozen model's forward, such as the autocast of the trained one.
    """

    def __init__(
        self, model: nn.Module | None = None, context: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        self.model, self.context = model, context

    def log_probs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """[B] float32; those that the batch carries, where it does."""
        if REFERENCE_KEY in batch:
            return batch[REFERENCE_KEY]
        with self.context():
            return reference_log_probs(self._which(model), batch, with_adapter=self.model is not None)

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """[B, T, V]."""
        with self.context():
            return reference_logits(self._which(model), batch, with_adapter=self.model is not None)

    def _which(self, model: nn.Module) -> nn.Module:
        if self.model is not None:
            return self.model
        if adapter_owner(model) is None:
            raise ValueError(
                "`reference` must be a frozen model where the trained one has no PEFT adapter to switch off, got none. "
                "Pass reference=copy.deepcopy(model) before training."
            )
        return model


def compares_answers(loss: str | Loss) -> bool:
    """Whether a loss wants the reference's log-probabilities of whole answers, which can be stored."""
    return loss in _COMPARE_ANSWERS


def make_forget_loss(loss: str | Loss, reference: Reference, *, beta: float | None = None, delta: float = 0.0) -> Loss:
    """Return a forget loss.

    Args:
        loss: ``"ga"``, ``"npo"``, ``"simnpo"``, ``"dpo"`` (or ``"idk"``, the same), ``"margin"`` (of the logits), or a
            function, returned as it is.
        reference: for NPO and DPO.
        beta: inverse temperature, > 0; None for the default of :mod:`blur_optim.losses`, and for what has none.
        delta: SimNPO's reward margin; 0 for other losses.
    Raises:
        ValueError: there is no loss of that name; ``beta`` is not positive, or given to a loss that has none; ``delta``
            is given to another loss than SimNPO.
    """
    if beta is not None:
        check_positive("beta", beta)
    if callable(loss):
        return loss
    if loss in FORGET_LOSSES and beta is not None and loss not in TEMPERED_LOSSES:
        raise ValueError(
            f"`beta` must be None with forget_loss={loss!r}, which has none, got {beta!r}. It is for "
            f"{', '.join(TEMPERED_LOSSES)}."
        )
    if loss in FORGET_LOSSES and delta and loss != "simnpo":
        raise ValueError(
            f"`simnpo_delta` must be 0 with forget_loss={loss!r}, got {delta!r}. It is SimNPO's reward margin."
        )
    options: dict[str, Any] = {} if beta is None else {"beta": beta}
    made: dict[str, Loss] = {
        "ga": lambda model, batch: ga_loss(logits_of(model, batch), batch["labels"]),
        "npo": lambda model, batch: npo_loss(
            reference_log_probs=reference.log_probs(model, batch), log_probs=_log_probs(model, batch), **options
        ),
        "simnpo": lambda model, batch: simnpo_loss(
            _log_probs(model, batch), token_counts(batch["labels"]), delta=delta, **options
        ),
        "dpo": lambda model, batch: _dpo(model, batch, reference, options),
        "margin": lambda model, batch: logit_margin_loss(logits_of(model, batch), batch["labels"]),
    }
    made["idk"] = made["dpo"]
    return _pick("forget_loss", loss, made)


def make_retain_loss(loss: str | Loss, reference: Reference) -> Loss:
    """Return a retain loss: ``"nll"``, ``"kl"``, or a function, returned as it is.

    Both add the load-balancing loss of a router, where the model's config asks for it: the retain loss is what keeps
    the model in order. The forget losses do without.

    Raises:
        ValueError: there is no loss of that name.
    """
    if callable(loss):
        return loss
    made: dict[str, Loss] = {
        "nll": _nll,
        "kl": lambda model, batch: _kl(model, batch, reference),
    }
    return _pick("retain_loss", loss, made)


def make_rmu_losses(
    model: nn.Module, frozen: nn.Module, layer: str, *, coefficient: float = 6.5, seed: int = 0
) -> tuple[Loss, Loss]:
    r"""Return RMU's two losses on the activations of one layer (arXiv:2403.03218).

    Args:
        model: the model that is trained, before anything wraps it.
        frozen: the model as it was.
        layer: a regular expression that fits the whole name of exactly one module, ``r"model\.layers\.7"``.
        coefficient: norm of the steering vector.
        seed: of its direction.
    Returns:
        The forget loss and the retain loss. Tokens with a label other than -100 take part, all where there are none.
    Raises:
        ValueError: none or several modules fit ``layer``.
    """
    trained_layer, frozen_layer = find_module(model, layer), find_module(frozen, layer)
    generator = torch.Generator().manual_seed(seed)
    directions: dict[int, Tensor] = {}

    def forget(model: Any, batch: Any) -> Tensor:
        with capture_activations(trained_layer) as captured:
            logits_of(model, batch)
        size = captured.output.shape[-1]
        if size not in directions:  # The width of a layer's output is known once it has run.
            directions[size] = steering_vector(size, coefficient, generator, device=captured.output.device)
        return rmu_forget_loss(captured.output, directions[size], _mask(batch))

    def retain(model: Any, batch: Any) -> Tensor:
        with torch.no_grad(), capture_activations(frozen_layer) as target:
            logits_of(frozen, batch)
        with capture_activations(trained_layer) as captured:
            logits_of(model, batch)
        return rmu_retain_loss(captured.output, target.output, _mask(batch))

    return forget, retain


def find_module(model: nn.Module, pattern: str) -> nn.Module:
    """The one module whose whole name fits ``pattern``.

    Raises:
        ValueError: none or several do.
    """
    # torch.compile puts the model one name deeper.
    names = ((name.replace("_orig_mod.", ""), module) for name, module in model.named_modules())
    found: dict[str, nn.Module] = {name: module for name, module in names if re.fullmatch(pattern, name)}
    if len(found) != 1:
        raise ValueError(f"The pattern {pattern!r} must fit the name of one module, got {sorted(found) or 'none'}.")
    (module,) = found.values()
    return module


def _nll(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    output = run_model(model, batch)
    return _balanced(nll_loss(own_logits(model, batch, output), batch["labels"]), model, output)


def _kl(model: Any, batch: Mapping[str, Tensor], reference: Reference) -> Tensor:
    expected = reference.logits(model, batch)
    output = run_model(model, batch)
    return _balanced(kl_loss(own_logits(model, batch, output), expected, batch["labels"]), model, output)


def _balanced(loss: Tensor, model: Any, output: Any) -> Tensor:
    balancing = router_loss(model, output)
    return loss if balancing is None else loss + balancing.mean().to(loss.device)  # A mean, of several GPUs' in one.


def _log_probs(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    check_one_answer_a_row(batch)
    return sequence_log_probs(logits_of(model, batch), batch["labels"])


def _dpo(model: Any, batch: Any, reference: Reference, options: dict[str, Any]) -> Tensor:
    missing = [name for name in ANSWERS if name not in batch]
    if missing:
        raise ValueError(
            f"A forget batch for DPO must have the keys {list(ANSWERS)}, got {sorted(batch)}. Let each row of the "
            'forget data set be {"chosen": {input_ids, labels, ...}, "rejected": {...}}: what to answer instead, and '
            "what to forget."
        )
    chosen, rejected = (batch[name] for name in ANSWERS)
    expected = reference.log_probs(model, chosen), reference.log_probs(model, rejected)
    # One forward for both: what wraps the model expects a backward after each.
    both = _log_probs(model, _joined(chosen, rejected))
    return dpo_loss(both[: len(expected[0])], both[len(expected[0]) :], expected[0], expected[1], **options)


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both batches as one, the narrower padded on the right with what is neither attended to nor counted."""
    parts = [{**model_inputs(batch), "labels": batch["labels"]} for batch in (first, second)]
    names = {name: None for part in parts for name in part}
    _fill_in(parts, names)
    width = max(part["labels"].shape[1] for part in parts)
    joined = {}
    for name in names:
        values = [part.get(name) for part in parts]
        if not all(isinstance(value, Tensor) for value in values):
            raise ValueError(
                f"`chosen` and `rejected` must have the same keys, all of them tensors, got {name!r} as "
                f"{[type(value).__name__ for value in values]}. Collate both alike."
            )
        joined[name] = torch.cat([_widened(name, part, width) for part in parts])
    return joined


def _fill_in(parts: list[dict[str, Any]], names: Mapping[str, Any]) -> None:
    """Give both what one of them may do without: a mask of all, positions that count."""
    for part in parts:
        if "attention_mask" in names and "attention_mask" not in part:
            part["attention_mask"] = torch.ones_like(part["labels"])
        if "position_ids" in names and "position_ids" not in part:
            part["position_ids"] = positions_from(part.get("attention_mask", torch.ones_like(part["labels"])))


def _widened(name: str, part: Mapping[str, Tensor], width: int) -> Tensor:
    value, (rows, columns) = part[name], part["labels"].shape
    if name == "position_ids" and value.dim() == 1:
        value = value.expand(rows, columns)
    if value.shape[:2] != (rows, columns):  # Not by token, such as images: in the order of the rows.
        return value
    fill = -100 if name == "labels" else 0
    return nn.functional.pad(value, (0, 0) * (value.dim() - 2) + (0, width - columns), value=fill)


def _mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    return batch["labels"] != -100 if "labels" in batch else batch.get("attention_mask")


def _pick(argument: str, name: str, made: Mapping[str, Loss]) -> Loss:
    if name not in made:
        raise ValueError(
            f"`{argument}` must be one of {sorted(made)} or a function (model, batch) -> loss, got {name!r}."
        )
    return made[name]
