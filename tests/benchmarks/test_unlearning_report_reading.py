"""The generated sentences say what the numbers say, and each rule can come out either way."""

from pathlib import Path
from typing import Any

import pytest
from test_unlearning_report import make_run
from test_unlearning_report_tables import BLUR, START, SUM, hand_made, kept, summary_of
from unlearning.report.compare import Paired
from unlearning.report.reading import difference, reading


def sentence(summary: Any, start: str) -> str:
    [found] = [text for text in reading(summary) if text.startswith(start)]
    return found


def test_a_method_that_forgets_more_in_every_seed_is_better(tmp_path: Path) -> None:
    assert sentence(summary_of(tmp_path, hand_made()), "**NPO + NLL: BLUR**") == (
        "**NPO + NLL: BLUR**: lower log p_forget at equal retain than the weighted sum by 0.500 [0.252, 0.748], better "
        "in 3 of 3 seeds → **better**. (keeping 99 %: better; keeping 98 %: better; keeping 90 %: better; "
        "keeping 80 %: better; hypervolume: better.)"
    )


def test_the_same_numbers_exchanged_are_worse(tmp_path: Path) -> None:
    runs = hand_made()
    for run in runs:
        run["job"]["method"] = {SUM: BLUR, BLUR: SUM}[run["job"]["method"]]
    text = sentence(summary_of(tmp_path, runs), "**NPO + NLL: BLUR**")
    assert "higher log p_forget at equal retain than the weighted sum by 0.500 [0.252, 0.748], better in 0 of 3" in text
    assert "→ **worse**" in text


def test_one_seed_has_no_verdict(tmp_path: Path) -> None:
    runs = [run for run in hand_made() if run["job"]["seed"] == 1]
    text = sentence(summary_of(tmp_path, runs, seeds=[1]), "**NPO + NLL: BLUR**")
    assert "by 0.500, better in 1 of 1 seed → **no interval from one seed**" in text
    assert "[" not in text


def counted(**counts: Any) -> Paired:
    values = {"mean": -1.0, "low": -2.0, "high": 0.5, "wins": 2, "losses": 1, "pairs": 3, "lower_wins": True}
    return Paired(**{**values, "only_ours": 0, "only_theirs": 0, "neither": 0, "not_run": 0, **counts})


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({}, "better in 2 of 3 seeds → **tie**"),
        ({"mean": 0.0}, "the same log p_forget at equal retain as the weighted sum, in 3 seeds → **tie**"),
        ({"only_theirs": 2}, "it does not keep enough, and the weighted sum does, in 2 of 5 seeds"),
        ({"only_ours": 1}, "the weighted sum does not keep enough, and it does, in 1 of 4 seeds"),
        ({"neither": 1}, "neither keeps enough in 1 of 4 seeds"),
        ({"not_run": 1}, "still to run: 1 of 4 seeds"),
        (
            {"pairs": 0, "mean": None, "low": None, "high": None},
            "no seed in which it and the weighted sum both keep enough",
        ),
    ],
)
def test_seeds_without_a_pair_are_said(counts: dict[str, Any], said: str) -> None:
    assert said in difference(counted(**counts))


def test_verdicts_are_counted_over_pairs_of_losses(tmp_path: Path) -> None:
    other = hand_made()
    for run in other:
        method = {SUM: BLUR, BLUR: SUM}[run["job"]["method"]]
        run["job"]["method"] = method.replace("npo+nll", "ga+nll")
    methods = (SUM, BLUR, "ga+nll/weighted_sum", "ga+nll/blur")
    text = sentence(summary_of(tmp_path, hand_made() + other, methods=methods), "BLUR beside the weighted sum")
    assert text.endswith("over 2 pairs of losses: better 1, tie 0, worse 1.")


def with_steps(cosine: float, last_norm: float) -> list[dict[str, Any]]:
    traces = [
        {"step": i, "cosine": cosine, "forget_norm": norm, "retain_norm": 1.0}
        for i, norm in enumerate((1.0, last_norm))
    ]
    return [{**make_run(BLUR, 1.0, s, [START, kept(-1.0, 1.0)]), "steps": traces} for s in (1, 2, 3)]


@pytest.mark.parametrize(
    ("cosine", "last_norm", "said"),
    [
        (-0.05, 0.5, ("nearly orthogonal", "opposed in 100 % of the steps", "neither saturates nor explodes")),
        (-0.5, 0.05, ("opposed on average", "‖g_f‖ saturates: at the end it is 0.05 of its first value")),
        (0.5, 20.0, ("aligned on average", "opposed in 0 % of the steps", "‖g_f‖ grows")),
    ],
)
def test_gradients_are_described_by_rule(
    tmp_path: Path, cosine: float, last_norm: float, said: tuple[str, ...]
) -> None:
    text = sentence(summary_of(tmp_path, with_steps(cosine, last_norm)), "NPO + NLL: BLUR, at the selected weight")
    assert all(words in text for words in said)
