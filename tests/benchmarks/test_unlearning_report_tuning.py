"""The table of what tuning tried, and the one setting for all losses."""

import math
from pathlib import Path
from typing import Any

import pytest
from test_unlearning_report import LR, make_folder, make_run, measured, write
from test_unlearning_report_tables import BLUR, START, SUM, kept, summary_of
from unlearning.report import write_report
from unlearning.report.load import load
from unlearning.report.summary import Summary, summarize
from unlearning.report.tuning import one_setting_table, tuning_table

OTHER = "ga+nll/blur"


def tuned(method: str, weight: float, end: dict[str, Any], lr: float = LR) -> dict[str, Any]:
    run = make_run(method, weight, 0, [START, end])
    run["job"] |= {"stage": "tune", "lr": lr}
    return run


def two_losses() -> list[dict[str, Any]]:
    """NPO does best at w = 1, GA at w = 0.1; GA keeps little at w = 1, NPO forgets nearly as much at w = 0.1."""
    return [
        tuned(BLUR, 1.0, kept(math.log(0.1), 1.0)),
        tuned(BLUR, 0.1, kept(math.log(0.2), 1.0)),
        tuned(BLUR, 0.3, kept(math.log(0.15), 1.0), lr=3 * LR),
        tuned(OTHER, 1.0, kept(math.log(0.1), 0.5)),
        tuned(OTHER, 0.1, kept(math.log(0.1), 1.0)),
    ]


def summary(tmp_path: Path, runs: list[dict[str, Any]]) -> Summary:
    chosen = {BLUR: {"lr": LR, "weight": 1.0}, OTHER: {"lr": LR, "weight": 0.1}}
    return summary_of(tmp_path, runs, methods=(SUM, BLUR, OTHER), selected=chosen)


def test_every_run_of_the_tuning_seed_is_shown_and_the_chosen_one_marked(tmp_path: Path) -> None:
    table = tuning_table(summary(tmp_path, [*two_losses(), make_run(BLUR, 0.7, 1, [START, kept(-9.0, 1.0)])]))
    assert table is not None
    rows = {row[:3]: row[3:] for row in table.rows}
    npo, ga = "NPO + NLL: BLUR", "GA + NLL: BLUR"
    assert set(rows) == {(npo, LR, 1.0), (npo, LR, 0.1), (npo, 3 * LR, 0.3), (ga, LR, 1.0), (ga, LR, 0.1)}
    assert rows[npo, LR, 0.1][:3] == pytest.approx([math.log(0.2)] * 3)
    assert rows[npo, LR, 0.1][3] == pytest.approx(0.8)
    assert [key for key, row in rows.items() if row[-1]] == [(npo, LR, 1.0), (ga, LR, 0.1)]
    # Half is kept at the end of this one: where 90 % is, p has fallen by a fifth of its fall from exp(-0.02).
    assert rows[ga, LR, 1.0][2] == pytest.approx(math.log(0.8 * math.exp(-0.02) + 0.2 * 0.1))


def test_one_setting_is_that_whose_worst_is_best(tmp_path: Path) -> None:
    table = one_setting_table(summary(tmp_path, two_losses()))
    assert table is not None
    # At w = 1 GA dominates 1 - exp(-0.02) in full and the rest of 0.9 half: 0.46 of 0.9. At w = 0.1 NPO has 0.8 of 0.9.
    # The third setting of NPO was not tried with GA.
    [row] = table.rows
    assert row == ("BLUR", "NPO + NLL, GA + NLL", LR, 0.1, pytest.approx(0.8 / 0.9))


def test_one_pair_of_losses_needs_no_one_setting(tmp_path: Path) -> None:
    assert one_setting_table(summary(tmp_path, two_losses()[:3])) is None


def test_losses_without_a_common_setting_have_none(tmp_path: Path) -> None:
    runs = [tuned(BLUR, 1.0, kept(-1.0, 1.0)), tuned(OTHER, 0.1, kept(-1.0, 1.0))]
    assert one_setting_table(summary(tmp_path, runs)) is None


def test_tuning_is_measured_by_its_own_target(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", two_losses(), methods=(SUM, BLUR, OTHER))
    (folder / "target.json").rename(folder / "target-1.json")
    assert tuning_table(summarize(load(folder))) is None
    # The target of tuning knew twice as much of what was to be kept, so half is kept, and nowhere enough but at first.
    write(folder / "tuning-target.json", {"final": measured(-0.02, 1.8, 1.6), "scores": {}, "training": {}})
    table = tuning_table(summarize(load(folder)))
    assert table is not None
    assert all(row[3:6] == (None, None, None) for row in table.rows)
    text = write_report(folder, tmp_path / "out").read_text(encoding="utf-8")
    assert "## What tuning tried" in text
    assert "| NPO + NLL: BLUR | 0.001 | 0.1 | - | - | - |" in text
