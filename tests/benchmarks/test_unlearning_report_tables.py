"""Tables against values computed by hand, whole and partial."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_unlearning_report import LR, diverged, make_folder, make_run, measured, write
from unlearning.report import numbers, tables
from unlearning.report.compare import Paired, spread
from unlearning.report.load import load
from unlearning.report.markdown import table_text
from unlearning.report.records import record
from unlearning.report.summary import Summary, summarize
from unlearning.report.table import Table

SUM, BLUR = "npo+nll/weighted_sum", "npo+nll/blur"
START = measured(-0.02, 0.9, 0.8)
T = 4.302653 / math.sqrt(3)  # half the t interval of three values, in standard deviations


def kept(log_prob: float, share: float, untouched: float = 1.0) -> dict[str, Any]:
    """Return a point that keeps a share of the target's probabilities, 0.9 and 0.8."""
    return measured(log_prob, 0.9 * share, 0.8 * untouched)


def hand_made() -> list[dict[str, Any]]:
    """At 95 %, log p_forget is -1.0, -1.1, -0.9 for the weighted sum and -1.5, -1.7, -1.3 for BLUR; differences by seed
    are -0.5, -0.6, -0.4. The ends at w = 1 keep 92 %; those at w = 0.1 keep all and forget little."""
    runs = []
    for method, levels in ((SUM, (-1.0, -1.1, -0.9)), (BLUR, (-1.5, -1.7, -1.3))):
        for seed, level in enumerate(levels, start=1):
            runs.append(make_run(method, 1.0, seed, [START, kept(level, 0.95), kept(3 * level, 0.92)]))
            runs.append(make_run(method, 0.1, seed, [START, kept(-0.1, 0.995)]))
    return runs


def summary_of(folder: Path, runs: list[dict[str, Any]], **settings: Any) -> Summary:
    return summarize(load(make_folder(folder / "in", runs, **{"methods": (SUM, BLUR), **settings})))


def by_label(table: tables.Table) -> dict[str, tuple[Any, ...]]:
    return {row[0]: row for row in table.rows}


def test_log_prob_at_equal_retain_and_its_paired_difference(tmp_path: Path) -> None:
    at = {table.key: by_label(table) for table in tables.equal_retain_tables(summary_of(tmp_path, hand_made()))}
    _, level, enough, retrained, found, *_ = at["equal-retain-0.95"]["NPO + NLL: BLUR"]
    assert (level.mean, level.sd, level.n) == pytest.approx((-1.5, 0.2, 3))
    assert (enough, retrained) == ("3 of 3", "0 of 3")
    assert (found.mean, found.low, found.high) == pytest.approx((-0.5, -0.5 - 0.1 * T, -0.5 + 0.1 * T), abs=1e-6)
    assert (found.wins, found.pairs, found.verdict) == (3, 3, "better")
    baseline = at["equal-retain-0.95"]["NPO + NLL: weighted sum"]
    assert baseline[1].mean == pytest.approx(-1.0)
    assert baseline[4] is None
    _, level, _, retrained, found, *_ = at["equal-retain-0.9"]["NPO + NLL: BLUR"]
    assert (level.mean, retrained) == (pytest.approx(-4.5), "3 of 3")
    assert found.mean == pytest.approx(-1.5)
    _, level, _, _, found, *_ = at["equal-retain-0.99"]["NPO + NLL: BLUR"]
    # A fifth of the way from the start to the first look, p has fallen from exp(-0.02) by a fifth of what it falls.
    there = [math.log(0.8 * math.exp(-0.02) + 0.2 * math.exp(look)) for look in (-1.5, -1.7, -1.3)]
    assert (level.mean, found.verdict) == (pytest.approx(sum(there) / 3), "better")


def test_what_is_untouched_must_be_kept_too(tmp_path: Path) -> None:
    runs = [make_run(BLUR, 1.0, 1, [START, kept(-5.0, 1.0, 0.94), kept(-1.0, 0.95, 0.97)])]
    [method] = [m for m in summary_of(tmp_path, runs).methods if m.method.id == BLUR]
    # On the way from the start to the first look, which keeps 0.94, p falls from exp(-0.02) to exp(-5).
    between = {
        tau: math.log(math.exp(-0.02) + (1 - tau) / 0.06 * (math.exp(-5) - math.exp(-0.02)))
        for tau in (0.99, 0.98, 0.95)
    }
    lowest = {tau: level for tau, (level,) in ((tau, found.values()) for tau, found in method.at_tau.items())}
    assert lowest == pytest.approx(between | {0.9: -5.0, 0.8: -5.0})


