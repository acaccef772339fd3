"""The one loop: every method sees the same batches in the same order and takes the same number of steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from shared_lib.encoding import Batch, Example, batches_in_order, endless_batches
from shared_lib.metrics import thin_out
from shared_lib.models import Model, logits_of
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from blur_optim.losses import nll_loss, sequence_log_probs, token_counts
from blur_optim.step.metric import AHEAD

from .jobs import Job
from .losses import Before, Losses, batch_rows
from .methods import SEEN_BEFORE, make_optimizer, parse_method
from .settings import Settings
from .tracks.task import Task

KINDS = ("forget", "retain", "untouched")
RELEARNING_LR = 3e-4
GROUP = 32  # weights of a row that share a scale when they are rounded
NOTHING_LOST = 0.99  # of the probability of retain and untouched rows

Look = dict[str, Any]


class Unlearning:
    """One run: a copy of the target, and what happened to it.

    Args:
        job: method, weight, learning rate, seed.
        settings: steps and batches, the same for all.
    """

    def __init__(self, job: Job, before: Before, task: Task, settings: Settings) -> None:
        self.job, self.before, self.task, self.settings = job, before, task, settings
        self.model: Model = copy.deepcopy(before.model).train()
        if settings.lora_rank:
            self.model = with_adapters(self.model, settings.lora_rank)
        method = parse_method(job.method)
        self.losses = Losses(method, self.model, before, task, settings)
        trained = self.losses.parameters()
        for p in trained:  # No others: their gradients would pile up, as no optimizer clears them.
            p.requires_grad_(True)
        self.optimizer = make_optimizer(method, trained, job.weight, job.lr, settings.steps)
        self.stop_at: float | None = None  # log p_forget at which the run ends
        self.path: list[Look] = []
        self.steps: list[dict[str, Any]] = []
        self.diverged = False

    def run(self, first_look: Look | None = None) -> None:
        """Take all steps, looking now and then; stop where a loss is not finite. Adapters are merged at the end.

        Args:
            first_look: what a look at the target saw, which is the same for every run.
        """
        if seen := SEEN_BEFORE.get(parse_method(self.job.method).combine):
            self._see_retain_rows(seen)
        self._take_steps(first_look)
        if self.settings.lora_rank:
            self.model = self.model.merge_and_unload()

    def _take_steps(self, first_look: Look | None) -> None:
        settings = self.settings
        batches = self.batches()
        warm_up = max(1, round(settings.warm_up * settings.steps))
        schedule = LambdaLR(
            getattr(self.optimizer, "base", self.optimizer), lambda step: min(1.0, (step + 1) / warm_up)
        )
        self.path.append(first_look or self.look(0))
        for step in range(settings.steps):
            self.step(step, batches)
            schedule.step()
            if not all(math.isfinite(self.steps[-1][name]) for name in ("forget_loss", "retain_loss")):
                self.diverged = True
                return
            if (step + 1) in look_steps(settings):
                self.path.append(self.look(step + 1))
                if self.stop_at is not None and self.path[-1]["forget"]["log_prob"] <= self.stop_at:
                    break
        self.diverged = not all(math.isfinite(self.path[-1][kind]["log_prob"]) for kind in KINDS)

    def _see_retain_rows(self, count: int) -> None:
        """Let the second moments see retain gradients, in steps of length 0 whose other traces are wiped out."""
        others = 2 * self.job.seed + 1000  # No run's order of batches.
        rows = endless_batches(self.task.retain, self.settings.batch_size, others, self.model.device)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for _ in range(count):
            with self.optimizer.forget():
                pass
            with self.optimizer.retain():
                self.losses.retain(next(rows)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = self.job.lr
        for state in self.optimizer.base.state.values():
            state[AHEAD] += state["step"]
            state["step"].zero_()
            state["exp_avg"].zero_()

    def look(self, step: int) -> Look:
        """Measure probabilities of the answers on rows of every kind, and what the track watches."""
        return look_at(self.model, self.task, self.settings, step)

    def batches(self) -> Iterator[tuple[Batch, Batch]]:
        """Yield a forget and a retain batch forever, the same for every method of this seed."""
        seed, size, device = self.job.seed, self.settings.batch_size, self.model.device
        return zip(
            endless_batches(self.task.forget, size, 2 * seed, device),
            endless_batches(self.task.retain, size, 2 * seed + 1, device),
            strict=True,
        )

    def step(self, number: int, batches: Iterator[tuple[Batch, Batch]]) -> None:
        """Take one step, and note what it saw."""
        pairs = [next(batches) for _ in range(self.settings.accumulation)]
        forget = _accumulated(self.losses.forget, [pair[0] for pair in pairs])
        retain = _accumulated(self.losses.retain, [pair[1] for pair in pairs])
        forget_loss, retain_loss = self.optimizer.step(forget, retain)
        seen = self.optimizer.statistics.to_dict()
        self.steps.append({"step": number, "forget_loss": float(forget_loss), "retain_loss": float(retain_loss)})
        self.steps[-1] |= {name: value for name, value in seen.items() if not isinstance(value, list)}


def with_adapters(model: Model, rank: int) -> Model:
    """Add LoRA adapters to all linear layers (arXiv:2106.09685), with alpha twice the rank; they alone are trained."""
    from peft import LoraConfig, get_peft_model  # Here: it takes seconds to load.

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def looks_on_the_line(run: Unlearning, first: Look) -> list[Look]:
    r"""Look at :math:`\theta_0 + s(\theta_u - \theta_0)`, from the end of the run back to where it has lost nothing.

    Whatever a run did, this is the plainest way to what keeps more; so it compares directions, not strengths.

    Args:
        first: a look at the target.
    Returns:
        Looks with ``share`` s = 0.9, 0.8, ... down to the first that keeps ``NOTHING_LOST`` of the target.
    """
    start = [p.detach() for p in run.before.model.parameters()]
    end = [p.detach().clone() for p in run.model.parameters()]
    looks: list[Look] = []
    for tenths in range(9, 0, -1):
        with torch.no_grad():
            for p, a, b in zip(run.model.parameters(), start, end, strict=True):
                p.copy_(torch.lerp(a, b, tenths / 10))
        looks.append(run.look(run.settings.steps) | {"share": tenths / 10})
        if all(looks[-1][k]["probability"] >= NOTHING_LOST * first[k]["probability"] for k in ("retain", "untouched")):
            break
    with torch.no_grad():
        for p, b in zip(run.model.parameters(), end, strict=True):
            p.copy_(b)
    return looks


def look_steps(settings: Settings) -> set[int]:
    """Return after which steps a look is taken; the last is one of them."""
    return {round(settings.steps * i / settings.looks) for i in range(1, settings.looks + 1)}


def look_at(model: Model, task: Task, settings: Settings, step: int = 0) -> Look:
    """Measure probabilities of the answers on rows of every kind, and what the track watches."""
    was_training = model.training
    model.eval()
    rows = settings.batch_size * settings.accumulation * step
    look: Look = {"step": step, "epoch": rows / len(task.forget)}
    for kind in KINDS:
        look[kind] = probabilities(model, thin_out(getattr(task, kind), settings.look_rows))
    look |= task.watch(model)
    model.train(was_training)
    return look


def look_quantized(model: Model, task: Task, settings: Settings) -> Look:
    """Look at a copy of the model whose matrices are rounded to 4 bits: what was hidden can come back with that
    (arXiv:2410.16454)."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for p in rounded.parameters():
            if p.dim() == 2:
                p.copy_(rounded_to_4_bits(p))
    return look_at(rounded, task, settings)


