"""The losses of the benchmark are those of the library, and its runs train what they are to train."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import unlearning  # noqa: F401  (puts shared_lib on the path)
from shared_lib.encoding import collate
from shared_lib.models import logits_of
from torch import Tensor
from transformers import LlamaForCausalLM
from unlearning.jobs import Job
from unlearning.loop import (
    Unlearning,
    relearn,
)
from unlearning.losses import HINGE, Before, Losses
from unlearning.methods import parse_method
from unlearning_toy import LOSSES, SETTINGS, TASK, changed, make_model, unlearn, weights

from blur_optim import losses as library


@pytest.fixture
def before() -> Before:
    return Before(make_model(), TASK)


@pytest.fixture
def moved() -> LlamaForCausalLM:
    """A model that has left the target, so that no loss is at its zero."""
    model = make_model()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def losses_of(losses: str, model: Any, before: Before) -> Losses:
    return Losses(parse_method(f"{losses}/blur"), model, before, TASK, SETTINGS)


def by_hand(name: str, model: Any, target: Any, batch: Any, refusals: Any) -> Tensor:
    """The library's loss of this name, its inputs computed here."""

    def log_probs(model: Any, batch: Any) -> Tensor:
        return library.sequence_log_probs(logits_of(model, batch), batch["labels"])

    labels = batch["labels"]
    ours, theirs = log_probs(model, batch), log_probs(target, batch).detach()
    if name == "ga":
        return library.ga_loss(logits_of(model, batch), labels)
    if name == "npo":
        return library.npo_loss(ours, theirs, beta=0.1)
    if name == "simnpo":
        return library.simnpo_loss(ours, library.token_counts(labels), beta=2.5)
    if name == "dpo":
        return library.dpo_loss(log_probs(model, refusals), ours, log_probs(target, refusals), theirs, beta=0.1)
    if name == "margin":
        return library.logit_margin_loss(logits_of(model, batch), labels)
    if name == "hinge":
        return (HINGE + ours / 5).clamp(min=0).mean()  # Each answer has five tokens.
    if name == "nll":
        return library.nll_loss(logits_of(model, batch), labels)
    if name == "kl":
        return library.kl_loss(logits_of(model, batch), logits_of(target, batch), labels)
    raise AssertionError(name)


@pytest.mark.parametrize("losses", LOSSES[:-1])
def test_losses_are_those_of_the_library(losses: str, before: Before, moved: LlamaForCausalLM) -> None:
    ours = losses_of(losses, moved, before)
    index = [4, 1, 3]
    refusals = collate(TASK.refusals, index)
    for loss, name, rows in zip((ours.forget, ours.retain), losses.split("+"), (TASK.forget, TASK.retain), strict=True):
        batch = collate(rows, index)
        expected = by_hand(name, moved, before.model, batch, refusals)
        torch.testing.assert_close(loss(batch), expected)
        assert expected.abs() > 1e-5


def test_losses_of_rmu_are_those_of_the_library(before: Before, moved: LlamaForCausalLM) -> None:
    ours, batch = losses_of("rmu+rmu", moved, before), collate(TASK.forget, [0, 5])

    def activations(model: Any) -> Tensor:
        with library.capture_activations(model.model.layers[1]) as captured:
            logits_of(model, batch)
        return captured.output

    steering = library.steering_vector(16, 6.5, torch.Generator().manual_seed(0))
    forget = library.rmu_forget_loss(activations(moved), steering, batch["attention_mask"])
    retain = library.rmu_retain_loss(activations(moved), activations(before.model), batch["attention_mask"])
    torch.testing.assert_close(ours.forget(batch), forget)
    torch.testing.assert_close(ours.retain(batch), retain)
    assert retain > 1e-4


def test_the_hinge_lets_go_of_what_is_forgotten(before: Before) -> None:
    losses = losses_of("hinge+nll", make_model(), before)
    with torch.no_grad():
        losses.model.lm_head.weight[TASK.forget[0].answer] -= 100.0 * losses.model.lm_head.weight.sign().mean()
        losses.model.lm_head.weight *= 40.0  # Sure of itself, and wrong.
    batch = collate(TASK.forget, [0])
    per_token = library.sequence_log_probs(logits_of(losses.model, batch), batch["labels"]) / 5
    assert per_token.item() < -HINGE
    loss = losses.forget(batch)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in losses.model.parameters())