def test_the_straight_line_is_compared_where_runs_looked_there(tmp_path: Path) -> None:
    runs = hand_made()
    assert tables.line_tables(summary_of(tmp_path / "none", runs)) == ()
    for run in runs:
        if run["job"]["weight"] == 1.0:
            # Halfway 0.97 is kept; from there on to the end at 0.92, p falls in a straight line.
            run["line"] = [
                {"step": 20, "epoch": 1.0, "share": 0.5, **kept(-0.5 if run["job"]["method"] == SUM else -2.0, 0.97)}
            ]
    at = {table.key: by_label(table) for table in tables.line_tables(summary_of(tmp_path / "line", runs))}
    ours, theirs = (at["line-0.95"][f"NPO + NLL: {name}"] for name in ("BLUR", "weighted sum"))
    end = {1: -4.5, 2: -5.1, 3: -3.9}
    expected = [math.log(0.6 * math.exp(-2.0) + 0.4 * math.exp(level)) for level in end.values()]
    assert ours[1].mean == pytest.approx(sum(expected) / 3)
    assert ours[1].mean < -2.0 < theirs[1].mean
    assert ours[4].wins == 3
    lost = next(i for i, run in enumerate(runs) if "line" in run and run["job"]["method"] != SUM)
    runs[lost] = {name: value for name, value in diverged(runs[lost]).items() if name != "line"}
    without = by_label(tables.line_tables(summary_of(tmp_path / "lost", runs))[0])["NPO + NLL: BLUR"][4]
    assert (without.pairs, without.only_theirs, without.not_run) == (2, 1, 0)


def test_a_run_would_have_stopped_at_the_level_of_rows_never_seen(tmp_path: Path) -> None:
    selected = {name: {"lr": LR, "weight": 1.0} for name in (SUM, BLUR)}
    folder = make_folder(tmp_path / "in", hand_made(), methods=(SUM, BLUR), selected=selected)
    assert tables.stopping_table(summarize(load(folder))) is None
    target = json.loads((folder / "target.json").read_text())
    write(folder / "target.json", target | {"unseen": {"log_prob": -1.35, "probability": 0.26}})
    rows = by_label(tables.stopping_table(summarize(load(folder))))
    # BLUR's looks are at -1.5, -1.7, -1.3, which is not enough, and then at three times that.
    _, reached, step, kept_there, kept_at_end, at_end = rows["NPO + NLL: BLUR"]
    assert (reached, step.mean, at_end.mean) == ("3 of 3", pytest.approx((10 + 10 + 20) / 3), pytest.approx(-4.5))
    assert kept_there.mean == pytest.approx((0.95 + 0.95 + 0.92) / 3)
    assert kept_at_end.mean == pytest.approx(0.92)


@pytest.mark.parametrize(
    ("name", "table"), [("quantized", tables.quantized_table), ("restored", tables.restored_table)]
)
def test_probabilities_in_4_bits_and_with_old_embeddings_stand_beside_those_before(
    name: str, table: Callable[[Summary], Table | None], tmp_path: Path
) -> None:
    selected = {name: {"lr": LR, "weight": 1.0} for name in (SUM, BLUR)}
    runs = hand_made()
    assert table(summary_of(tmp_path / "none", runs, selected=selected)) is None
    for run in runs:
        if run["job"]["method"] == BLUR:
            run[name] = kept(-1.0, 0.5)
    rows = by_label(table(summary_of(tmp_path / "some", runs, selected=selected)))
    assert list(rows) == ["NPO + NLL: BLUR"]
    means = [cell.mean for cell in rows["NPO + NLL: BLUR"][1:]]
    before = sum(math.exp(level) for level in (-4.5, -5.1, -3.9)) / 3
    assert means == pytest.approx([before, math.exp(-1), 0.9 * 0.92, 0.45, 0.8, 0.8])


def test_hypervolumes(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, hand_made())
    steps = [(1.0, -0.02), (0.995, -0.1), (0.95, -1.5), (0.92, -4.5)]  # BLUR's first seed, from most kept
    heights = [0.0] + [1 - math.exp(level) for _, level in steps]
    area = sum(share * (heights[i + 1] - heights[i]) for i, (share, _) in enumerate(steps))
    assert summary.by_id[BLUR].hypervolumes[1] == pytest.approx(area)
    rows = by_label(tables.hypervolume_table(summary))
    assert rows["NPO + NLL: BLUR"][1].mean == pytest.approx(sum(summary.by_id[BLUR].hypervolumes.values()) / 3)
    found = rows["NPO + NLL: BLUR"][2]
    assert found.mean > 0
    assert (found.wins, found.lower_wins) == (3, False)


