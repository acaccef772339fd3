"""A stand-in for open-unlearning's ``trainer`` package: the interface that the handler relies on, small methods."""

import copy
import sys
import types

import torch
from transformers import Trainer

from blur_optim.losses import capture_activations, ga_loss, nll_loss, sequence_log_probs

REGISTRY = {}
NAMES = ("input_ids", "attention_mask", "labels")


def registered(cls):
    REGISTRY[cls.__name__] = cls
    return cls


def half(batch):
    return {name: batch[name] for name in NAMES}


def logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


class FinetuneTrainer(Trainer):
    """With evaluators, whose scores take the place of a data set's loss."""

    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        if not self.evaluators:
            return super().evaluate(*args, **kwargs)
        scores = {}
        for evaluator in self.evaluators.values():
            scores.update(evaluator(self.model))
        return scores


class UnlearnTrainer(FinetuneTrainer):
    pass


@registered
class GradDiff(UnlearnTrainer):
    def __init__(self, gamma=1.0, alpha=1.0, retain_loss_type="NLL", *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma, self.alpha, self.retain_loss_type = gamma, alpha, retain_loss_type
        self.retain_passes = 0

    def compute_retain_loss(self, model, retain_inputs):
        self.retain_passes += 1
        return nll_loss(logits(model, retain_inputs), retain_inputs["labels"])

    def forget(self, model, inputs):
        return ga_loss(logits(model, inputs["forget"]), inputs["forget"]["labels"])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        forget = self.forget(model, inputs)
        retain = self.compute_retain_loss(model=model, retain_inputs=half(inputs["retain"]))
        return self.gamma * forget + self.alpha * retain


@registered
class GradAscent(UnlearnTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return ga_loss(logits(model, inputs["forget"]), inputs["forget"]["labels"])


@registered
class Suppress(UnlearnTrainer):
    """Only forgets, as CE-U does."""

    def __init__(self, power=1.0, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.power = power

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.power * sequence_log_probs(logits(model, inputs["forget"]), inputs["forget"]["labels"]).mean()


@registered
class Compared(GradDiff):
    """With a reference, as NPO has."""

    def __init__(self, beta=0.1, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta, self.ref_model = beta, copy.deepcopy(self.model).eval()

    def forget(self, model, inputs):
        batch = inputs["forget"]
        with torch.no_grad():
            before = sequence_log_probs(logits(self.ref_model, batch), batch["labels"])
        ratio = sequence_log_probs(logits(model, batch), batch["labels"]) - before
        return -2 / self.beta * torch.nn.functional.logsigmoid(-self.beta * ratio).mean()


@registered
class Dual(GradDiff):
    """Weighs the retain loss by a multiplier that follows its value, as primal-dual methods do."""

    def __init__(self, limit=0.5, rate=1.0, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weights, self.limit, self.rate = [self.gamma, self.alpha], limit, rate

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        retain = self.compute_retain_loss(model=model, retain_inputs=half(inputs["retain"])) - self.limit
        parts = torch.hstack([self.forget(model, inputs), retain])
        loss = (torch.tensor(self.weights) * parts).sum()
        self.weights[1] = max(0.0, self.weights[1] + self.rate * retain.item())
        return loss


@registered
class Product(GradDiff):
    """Its loss is no weighted sum."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.forget(model, inputs) * self.compute_retain_loss(model, half(inputs["retain"]))


@registered
class Inline(GradDiff):
    """Computes the retain loss where it needs it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        retain = nll_loss(logits(model, inputs["retain"]), inputs["retain"]["labels"])
        return self.gamma * self.forget(model, inputs) + self.alpha * retain


@registered
class Mixed(GradDiff):
    """Has no handle by which to take its two losses apart."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.forget(model, inputs) + nll_loss(logits(model, inputs["retain"]), inputs["retain"]["labels"])


@registered
class OwnStep(GradDiff):
    def training_step(self, *args, **kwargs):
        raise AssertionError("never called")


@registered
class Steered(GradDiff):
    """Captures activations inside a layer and trains one matrix, as RMU does."""

    trained = "model.layers.0.mlp.down_proj.weight"

    def create_optimizer(self):
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name == self.trained)
        super().create_optimizer()
        self.model.requires_grad_(True)

    def forget(self, model, inputs):
        with capture_activations(self.model.model.layers[0].mlp) as captured:
            logits(model, inputs["forget"])
        return (captured.output - 1).square().mean()


def modules():
    """What ``import trainer`` finds in the project."""
    package, methods, base, grad_diff = (
        types.ModuleType(n) for n in ("trainer", "trainer.unlearn", "trainer.unlearn.base", "trainer.unlearn.grad_diff")
    )
    package.TRAINER_REGISTRY, base.UnlearnTrainer, grad_diff.GradDiff = dict(REGISTRY), UnlearnTrainer, GradDiff
    return {module.__name__: module for module in (package, methods, base, grad_diff)}


def install(monkeypatch):
    """Put the stand-in on the path, and return its registry."""
    found = modules()
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found["trainer"].TRAINER_REGISTRY
