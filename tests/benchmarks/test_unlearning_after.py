"""What is done with a run that has ended: relearning, the straight line back to the target, rounding to 4 bits."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import unlearning  # noqa: F401  (puts shared_lib on the path)
from shared_lib.encoding import Example, endless_batches
from unlearning import loop
from unlearning.loop import (
    look_at,
    look_quantized,
    look_restored,
    looks_on_the_line,
    mean_log_probs,
    relearn,
    rounded_to_4_bits,
)
from unlearning.losses import Before
from unlearning_toy import SETTINGS, TASK, changed, make_model, unlearn, weights


@pytest.fixture
def before() -> Before:
    return Before(make_model(), TASK)


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


def test_with_the_old_embeddings_a_model_that_changed_in_them_alone_is_as_before(before: Before) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
    start = weights(model)
    look = look_restored(model, before.model, TASK, SETTINGS)
    assert changed(model, start) == set()
    assert look == look_at(before.model, TASK, SETTINGS) != look_at(model, TASK, SETTINGS)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert look_restored(model, before.model, TASK, SETTINGS)["forget"] != look["forget"]