def look_restored(model: Model, before: Model, task: Task, settings: Settings) -> Look:
    """Look at a copy of the model that has the target's token embeddings again, and the output layer where it is the
    same matrix: what was forgotten in them alone comes back."""
    restored = copy.deepcopy(model)
    with torch.no_grad():
        restored.get_input_embeddings().weight.copy_(before.get_input_embeddings().weight)
    return look_at(restored, task, settings)


def rounded_to_4_bits(weight: Tensor) -> Tensor:
    r"""Round to the nearest of 15 equally spaced levels, :math:`s\,\{-7, ..., 7\}` with :math:`s = \max|w|/7` of each
    group of 32 in a row (the last may be shorter): plain round-to-nearest, as weight-only int4 formats have it."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % GROUP)).reshape(rows, -1, GROUP)
    scale = padded.abs().amax(dim=-1, keepdim=True) / 7
    levels = (padded / torch.where(scale > 0, scale, 1.0)).round()
    return (levels * scale).reshape(rows, -1)[:, :columns]


@torch.inference_mode()
def mean_log_probs(model: Model, examples: Sequence[Example]) -> Tensor:
    """Return each answer's mean log-probability per token, ``[n]`` float32 on the CPU."""
    result = torch.empty(len(examples))
    for batch in batches_in_order(examples, batch_rows(examples), model.device):
        log_probs = sequence_log_probs(logits_of(model, batch), batch["labels"])
        result[batch["index"].cpu()] = (log_probs / token_counts(batch["labels"]).clamp(min=1)).cpu()
    return result


def probabilities(model: Model, examples: Sequence[Example]) -> dict[str, float]:
    """Return the mean over rows of the log-probability per token, and of its exponential."""
    log_probs = mean_log_probs(model, examples)
    return {"log_prob": log_probs.mean().item(), "probability": log_probs.exp().mean().item()}


def _accumulated(loss: Callable[[Batch], Tensor], batches: list[Batch]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        total = torch.zeros(())
        for batch in batches:
            part = loss(batch) / len(batches)
            part.backward()
            total = total + part.detach().cpu()
        return total

    return closure


def relearn(model: Model, task: Task, settings: Settings, seed: int) -> list[dict[str, float]]:
    """Fine-tune on a few forgotten rows, and watch the others come back (arXiv:2406.13356).

    Returns:
        A look after 0, 1/4, 1/2, 3/4 and all of the steps.
    """
    rows = settings.relearned_rows
    shown, hidden = task.forget[:rows], list(thin_out(task.forget[rows:], settings.look_rows))
    retain = list(thin_out(task.retain, settings.look_rows))
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=RELEARNING_LR)
    batches = endless_batches(shown, min(settings.batch_size, len(shown)), seed, model.device)
    looks = []
    look_after = {round(settings.relearning_steps * i / 4) for i in range(5)}
    for step in range(settings.relearning_steps + 1):
        if step in look_after:
            model.eval()
            kinds = {"relearned_rows": shown, "other_forgotten_rows": hidden, "retain": retain}
            looks.append(
                {"step": step} | {name: probabilities(model, kind)["probability"] for name, kind in kinds.items()}
            )
            model.train()
        batch = next(batches)
        nll_loss(logits_of(model, batch), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return looks