def test_the_main_table_is_of_the_selected_runs_alone(tmp_path: Path) -> None:
    selected = {SUM: {"lr": LR, "weight": 1.0}, BLUR: {"lr": LR, "weight": 0.1}}
    tuning = make_run(BLUR, 0.1, 0, [START, kept(-7.0, 0.1)])
    tuning["job"]["stage"] = "tune"
    rows = by_label(tables.main_table(summary_of(tmp_path, [*hand_made(), tuning], selected=selected)))
    label, lr, weight, seeds, lost, log_prob, forget, retain, untouched = rows["NPO + NLL: weighted sum"]
    assert (label, lr, weight, seeds, lost) == ("NPO + NLL: weighted sum", LR, 1.0, 3, 0)
    assert (log_prob.mean, log_prob.sd) == pytest.approx((-3.0, 0.3))
    assert forget.mean == pytest.approx((math.exp(-3) + math.exp(-3.3) + math.exp(-2.7)) / 3)
    assert (retain.mean, untouched.mean) == pytest.approx((0.9 * 0.92, 0.8))
    assert rows["NPO + NLL: BLUR"][5].mean == pytest.approx(-0.1)
    assert [row[:5] for row in (rows["target"], rows["retrained"])] == [
        (n, *[None] * 4) for n in ("target", "retrained")
    ]
    assert rows["retrained"][5].mean == -2.0


def test_a_diverged_run_is_counted_and_what_it_reached_before_still_compared(tmp_path: Path) -> None:
    runs = hand_made()
    runs[6] = diverged({**runs[6], "path": [*runs[6]["path"], {"step": 30, "epoch": 1.5}]})  # BLUR, seed 1, w = 1
    summary = summary_of(tmp_path, runs)
    row = by_label(tables.main_table(summary))["NPO + NLL: BLUR"]
    assert (row[3], row[4]) == (2, 1)
    assert row[5].mean == pytest.approx((-5.1 - 3.9) / 2)
    assert by_label(tables.equal_retain_tables(summary)[1])["NPO + NLL: BLUR"][1].n == 3
    weights = by_weight(tables.weight_tables(summary)[0])
    assert (weights["BLUR", 1.0][3], weights["BLUR", 1.0][4]) == (2, 1)


def by_weight(table: tables.Table) -> dict[tuple[str, float], tuple[Any, ...]]:
    return {(row[0], row[1]): row for row in table.rows}


def test_a_run_that_diverged_at_once_has_no_level_and_is_not_missing(tmp_path: Path) -> None:
    runs = [make_run(m, 1.0, 1, [START, kept(-1.0, 1.0)]) for m in (SUM, BLUR)]
    runs[1] = {**runs[1], "path": [], "final": None, "diverged": True}
    summary = summary_of(tmp_path, runs, seeds=[1], weights=[1.0])
    found = summary.at_equal_retain(summary.by_id[BLUR], 0.95)
    assert found is not None
    assert (found.only_theirs, found.not_run, found.verdict) == (1, 0, "no pair")
    assert summary.by_id[BLUR].missing == ()


def test_every_weight_has_its_row(tmp_path: Path) -> None:
    [table] = tables.weight_tables(summary_of(tmp_path, hand_made()))
    rows = by_weight(table)
    assert list(rows) == [("weighted sum", 1.0), ("weighted sum", 0.1), ("BLUR", 1.0), ("BLUR", 0.1)]
    assert rows["weighted sum", 0.1][2] == pytest.approx(10)
    assert rows["BLUR", 0.1][2] is None  # lambda is the weighted sum's
    assert rows["BLUR", 1.0][5].mean == pytest.approx(-4.5)
    assert table.folded


def test_missing_runs_are_not_run_for_the_pair(tmp_path: Path) -> None:
    runs = [run for run in hand_made() if (run["job"]["method"], run["job"]["seed"]) != (BLUR, 3)]
    summary = summary_of(tmp_path, runs)
    found = summary.at_equal_retain(summary.by_id[BLUR], 0.95)
    assert found is not None
    assert (found.pairs, found.not_run, found.mean) == (2, 1, pytest.approx(-0.55))
    assert summary.by_id[BLUR].missing == ((1.0, 3), (0.1, 3))


def test_weights_of_a_method_are_those_that_the_settings_name(tmp_path: Path) -> None:
    own = {BLUR: [1.0, 0.1, 0.05], SUM: [1.0, 0.1]}
    summary = summary_of(tmp_path, hand_made(), weights=[10.0, 1.0], sweep_weights=own)
    assert summary.by_id[BLUR].missing == ((0.05, 1), (0.05, 2), (0.05, 3))
    assert summary.by_id[SUM].missing == ()


