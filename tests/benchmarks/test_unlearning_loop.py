"""The one loop: the same batches for all, when it ends, what is looked at on the way."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import unlearning  # noqa: F401  (puts shared_lib on the path)
from counting import Counter
from shared_lib.encoding import Example
from torch import Tensor
from unlearning.jobs import Job
from unlearning.loop import (
    Unlearning,
    look_at,
    look_steps,
    mean_log_probs,
)
from unlearning.losses import Before, Losses
from unlearning_toy import LOSSES, SETTINGS, TASK, changed, make_model, unlearn, weights


@pytest.fixture
def before() -> Before:
    return Before(make_model(), TASK)


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


@pytest.mark.parametrize(
    ("steps", "looks", "expected"),
    [(50, 5, {10, 20, 30, 40, 50}), (7, 3, {2, 5, 7}), (4, 4, {1, 2, 3, 4}), (9, 1, {9})],
)
def test_looks_are_spread_and_the_last_is_at_the_end(steps: int, looks: int, expected: set[int]) -> None:
    assert look_steps(replace(SETTINGS, steps=steps, looks=looks)) == expected


@pytest.mark.parametrize(
    ("warm_up", "rates"), [(0.0, [1, 1, 1, 1]), (0.5, [0.5, 1, 1, 1]), (1.0, [0.25, 0.5, 0.75, 1])]
)
def test_the_learning_rate_rises_over_its_share_of_the_steps(
    before: Before, warm_up: float, rates: list[float]
) -> None:
    settings = replace(SETTINGS, steps=4, looks=1, warm_up=warm_up)
    run = Unlearning(Job("sweep", "npo+nll/blur", 0.1, 1e-3, 1), before, TASK, settings)
    seen: list[float] = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    run.run()
    assert seen == pytest.approx([rate * 1e-3 for rate in rates])


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