@pytest.mark.parametrize("losses", LOSSES)
def test_a_run_trains_what_its_method_trains(losses: str, before: Before) -> None:
    run, start = unlearn(before, f"{losses}/blur"), weights(before.model)
    down = {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert changed(run.model, start) == (down if losses == "rmu+rmu" else set(start))


@pytest.mark.parametrize("losses", LOSSES)
def test_a_run_leaves_no_gradients(losses: str, before: Before) -> None:
    # Those of weights that no optimizer clears would be in the first step of who trains the model next.
    assert all(p.grad is None for p in unlearn(before, f"{losses}/blur").model.parameters())


@pytest.mark.parametrize("losses", LOSSES)
def test_the_model_before_never_changes(losses: str, before: Before) -> None:
    start, log_probs = weights(before.model), before.forget.clone()
    run = unlearn(before, f"{losses}/blur")
    relearn(run.model, TASK, SETTINGS, seed=1)
    assert changed(before.model, start) == set()
    assert torch.equal(before.forget, log_probs)
    assert not before.model.training
    assert all(p.grad is None and not p.requires_grad for p in before.model.parameters())


def test_before_holds_the_log_probs_of_all_rows(before: Before) -> None:
    for examples, kept in ((TASK.forget, before.forget), (TASK.refusals, before.refusals)):
        batch = collate(examples, range(len(examples)))
        torch.testing.assert_close(
            kept.clone(), library.sequence_log_probs(logits_of(before.model, batch), batch["labels"]).detach()
        )


@pytest.mark.parametrize("losses", ["npo+nll", "dpo+kl"])
def test_unlearning_lowers_what_it_is_to_lower(losses: str, before: Before) -> None:
    path = unlearn(before, f"{losses}/blur", steps=10).path
    assert path[-1]["forget"]["log_prob"] < path[0]["forget"]["log_prob"] - 0.1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_adapters_are_trained_alone_and_merged_at_the_end(before: Before) -> None:
    pytest.importorskip("peft")
    run = Unlearning(Job("sweep", "npo+nll/blur", 0.1, 1e-2, 1), before, TASK, replace(SETTINGS, lora_rank=2))
    assert all("lora" in name for name, p in run.model.named_parameters() if p.requires_grad)
    run.run()
    start = weights(before.model)
    assert {name for name, _ in run.model.named_parameters()} == set(start)
    moved = changed(run.model, start)
    assert moved == {name for name in start if name.endswith("proj.weight")}
    difference = run.model.get_parameter(min(moved)) - start[min(moved)]
    assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= 2


def test_a_metric_that_has_seen_retain_rows_begins_where_it_was_and_goes_elsewhere(before: Before) -> None:
    start = weights(before.model)
    runs = {name: Unlearning(Job("sweep", f"npo+nll/{name}", 1.0, 1e-3, 1), before, TASK, SETTINGS) for name in WARM}
    for run in runs.values():
        run._see_retain_rows(3)
        assert changed(run.model, start) == set()
        assert [group["lr"] for group in run.optimizer.param_groups] == [1e-3]
        states = list(run.optimizer.base.state.values())
        assert all((state["step"], state["retain_ahead"]) == (0, 3) for state in states)
        assert any(state["exp_avg_sq"].any() for state in states)
        assert not any(state["exp_avg"].any() for state in states)
    warm, cold = (unlearn(before, f"npo+nll/{name}") for name in WARM)
    assert warm.steps[0]["metric_cosine"] != cold.steps[0]["metric_cosine"]
    assert warm.steps[0]["cosine"] == cold.steps[0]["cosine"]


WARM = ("metric-warm-v", "blur-metric")
EMBEDDINGS = {"model.embed_tokens.weight"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("embeddings", "lora_rank"), [("only", 0), ("frozen", 0), ("trained", 2)])
def test_embeddings_are_trained_alone_or_not_at_all_or_beside_adapters(
    embeddings: str, lora_rank: int, before: Before
) -> None:
    settings = replace(SETTINGS, lora_rank=lora_rank, embeddings=embeddings)
    start = weights(before.model)
    run = Unlearning(Job("sweep", "npo+nll/blur", 0.1, 1e-2, 1), before, TASK, settings)
    run.run()
    projections = {name for name in start if name.endswith("proj.weight")}
    expected = {"only": EMBEDDINGS, "frozen": set(start) - EMBEDDINGS, "trained": EMBEDDINGS | projections}
    assert changed(run.model, start) == expected[embeddings]
    left = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert all(p.grad is None for p in run.model.parameters() if id(p) not in left)