def test_weights_off_the_grid_are_expected_of_every_seed(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, [r for r in hand_made() if r["job"]["seed"] == 1], weights=[10.0, 1.0])
    assert summary.by_id[BLUR].missing == ((1.0, 2), (1.0, 3), (0.1, 2), (0.1, 3))


def test_runs_of_other_methods_and_seeds_are_left_out_and_counted(tmp_path: Path) -> None:
    stray = [make_run("npo+nll/bloop", 1.0, 1, [START, START]), make_run(BLUR, 1.0, 9, [START, kept(-50.0, 1.0)])]
    summary = summary_of(tmp_path, hand_made() + stray)
    assert summary.left_out == 2
    assert set(summary.by_id[BLUR].at_tau[0.95]) == {1, 2, 3}


def test_of_two_files_of_one_job_the_one_with_scores_counts(tmp_path: Path) -> None:
    plain = make_run(BLUR, 1.0, 1, [START, kept(-1.0, 1.0)])
    scored = {**plain, "scores": {"model_utility": 0.5}}
    for i, runs in enumerate(([plain, scored], [scored, plain])):
        [run] = summary_of(tmp_path / str(i), runs).by_id[BLUR].runs
        assert run.scores is not None


def scored(method: str, seed: int, **scores: float | None) -> dict[str, Any]:
    return {**make_run(method, 1.0, seed, [START, START]), "scores": scores}


def test_scores_have_every_name_that_occurs_and_gaps_where_one_is_missing(tmp_path: Path) -> None:
    runs = [scored(BLUR, 1, forget_quality=1e-6, only_here=1.0), scored(BLUR, 2, forget_quality=1e-2, only_here=None)]
    runs.append(make_run(SUM, 1.0, 1, [START, START]))
    [table] = tables.score_tables(summary_of(tmp_path, runs))
    names = [column.name for column in table.columns]
    assert names == ["method", "forget quality", "model utility", "forget ROUGE-L", "PrivLeak", "only here"]
    rows = by_label(table)
    assert (rows["NPO + NLL: BLUR"][5].n, rows["NPO + NLL: BLUR"][2]) == (1, None)
    assert rows["NPO + NLL: weighted sum"][1:] == (None,) * 5
    assert rows["target"][4].mean == -80.0
    text = table_text(table, titled=True)
    assert "| NPO + NLL: BLUR | 0.005 [1e-06, 0.010] | - | - | - | 1.000 |" in text
    assert "| target | 1e-20 | 0.700 | 0.950 | -80.0 | - |" in text


def test_many_scores_are_broken_into_tables(tmp_path: Path) -> None:
    names = {f"score_{i}": float(i) for i in range(10)}
    found = tables.score_tables(summary_of(tmp_path, [scored(BLUR, 1, **names)]))
    assert [len(table.columns) - 1 for table in found] == [7, 7]
    assert by_label(found[1])["NPO + NLL: BLUR"][-1].mean == 9.0


def test_relearning_is_read_at_the_last_step_that_all_have(tmp_path: Path) -> None:
    def curve(*values: float) -> list[dict[str, float]]:
        return [
            {"step": 5 * i, "relearned_rows": v, "other_forgotten_rows": v / 2, "retain": 0.9}
            for i, v in enumerate(values)
        ]

    runs = [
        {**make_run(BLUR, 1.0, s, [START, START]), "relearning": c}
        for s, c in ((1, curve(0, 0.4)), (2, curve(0, 0.8, 1)))
    ]
    table = tables.relearning_table(summary_of(tmp_path, runs))
    assert table is not None
    [row] = table.rows
    assert row[1] == 5
    assert [cell.mean for cell in row[2:]] == pytest.approx([0, 0.6, 0, 0.3, 0.9, 0.9])
    assert tables.relearning_table(summary_of(tmp_path / "none", hand_made())) is None


def test_alignment(tmp_path: Path) -> None:
    def steps(*cosines: float) -> list[dict[str, float]]:
        return [{"step": i, "cosine": c, "forget_norm": 4.0 / 2**i, "retain_norm": 2.0} for i, c in enumerate(cosines)]

    runs = [
        {**make_run(BLUR, 1.0, s, [START, START]), "steps": steps(*c)} for s, c in ((1, (0.1, -0.3)), (2, (-0.2, -0.4)))
    ]
    row = by_label(tables.alignment_table(summary_of(tmp_path, runs)))["NPO + NLL: BLUR"]
    _, cosine, cosine_range, opposed, first, last, projection = row
    assert (cosine.mean, opposed.mean) == pytest.approx((-0.2, 0.75))
    assert cosine_range == (-0.4, 0.1)
    assert (first.mean, last.mean) == (4.0, 2.0)
    assert projection == pytest.approx((-0.4, 0.05))


