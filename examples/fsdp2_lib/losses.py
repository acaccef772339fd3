"""The two losses of a micro-batch, scaled so that their sums over micro-batches and means over processes are exact."""

import argparse
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from blur_optim.losses import (
    ga_loss,
    logit_margin_loss,
    nll_loss,
    npo_loss,
    run_model,
    sequence_log_probs,
    simnpo_loss,
    token_counts,
)
from blur_optim.losses.forward import router_loss

from .data import Batch, MicroBatch

Loss = Callable[[MicroBatch], Tensor]
Reference = Callable[[Batch], Tensor]  # [B]: log-probabilities of the model before it forgot


def make_losses(model: PreTrainedModel, reference: Reference | None, options: argparse.Namespace) -> tuple[Loss, Loss]:
    """Return the forget and the retain loss. Some are means over tokens, others over sequences."""

    def outputs_of(part: MicroBatch) -> Any:
        return run_model(model, {"input_ids": part.batch["input_ids"]})

    def logits_of(part: MicroBatch) -> Tensor:
        return outputs_of(part).logits

    def retain(part: MicroBatch) -> Tensor:
        output = outputs_of(part)
        loss, balancing = nll_loss(output.logits, part.batch["labels"]), router_loss(model, output)
        return part.token_share * (loss if balancing is None else loss + balancing)

    def ascent(part: MicroBatch) -> Tensor:
        return part.token_share * ga_loss(logits_of(part), part.batch["labels"])

    def margin(part: MicroBatch) -> Tensor:
        return part.token_share * logit_margin_loss(logits_of(part), part.batch["labels"])

    def npo(part: MicroBatch) -> Tensor:
        log_probs = sequence_log_probs(logits_of(part), part.batch["labels"])
        return part.example_share * npo_loss(log_probs, reference(part.batch), options.beta or 0.1)

    def simnpo(part: MicroBatch) -> Tensor:
        labels = part.batch["labels"]
        log_probs = sequence_log_probs(logits_of(part), labels)
        return part.example_share * simnpo_loss(log_probs, token_counts(labels), options.beta or 2.5)

    return {"npo": npo, "ga": ascent, "simnpo": simnpo, "margin": margin}[options.forget_loss], retain
