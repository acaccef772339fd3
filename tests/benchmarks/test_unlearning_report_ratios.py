"""How many times less than the weighted sum and the retrained model, by run, against cases done by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_unlearning_report import make_folder, make_run, write
from test_unlearning_report_tables import BLUR, START, SUM, by_label, kept, summary_of
from unlearning.report.load import load
from unlearning.report.markdown import table_text
from unlearning.report.ratios import ratio_tables
from unlearning.report.summary import summarize

BLURS, SUMS = "NPO + NLL: BLUR", "NPO + NLL: weighted sum"


def runs_of(method: str, *ends: dict[str, Any]) -> list[dict[str, Any]]:
    return [make_run(method, 1.0, seed, [START, end]) for seed, end in enumerate(ends, start=1)]


def levels(method: str, *probabilities: float, share: float = 1.0) -> list[dict[str, Any]]:
    return runs_of(method, *(kept(math.log(p), share) for p in probabilities))


def test_quotients_are_taken_run_by_run(tmp_path: Path) -> None:
    # A tenth counts as at most a tenth. The retrained model has exp(-2) = 0.135, three times that is 0.406.
    runs = levels(SUM, 0.5, 0.8, 0.2) + levels(BLUR, 0.05, 0.04, 0.1)
    first, second = (by_label(table) for table in ratio_tables(summary_of(tmp_path, runs)))
    assert first == second  # Nothing is lost in these runs.
    _, p, over_sum, tenth, over_retrained, three = first[BLURS]
    assert (p.median, p.low, p.high) == pytest.approx((0.05, 0.04, 0.1))
    assert (over_sum.median, over_sum.low, over_sum.high) == pytest.approx((0.1, 0.05, 0.5))
    assert tenth == "2 of 3"
    assert over_retrained.high == pytest.approx(0.1 / math.exp(-2))
    assert three == "3 of 3"
    assert first[SUMS][2:4] == (None, None)  # There is nothing to compare it with
    assert first[SUMS][5] == "1 of 3"


def test_what_does_not_keep_enough_is_not_within(tmp_path: Path) -> None:
    runs = levels(SUM, 0.5, 0.5, 0.5) + runs_of(BLUR, kept(-9.0, 1.0), kept(-9.0, 0.96), kept(-9.0, 0.5))
    at_98, at_95 = (by_label(table)[BLURS] for table in ratio_tables(summary_of(tmp_path, runs)))
    assert at_95[3] == "2 of 3"
    # Seed 2 is half-way to 0.96 where it keeps 0.98; between two looks p is in a line: over 0.4, and so over a tenth.
    assert at_98[3] == "1 of 3"
    assert (at_98[1].n, at_95[1].n) == (3, 3)


def test_a_seed_that_has_not_run_is_in_no_count_and_one_that_collapsed_at_once_is(tmp_path: Path) -> None:
    runs = levels(SUM, 0.5, 0.5, 0.5) + levels(BLUR, 0.01, 0.01)
    runs[-1] = {**runs[-1], "path": [], "final": None, "diverged": True}
    row = by_label(ratio_tables(summary_of(tmp_path, runs))[0])[BLURS]
    assert (row[1].n, row[2].n, row[3], row[5]) == (1, 1, "1 of 2", "1 of 2")


def test_each_seed_is_compared_with_its_own_retrained_model(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", levels(BLUR, 0.01, 0.01), methods=(SUM, BLUR), seeds=[1, 2])
    retrained = json.loads((folder / "retrained.json").read_text())
    own = {**retrained["final"], "forget": {"log_prob": -9.0, "probability": 0.001}}
    write(folder / "retrained-2.json", retrained | {"final": own})
    table = ratio_tables(summarize(load(folder)))[0]
    row = by_label(table)[BLURS]
    assert (row[4].low, row[4].high, row[5]) == (pytest.approx(0.01 / math.exp(-2)), pytest.approx(10.0), "1 of 2")
    assert "| NPO + NLL: BLUR | 0.010 [0.010, 0.010] | - | - | 5.037 [0.074, 10.0] | 1 of 2 |" in table_text(
        table, titled=True
    )


def test_without_a_retrained_model_there_is_no_quotient(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", levels(BLUR, 0.01), methods=(SUM, BLUR), seeds=[1])
    (folder / "retrained.json").unlink()
    assert by_label(ratio_tables(summarize(load(folder)))[0])[BLURS][2:] == (None, None, None, None)