def test_the_angle_in_the_metric_stands_beside_the_plain_one(tmp_path: Path) -> None:
    def steps(numbers: dict[str, tuple[float, ...]]) -> list[dict[str, float]]:
        return [{"step": i, "cosine": 0.1} | {name: of[i] for name, of in numbers.items()} for i in range(3)]

    seen = {"metric_cosine": (-0.1, -0.2, -0.6), "effective_share": (0.5, 0.001, 0.003)}
    runs = [
        {**make_run(SUM, 1.0, 1, [START, START]), "steps": steps({})},
        {**make_run(BLUR, 1.0, 1, [START, START]), "steps": steps(seen)},
    ]
    rows = by_label(tables.alignment_table(summary_of(tmp_path, runs)))
    cosine, share = rows["NPO + NLL: BLUR"][-2:]
    assert (cosine.mean, share.mean) == pytest.approx((-0.3, 0.003))
    assert rows["NPO + NLL: weighted sum"][-2:] == (None, None)
    assert len(tables.alignment_table(summary_of(tmp_path / "none", runs[:1])).columns) == 7


def test_what_is_kept_at_the_end_is_compared_by_seed(tmp_path: Path) -> None:
    ends = {(SUM, 1): 0.9, (SUM, 2): 0.8, (BLUR, 1): 0.95, (BLUR, 2): 0.83}
    runs = [make_run(name, 1.0, seed, [START, kept(-1.0, share)]) for (name, seed), share in ends.items()]
    summary = summary_of(tmp_path, runs)
    [(label, forget, retain, untouched, pairs)] = tables.ends_table(summary).rows
    assert pairs is forget
    assert label == "NPO + NLL: BLUR"
    assert (forget.mean, forget.wins, untouched.mean) == (0.0, 0, 0.0)
    assert (retain.mean, retain.wins, retain.pairs) == (pytest.approx(0.9 * 0.04), 2, 2)
    assert retain.low < 0 < retain.high
    [row] = record(summary, {"selected": (tables.ends_table(summary),)})["tables"]["ends"]["rows"]
    assert [cell["mean"] for cell in row[1:]] == pytest.approx([0.0, 0.036, 0.0, 0.0])
    assert tables.ends_table(summary_of(tmp_path / "alone", runs[:2], methods=(SUM,))) is None


def test_cost_keeps_the_order_of_the_methods(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", [], methods=(SUM, BLUR))
    assert tables.cost_table(summarize(load(folder))) is None
    ratio = {"time_ratio": {"median": 1.2, "low": 1.1, "high": 1.4}, "extra_gradient_sets": None}
    write(folder / "cost.json", {"baseline": SUM, "methods": {"other/x": ratio, BLUR: ratio, SUM: ratio}})
    table = tables.cost_table(summarize(load(folder)))
    assert table is not None
    assert [row[0] for row in table.rows] == ["NPO + NLL: weighted sum", "NPO + NLL: BLUR", "other/x"]
    assert table.rows[0][1:] == (1.2, (1.1, 1.4), None)


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.3e-6, "2e-06"), (0.0, "0"), (0.12345, "0.123"), (-0.0004, "-4e-04"), (45.67, "45.7"), (-123.4, "-123")],
)
def test_numbers_are_as_long_as_they_need_be(value: float, text: str) -> None:
    assert numbers.plain(value) == text


def test_numbers_have_no_negative_zero() -> None:
    assert numbers.fixed(-0.0001, 2) == "0.00"
    assert numbers.fixed(-0.0001, 2, sign=True) == "0.00"
    assert numbers.fixed(-1.5, 2) == "−1.50"
    assert numbers.spread(spread([1.0]), 2) == "1.00"
    assert numbers.interval(Paired(-0.5, -0.7, 0.1, 2, 1, 3, 0, 0, 0, 0, True), 2) == "−0.50 [−0.70, +0.10]"


def test_runs_of_another_grid_do_not_count(tmp_path: Path) -> None:
    stray = make_run(BLUR, 0.3, 1, [START, kept(-50.0, 1.0)])
    planned = {BLUR: [1.0, 0.1], SUM: [1.0, 0.1]}
    summary = summary_of(tmp_path, [*hand_made(), stray], sweep_weights=planned)
    assert summary.left_out == 1
    assert summary.by_id[BLUR].at_tau[0.95][1] == pytest.approx(-1.5)
