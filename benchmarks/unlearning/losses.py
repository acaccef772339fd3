"""The two closures of a step: a forget loss and a retain loss on a batch of each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from shared_lib.encoding import Batch, Example, batches_in_order, collate
from shared_lib.models import Model, logits_of
from torch import Tensor, nn

from blur_optim.losses import (
    capture_activations,
    dpo_loss,
    ga_loss,
    kl_loss,
    logit_margin_loss,
    nll_loss,
    npo_loss,
    rmu_forget_loss,
    rmu_retain_loss,
    sequence_log_probs,
    simnpo_loss,
    steering_vector,
    token_counts,
)

from .methods import Method
from .settings import Settings
from .tracks.task import Task

HINGE = 4.0  # nats per token of an answer, above which the hinge loss lets go: a vocabulary of 2000 is 7.6 at random

Loss = Callable[[Batch], Tensor]


class Before:
    """The model before unlearning, and its log-probabilities of what is to be forgotten: computed once a target."""

    def __init__(self, model: Model, task: Task) -> None:
        self.model = model.eval().requires_grad_(False)
        self.forget = _log_probs_of_all(model, task.forget)
        self.refusals = _log_probs_of_all(model, task.refusals)


class Losses:
    """The losses of a method on one model.

    Args:
        model: is unlearning; ``before`` is what it was.
    """

    def __init__(self, method: Method, model: Model, before: Before, task: Task, settings: Settings) -> None:
        self.method, self.model, self.before, self.task, self.settings = method, model, before, task, settings
        self.forget: Loss = getattr(self, f"_forget_{method.forget_loss}")
        self.retain: Loss = getattr(self, f"_retain_{method.retain_loss}")
        if method.forget_loss == "rmu":
            generator = torch.Generator().manual_seed(0)
            self.steering = steering_vector(model.config.hidden_size, settings.steering, generator, device=model.device)

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained: everything, or the adapters, or for RMU the down-projections of its layers.

        With or without the token embeddings, or these alone, as ``settings.embeddings`` says; in many models the same
        matrix is the output layer.
        """
        if self.method.forget_loss == "rmu":
            return [self.model.model.layers[i].mlp.down_proj.weight for i in self.settings.layers]
        embeddings: nn.Parameter = self.model.get_input_embeddings().weight
        if self.settings.embeddings == "only":
            return [embeddings]
        trained = list(self.model.parameters())
        if self.settings.lora_rank:
            trained = [p for p in trained if p.requires_grad]
        others = [p for p in trained if p is not embeddings]
        if self.settings.embeddings == "frozen":
            return others
        return [embeddings, *others] if self.settings.embeddings == "trained" else trained

    def _forget_ga(self, batch: Batch) -> Tensor:
        return ga_loss(logits_of(self.model, batch), batch["labels"])

    def _forget_npo(self, batch: Batch) -> Tensor:
        reference = self.before.forget[batch["index"]]
        return npo_loss(self._log_probs(batch), reference, beta=self.settings.beta)

    def _forget_simnpo(self, batch: Batch) -> Tensor:
        return simnpo_loss(self._log_probs(batch), token_counts(batch["labels"]), beta=self.settings.simnpo_beta)

    def _forget_dpo(self, batch: Batch) -> Tensor:
        index = batch["index"]
        refusals = collate(self.task.refusals, index.tolist(), self.model.device)
        return dpo_loss(
            self._log_probs(refusals),
            self._log_probs(batch),
            self.before.refusals[index],
            self.before.forget[index],
            beta=self.settings.beta,
        )

    def _forget_hinge(self, batch: Batch) -> Tensor:
        per_token = self._log_probs(batch) / token_counts(batch["labels"])
        return torch.relu(HINGE + per_token).mean()

    def _forget_margin(self, batch: Batch) -> Tensor:
        return logit_margin_loss(logits_of(self.model, batch), batch["labels"])

    def _forget_rmu(self, batch: Batch) -> Tensor:
        return rmu_forget_loss(self._activations(self.model, batch), self.steering, batch["attention_mask"])

    def _retain_nll(self, batch: Batch) -> Tensor:
        return nll_loss(logits_of(self.model, batch), batch["labels"])

    def _retain_kl(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            reference = logits_of(self.before.model, batch)
        return kl_loss(logits_of(self.model, batch), reference, batch["labels"])

    def _retain_rmu(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            frozen = self._activations(self.before.model, batch)
        return rmu_retain_loss(self._activations(self.model, batch), frozen, batch["attention_mask"])

    def _log_probs(self, batch: Batch) -> Tensor:
        return sequence_log_probs(logits_of(self.model, batch), batch["labels"])

    def _activations(self, model: Model, batch: Batch) -> Tensor:
        with capture_activations(model.model.layers[self.settings.layers[-1]]) as captured:
            model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        return captured.output


def batch_rows(examples: list[Example]) -> int:
    """Return how many rows are measured at a time: 16, or fewer where they are long.

    120 rows of TOFU, one thread of an AMD EPYC, 0.8M parameters: 0.38 CPU-seconds with 16, 0.42 with 32, 0.64 with 64.
    """
    longest = max((len(example.prompt) + len(example.answer) for example in examples), default=1)
    return max(1, min(16, 16384 // longest))


@torch.inference_mode()
def _log_probs_of_all(model: Model, examples: list[Example]) -> Tensor:
    result = torch.zeros(len(examples), device=model.device)
    for batch in batches_in_order(examples, batch_rows(examples), model.device):
        result[batch["index"]] = sequence_log_probs(logits_of(model, batch), batch["labels"])
    return result.clone()
