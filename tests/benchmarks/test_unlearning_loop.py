"""The one loop and its losses: the same batches for all, what is looked at, what is trained and what is not."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import unlearning  # noqa: F401  (puts shared_lib on the path)
from counting import Counter
from shared_lib.encoding import Example, collate, endless_batches
from shared_lib.models import logits_of
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from unlearning import loop
from unlearning.jobs import Job
from unlearning.loop import (
    Unlearning,
    look_at,
    look_quantized,
    look_steps,
    looks_on_the_line,
    mean_log_probs,
    relearn,
    rounded_to_4_bits,
)
from unlearning.losses import HINGE, Before, Losses
from unlearning.methods import parse_method
from unlearning.settings import Settings
from unlearning.tracks.task import Task

from blur_optim import losses as library

VOCABULARY = 24
SETTINGS = Settings(
    "tiny", "short", "tofu", "", "forget01", steps=4, looks=2, batch_size=2, relearned_rows=2, relearning_steps=8
)
LOSSES = ["ga+nll", "npo+kl", "simnpo+nll", "dpo+nll", "hinge+kl", "rmu+rmu"]


def make_examples(count: int, first: int) -> list[Example]:
    """Prompts and answers of one length each, so that every row has as many tokens in a mean as any other."""
    rng = torch.Generator().manual_seed(first)
    tokens = torch.randint(2, VOCABULARY, (count, 7), generator=rng).tolist()
    return [Example(row[:3], [*row[3:], 1]) for row in tokens]


def make_task() -> Task:
    forget, retain, untouched = make_examples(6, 1), make_examples(6, 2), make_examples(3, 3)
    refusals = [Example(example.prompt, [2, 3, 1]) for example in forget]
    others = retain + untouched
    return Task(
        None, others + forget, others, forget, retain, untouched, refusals, judge=lambda model, kept: ({}, None)
    )


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


TASK = make_task()


@pytest.fixture
def before() -> Before:
    return Before(make_model(), TASK)


def unlearn(
    before: Before, method: str = "npo+nll/blur", seed: int = 1, lr: float = 1e-2, **changes: Any
) -> Unlearning:
    run = Unlearning(Job("sweep", method, 0.1, lr, seed), before, TASK, replace(SETTINGS, **changes))
    run.run()
    return run


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model: torch.nn.Module, start: dict[str, Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}


# -- Batches ---------------------------------------------------------------------------------------------------------


def batches_seen(before: Before, method: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Run, and return the rows of each batch that a loss was taken on, the forget batches first in each step."""
    seen: list[list[int]] = []

    def noting(loss: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        def noted(batch: Any) -> Tensor:
            seen.append(batch["index"].tolist())
            return loss(batch)

        return noted

    make = Losses.__init__

    def init(self: Losses, *arguments: Any) -> None:
        make(self, *arguments)
        self.forget, self.retain = noting(self.forget), noting(self.retain)

    with monkeypatch.context() as patch:
        patch.setattr(Losses, "__init__", init)
        unlearn(before, method, seed)
    return seen


def test_every_method_sees_the_same_batches(before: Before, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ["npo+nll/blur", "npo+nll/weighted_sum", "ga+kl/bloop", "rmu+rmu/normalized", "ga/forget-only"]
    first, *others = [batches_seen(before, method, 1, monkeypatch) for method in methods]
    assert len(first) == 2 * SETTINGS.steps
    assert all(len(rows) == SETTINGS.batch_size for rows in first)
    assert sorted(row for rows in first[0:6:2] for row in rows) == list(
        range(6)
    )  # The first epoch has every row to forget once.
    assert all(other == first for other in others)


def test_another_seed_sees_others(before: Before, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [batches_seen(before, "npo+nll/blur", seed, monkeypatch) for seed in (0, 1, 2)]
    assert seen[0] != seen[1] != seen[2] != seen[0]
    assert all(rows[::2] != rows[1::2] for rows in seen)  # Forget and retain rows are not drawn in step.


def test_a_run_is_reproduced_to_the_last_bit(before: Before) -> None:
    first, second, other = unlearn(before), unlearn(before), unlearn(before, seed=2)
    assert first.steps == second.steps
    assert first.path == second.path
    assert changed(second.model, weights(first.model)) == set()
    assert changed(other.model, weights(first.model))
    assert first.steps != other.steps


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("combine", ["blur", "bloop"])
def test_micro_batches_make_the_step_of_one_large_batch(before: Before, losses: str, combine: str) -> None:
    # All rows have as many tokens, so the mean over four rows is the mean of the means over two.
    method = f"{losses}/{combine}"
    large = unlearn(before, method, steps=2, batch_size=4)
    small = unlearn(before, method, steps=2, batch_size=2, accumulation=2)
    assert small.path[-1]["epoch"] == large.path[-1]["epoch"]
    for ours, theirs in zip(small.steps, large.steps, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    for name, p in large.model.named_parameters():
        torch.testing.assert_close(small.model.get_parameter(name), p, rtol=1e-3, atol=1e-4)


def test_the_learning_rate_warms_up(before: Before, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noting(self: torch.optim.AdamW, closure: Any = None) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    unlearn(before, steps=20, lr=1e-3)
    assert rates == pytest.approx([5e-4] + [1e-3] * 19)


# -- Divergence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forget", "retain"])
def test_a_loss_that_is_not_finite_ends_the_run(before: Before, kind: str) -> None:
    run = Unlearning(Job("sweep", "ga+nll/blur", 0.1, 1e-3, 1), before, TASK, SETTINGS)
    loss, calls = getattr(run.losses, kind), iter((1.0, 1.0, math.nan))
    setattr(run.losses, kind, lambda batch: loss(batch) * next(calls))
    run.run()
    assert run.diverged
    assert [step["step"] for step in run.steps] == [0, 1, 2]
    assert [look["step"] for look in run.path] == [0, 2]
    assert math.isnan(run.steps[-1][f"{kind}_loss"])


def test_a_model_that_is_not_finite_at_the_end_has_diverged(before: Before) -> None:
    run = Unlearning(Job("sweep", "ga+nll/blur", 0.1, 1e-3, 1), before, TASK, SETTINGS)
    step = run.optimizer.step

    def breaking(*closures: Any) -> Any:
        losses = step(*closures)
        if len(run.steps) == SETTINGS.steps - 1:
            run.model.lm_head.weight.data.fill_(math.nan)
        return losses

    run.optimizer.step = breaking
    run.run()
    assert len(run.steps) == SETTINGS.steps
    assert run.diverged


def test_a_run_that_stays_finite_has_not_diverged(before: Before) -> None:
    assert not unlearn(before).diverged


# -- Looks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "looks", "expected"),
    [(50, 5, {10, 20, 30, 40, 50}), (7, 3, {2, 5, 7}), (4, 4, {1, 2, 3, 4}), (9, 1, {9})],
)
def test_looks_are_spread_and_the_last_is_at_the_end(steps: int, looks: int, expected: set[int]) -> None:
    assert look_steps(replace(SETTINGS, steps=steps, looks=looks)) == expected


def test_the_path_has_a_look_before_and_one_at_each_look_step(before: Before) -> None:
    run = unlearn(before, steps=6, looks=3)
    assert [look["step"] for look in run.path] == [0, 2, 4, 6]
    # 2 rows a step, of 6.
    assert [look["epoch"] for look in run.path] == pytest.approx([0, 4 / 6, 8 / 6, 2])
    assert [step["step"] for step in run.steps] == list(range(6))


def test_the_first_look_may_be_that_at_the_target(before: Before) -> None:
    seen = look_at(before.model, TASK, SETTINGS)
    run = Unlearning(Job("sweep", "npo+nll/blur", 0.1, 1e-3, 1), before, TASK, SETTINGS)
    assert run.look(0) == seen
    run.run(seen)
    assert run.path[0] is seen
    assert run.path == unlearn(before, lr=1e-3).path


def test_a_look_takes_what_the_track_watches_and_leaves_the_mode(before: Before) -> None:
    modes: list[bool] = []

    def watch(model: Any) -> dict[str, float]:
        modes.append(model.training)
        return {"verbmem": 0.25}

    model = make_model().train()
    assert look_at(model, replace(TASK, watch=watch), SETTINGS)["verbmem"] == 0.25
    assert (modes, model.training) == ([False], True)


def test_a_look_takes_evenly_spaced_rows_of_each_kind() -> None:
    model = make_model().eval()
    look = look_at(model, TASK, replace(SETTINGS, look_rows=2))
    for kind in ("forget", "retain", "untouched"):
        examples = getattr(TASK, kind)
        log_probs = mean_log_probs(model, [examples[0], examples[len(examples) // 2]])
        assert look[kind]["log_prob"] == pytest.approx(log_probs.mean().item())
        assert look[kind]["probability"] == pytest.approx(log_probs.exp().mean().item())


def test_log_prob_and_probability_by_hand() -> None:
    # Per token: 1/2 twice; 1/2 and 1/16, whose geometric mean is 1/sqrt(32). The prompt's tokens don't count.
    forget = [Example([7, 2], [3, 4]), Example([5, 2], [3, 7])]
    task = replace(TASK, forget=forget, retain=forget[:1], untouched=forget[1:])
    look = look_at(Counter(), task, SETTINGS, step=3)
    assert look["forget"]["log_prob"] == pytest.approx((math.log(1 / 2) + math.log(1 / 32) / 2) / 2)
    assert look["forget"]["probability"] == pytest.approx((1 / 2 + 32**-0.5) / 2)
    assert look["retain"] == pytest.approx({"log_prob": -math.log(2), "probability": 1 / 2})
    assert look["untouched"]["probability"] == pytest.approx(32**-0.5)
    assert (look["step"], look["epoch"]) == (3, 3 * 2 / 2)


# -- Losses ----------------------------------------------------------------------------------------------------------


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


# -- Relearning ------------------------------------------------------------------------------------------------------


def test_relearned_rows_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "RELEARNING_LR", 1e-2)
    looks = relearn(make_model(), TASK, SETTINGS, seed=0)
    assert [look["step"] for look in looks] == [0, 2, 4, 6, 8]
    shown = [look["relearned_rows"] for look in looks]
    assert shown == sorted(shown)
    assert shown[-1] > 2 * shown[0]
    assert set(looks[0]) == {"step", "relearned_rows", "other_forgotten_rows", "retain"}


@pytest.mark.parametrize("steps", [1, 3, 4, 9, 20])
def test_relearning_is_looked_at_before_and_at_its_end(steps: int) -> None:
    looks = [look["step"] for look in relearn(make_model(), TASK, replace(SETTINGS, relearning_steps=steps), seed=0)]
    assert (looks[0], looks[-1]) == (0, steps)
    assert len(looks) == min(5, steps + 1)


def test_a_look_at_relearning_is_at_the_rows_it_names() -> None:
    model = make_model().eval()
    first = relearn(model, TASK, replace(SETTINGS, relearning_steps=1), seed=0)[0]
    start = make_model().eval()
    parts = {"relearned_rows": TASK.forget[:2], "other_forgotten_rows": TASK.forget[2:], "retain": TASK.retain}
    for name, examples in parts.items():
        assert first[name] == pytest.approx(mean_log_probs(start, examples).exp().mean().item())


def test_hidden_rows_are_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Example] = []

    def noting(examples: list[Example], *arguments: Any) -> Iterator[Any]:
        trained.extend(examples)
        return endless_batches(examples, *arguments)

    monkeypatch.setattr(loop, "endless_batches", noting)
    relearn(make_model(), TASK, SETTINGS, seed=0)
    assert trained == TASK.forget[:2]


def test_relearning_trains_all_weights_also_after_rmu(before: Before) -> None:
    run = unlearn(before, "rmu+rmu/blur")
    start = weights(run.model)
    relearn(run.model, TASK, SETTINGS, seed=0)
    assert changed(run.model, start) == set(start)


# -- The straight line, and 4 bits -----------------------------------------------------------------------------------


def test_the_line_leads_from_the_end_back_to_the_target(before: Before) -> None:
    run = unlearn(before, "npo+nll/weighted_sum")
    end, start = weights(run.model), weights(before.model)
    looks = looks_on_the_line(run, run.path[0])
    assert changed(run.model, end) == set()
    shares = [look["share"] for look in looks]
    assert shares == [round(0.9 - 0.1 * i, 1) for i in range(len(looks))]
    for look in looks:
        for name, p in run.model.named_parameters():
            p.data = torch.lerp(start[name], end[name], look["share"])
        again = look_at(run.model, TASK, run.settings, run.settings.steps)
        assert {name: value for name, value in look.items() if name != "share"} == again


def test_the_line_ends_where_nothing_is_lost(before: Before) -> None:
    run = unlearn(before, lr=0.0)
    assert [look["share"] for look in looks_on_the_line(run, run.path[0])] == [0.9]


def test_rounding_leaves_seven_levels_of_either_sign_in_each_group() -> None:
    weight = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    rounded = rounded_to_4_bits(weight)
    for row, result in zip(weight, rounded, strict=True):
        for group, values in zip(row.split(32), result.split(32), strict=True):
            step = group.abs().max() / 7
            torch.testing.assert_close(values / step, (group / step).round())
            assert (values - group).abs().max() <= step / 2 * (1 + 1e-5)
    assert torch.equal(rounded_to_4_bits(torch.zeros(2, 5)), torch.zeros(2, 5))


def test_a_look_in_4_bits_leaves_the_model_as_it_is(before: Before) -> None:
    model = make_model()
    start = weights(model)
    look = look_quantized(model, TASK, SETTINGS)
    assert changed(model, start) == set()
    assert look["forget"] != look_at(model, TASK, SETTINGS)["forget"]


def test_a_run_ends_where_it_is_told_to_stop(before: Before) -> None:
    usual = unlearn(before, "ga+nll/weighted_sum", steps=8, looks=4)
    levels = [look["forget"]["log_prob"] for look in usual.path]
    stopped = Unlearning(
        Job("sweep", "ga+nll/weighted_sum", 0.1, 1e-2, 1), before, TASK, replace(SETTINGS, steps=8, looks=4)
    )
    stopped.stop_at = (levels[1] + levels[2]) / 2
    stopped.run()
    assert levels[2] < levels[1]
    assert stopped.path == usual.path[:3]
    assert len(stopped.steps) == 4
    assert not stopped.diverged


# -- Adapters --------------------------------------------------------------------------------------------------------


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
