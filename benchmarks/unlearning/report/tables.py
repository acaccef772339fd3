"""The report's tables of runs, their ends and their scores."""

from collections.abc import Iterable, Sequence

from .compare import TAUS, Spread, spread
from .gradients import alignment
from .load import KINDS, RELEARNED, Measured, Relearning, Run, Yardstick
from .names import FORGET_ONLY, WEIGHTED_SUM, is_p_value, score_label
from .numbers import percent
from .ratios import ratio_tables
from .summary import MethodSummary, Summary, share_kept, stop_at_unseen
from .table import LOG, METHOD, PROBABILITY, Cell, Column, Table
from .tuning import one_setting_table, tuning_table

SCORES_SIDE_BY_SIDE = 7
TARGET, RETRAINED = "target", "retrained"
MEASURED = (
    Column("log p_forget", LOG),
    Column("p_forget", PROBABILITY),
    Column("p_retain", PROBABILITY),
    Column("p_untouched", PROBABILITY),
)


def main_table(summary: Summary) -> Table:
    """Every method at what tuning selected, and the two yardsticks."""
    rows = [
        (label, None, None, None, None, *_measured(y.final for y in yardsticks))
        for label, yardsticks in _yardsticks(summary)
    ]
    for method in summary.methods:
        runs, chosen = method.selected_runs, method.selected
        good = [run.final for run in runs if run.final]
        picked = (chosen.lr, chosen.weight) if chosen else (None, None)
        rows.append((method.method.label, *picked, len(good), len(runs) - len(good), *_measured(good)))
    columns = (METHOD, Column("lr", "weight"), Column("w", "weight"), Column("seeds", "count"))
    return Table("main", "At the selected weight", (*columns, Column("diverged", "count"), *MEASURED), tuple(rows))


def ends_table(summary: Summary) -> Table | None:
    """What is kept at the end of the runs, beside the weighted sum of the same losses; None where there is none."""
    rows = []
    for method in summary.methods:
        found = [summary.of_ends(method, kind) for kind in KINDS]
        if any(found):
            rows.append((method.method.label, *found, found[0]))
    columns = (METHOD, *(Column(f"p_{kind}", "paired") for kind in KINDS), Column("pairs of seeds", "pairs"))
    return Table("ends", "Minus the weighted sum", columns, tuple(rows)) if rows else None


def _yardsticks(summary: Summary) -> list[tuple[str, Sequence[Yardstick]]]:
    found = ((TARGET, summary.setting.targets), (RETRAINED, summary.setting.retrained))
    return [(name, tuple(yardsticks.values())) for name, yardsticks in found if yardsticks]


def _measured(finals: Iterable[Measured]) -> tuple[Spread | None, ...]:
    finals = list(finals)
    log_prob = spread([final.forget.log_prob for final in finals])
    return (log_prob, *(spread([getattr(final, kind).probability for final in finals]) for kind in KINDS))


def equal_retain_tables(summary: Summary) -> tuple[Table, ...]:
    """For each tau, log p_forget at equal retain and the paired difference to the weighted sum."""
    return tuple(_equal_retain(summary, tau) for tau in TAUS)


def line_tables(summary: Summary) -> tuple[Table, ...]:
    """The same on the straight line to the end of each run; none where no run looked there."""
    if not any(method.on_line[tau] for method in summary.methods for tau in TAUS):
        return ()
    return tuple(_equal_retain(summary, tau, on_line=True) for tau in TAUS)


PAIRED = (
    Column("difference", "paired"),
    Column("wins", "wins"),
    Column("pairs of seeds", "pairs"),
    Column("verdict", "verdict"),
)


def _equal_retain(summary: Summary, tau: float, *, on_line: bool = False) -> Table:
    rows = []
    for method in summary.methods:
        values = (method.on_line if on_line else method.at_tau)[tau]
        reached = [value for value in values.values() if value is not None]
        difference = summary.at_equal_retain(method, tau, on_line=on_line)
        retrained = summary.reached_retrained(values)
        counts = (f"{len(reached)} of {len(values)}", None if retrained is None else f"{retrained} of {len(values)}")
        rows.append((method.method.label, spread(reached), *counts, *[difference] * len(PAIRED)))
    columns = (
        METHOD,
        Column("log p_forget", LOG),
        Column("seeds that keep enough"),
        Column("as low as retrained"),
        *PAIRED,
    )
    return Table(
        f"{'line' if on_line else 'equal-retain'}-{tau:g}",
        f"Keeping {percent(tau)} of retain and untouched",
        columns,
        tuple(rows),
    )


def hypervolume_table(summary: Summary) -> Table:
    """Dominated area and the paired difference to the weighted sum."""
    rows = []
    for method in summary.methods:
        difference = summary.of_hypervolume(method)
        rows.append((method.method.label, spread(list(method.hypervolumes.values())), *[difference] * len(PAIRED)))
    return Table("hypervolume", "Hypervolume", (METHOD, Column("hypervolume", PROBABILITY), *PAIRED), tuple(rows))


def score_tables(summary: Summary) -> tuple[Table, ...]:
    """The benchmark's own scores at the selected weight, a few of them side by side."""
    rows: list[tuple[str, list[dict[str, float | None]]]] = [
        (label, [y.scores for y in yardsticks if y.scores]) for label, yardsticks in _yardsticks(summary)
    ]
    rows += [(m.method.label, [run.scores for run in m.selected_runs if run.scores]) for m in summary.methods]
    names = list(dict.fromkeys(name for _, found in rows for scores in found for name in scores))
    parts = [names[i : i + SCORES_SIDE_BY_SIDE] for i in range(0, len(names), SCORES_SIDE_BY_SIDE)]
    return tuple(_scores(i, part, rows) for i, part in enumerate(parts, start=1))


def _scores(number: int, names: list[str], rows: list[tuple[str, list[dict[str, float | None]]]]) -> Table:
    return Table(
        f"scores-{number}",
        "",
        (METHOD, *(Column(score_label(name), "p" if is_p_value(name) else "score") for name in names)),
        tuple((label, *(_score(found, name) for name in names)) for label, found in rows),
    )


def _score(found: list[dict[str, float | None]], name: str) -> Spread | None:
    return spread([value for scores in found if (value := scores.get(name)) is not None])


def weight_tables(summary: Summary) -> tuple[Table, ...]:
    """The end of the run for every weight, a table for each pair of losses."""
    return tuple(_weights(summary, losses) for losses in dict.fromkeys(m.method.losses for m in summary.methods))


def _weights(summary: Summary, losses: str) -> Table:
    methods = [m for m in summary.methods if m.method.losses == losses]
    rows = tuple(row for method in methods for row in _weight_rows(method))
    columns = (Column("combined by"), Column("w = γ", "weight"), Column("λ = 1/w", "weight"), Column("seeds", "count"))
    title = f"{methods[0].method.losses_label}: every weight"
    return Table(f"weights-{losses}", title, (*columns, Column("diverged", "count"), *MEASURED), rows, folded=True)


def _weight_rows(method: MethodSummary) -> Iterable[tuple[Cell, ...]]:
    for weight in sorted({run.weight for run in method.runs}, reverse=True):
        runs = method.runs_at(weight)
        good = [run.final for run in runs if run.final]
        inverse = 1 / weight if method.method.combine == WEIGHTED_SUM and weight else None
        yield method.method.combine_label, weight, inverse, len(good), len(runs) - len(good), *_measured(good)


def relearning_table(summary: Summary) -> Table | None:
    """Probabilities before and after relearning; None where nothing relearned."""
    rows = [
        (label, *cells)
        for label, yardsticks in _yardsticks(summary)
        if (cells := _relearning([y.relearning for y in yardsticks if y.relearning]))
    ]
    for method in summary.methods:
        cells = _relearning([run.relearning for run in method.selected_runs if run.relearning])
        if cells:
            rows.append((method.method.label, *cells))
    if not rows:
        return None
    names = [f"{name}, {when}" for name in ("relearned rows", "other forgotten rows", "retain") for when in _WHEN]
    columns = (METHOD, Column("steps", "count"), *(Column(name, PROBABILITY) for name in names))
    return Table("relearning", "Relearning", columns, tuple(rows))


_WHEN = ("before", "after")


def _relearning(curves: Sequence[tuple[Relearning, ...]]) -> tuple[Cell, ...]:
    if not curves:
        return ()
    steps = min(curve[-1].step for curve in curves)
    ends = [(curve[0], next(entry for entry in curve if entry.step >= steps)) for curve in curves]
    cells = [
        spread([value for end in ends if (value := getattr(end[when], name)) is not None])
        for name in RELEARNED
        for when in range(2)
    ]
    return (steps, *cells)


def quantized_table(summary: Summary) -> Table | None:
    """Probabilities before and after rounding to 4 bits; None where nothing was rounded."""
    rows = [
        (label, *_before_and_after([(y.final, y.quantized) for y in yardsticks]))
        for label, yardsticks in _yardsticks(summary)
    ]
    rows += [
        (method.method.label, *_before_and_after([(run.final, run.quantized) for run in method.selected_runs]))
        for method in summary.methods
    ]
    return _before_and_after_table("quantized", "In 4 bits", rows)


def restored_table(summary: Summary) -> Table | None:
    """Probabilities before and after the token embeddings were put back; None where they were not."""
    rows = [
        (method.method.label, *_before_and_after([(run.final, run.restored) for run in method.selected_runs]))
        for method in summary.methods
    ]
    return _before_and_after_table("restored", "With the old token embeddings", rows)


def _before_and_after_table(name: str, title: str, rows: Sequence[tuple[Cell, ...]]) -> Table | None:
    columns = [Column(f"p_{kind}, {when}", PROBABILITY) for kind in KINDS for when in _WHEN]
    measured = tuple(row for row in rows if row[1] is not None)
    return Table(name, title, (METHOD, *columns), measured) if measured else None


def _before_and_after(pairs: Sequence[tuple[Measured | None, Measured | None]]) -> tuple[Spread | None, ...]:
    both = [pair for pair in pairs if all(pair)]
    return tuple(
        spread([getattr(pair[when], kind).probability for pair in both]) for kind in KINDS for when in range(2)
    )


def stopping_table(summary: Summary) -> Table | None:
    """Say where the selected runs would have stopped: at the level of rows that nobody learned. None if unknown."""
    rows = []
    for method in summary.methods:
        stops = [(run, stop_at_unseen(summary.setting, run)) for run in method.selected_runs]
        known = [(run, stop) for run, stop in stops if stop is not None]
        reached = [stop for _, stop in known if stop[0] is not None]
        if known:
            rows.append(
                (
                    method.method.label,
                    f"{len(reached)} of {len(known)}",
                    spread([float(step) for step, _ in reached]),
                    spread([share for _, share in reached]),
                    spread([share_kept(summary.setting, run) for run, _ in known if run.final]),
                    spread([run.final.forget.log_prob for run, _ in known if run.final]),
                )
            )
    levels = [y.unseen.log_prob for y in summary.setting.targets.values() if y.unseen]
    if levels:
        rows.insert(0, ("rows never seen, by the target", None, None, None, None, spread(levels)))
    columns = (
        METHOD,
        Column("runs that reach the level"),
        Column("step", LOG),
        Column("kept there", PROBABILITY),
        Column("kept at the end", PROBABILITY),
        Column("log p_forget at the end", LOG),
    )
    return Table("stopping", "Stopping", columns, tuple(rows)) if len(rows) > 1 else None


def cost_table(summary: Summary) -> Table | None:
    """Time and memory of a step; None where they were not measured.

    A forget loss alone is left out: for the same batches, the benchmark takes the retain gradient there too, and would
    count it.
    """
    alone = {m.method.id for m in summary.methods if m.method.combine == FORGET_ONLY}
    costs = {name: cost for name, cost in summary.setting.costs.items() if name not in alone}
    labels = {m.method.id: m.method.label for m in summary.methods}
    ids = [name for name in labels if name in costs] + [name for name in costs if name not in labels]
    rows = tuple(
        (
            labels.get(name, name),
            costs[name].median,
            (costs[name].low, costs[name].high),
            costs[name].extra_gradient_sets,
        )
        for name in ids
    )
    columns = (
        METHOD,
        Column("time of a step", "ratio"),
        Column("low to high", "span"),
        Column("extra gradient sets", "weight"),
    )
    return Table("cost", "Cost", columns, rows) if rows else None


def alignment_table(summary: Summary) -> Table:
    """How the gradients met, at the selected weight; a forget loss alone has one gradient and no row."""
    rows = [_alignment_row(m.method.label, m.selected_runs) for m in summary.methods if m.method.retain_loss]
    columns = (
        METHOD,
        Column("cos, mean", LOG),
        Column("cos, of any step", "span"),
        Column("share of opposed steps", "share"),
        Column("‖g_f‖, first", "score"),
        Column("‖g_f‖, last", "score"),
        Column("c, of any step", "span"),
    )
    in_metric = (Column("cos in the metric, mean", LOG), Column("effective share", "score"))
    if not any(row[-len(in_metric) :] != (None, None) for row in rows):
        rows, in_metric = [row[: -len(in_metric)] for row in rows], ()
    return Table("alignment", "How the gradients met", (*columns, *in_metric), tuple(rows))


def _alignment_row(label: str, runs: Sequence[Run]) -> tuple[Cell, ...]:
    a = alignment(runs)
    plain = (a.cosine, a.cosine_range, a.opposed, a.first_norm, a.last_norm, a.projection_range)
    return label, *plain, a.metric_cosine, a.effective_share


def all_tables(summary: Summary) -> dict[str, tuple[Table, ...]]:
    """Return the tables by section of the report; a section may have none."""
    return {
        "equal retain": (*equal_retain_tables(summary), hypervolume_table(summary)),
        "line": line_tables(summary),
        "ratios": ratio_tables(summary),
        "selected": tuple(table for table in (main_table(summary), ends_table(summary)) if table),
        "scores": score_tables(summary),
        "gradients": (alignment_table(summary),),
        "weights": weight_tables(summary),
        "tuning": tuple(table for table in (tuning_table(summary), one_setting_table(summary)) if table),
        "relearning": tuple(table for table in [relearning_table(summary)] if table),
        "quantized": tuple(table for table in [quantized_table(summary)] if table),
        "restored": tuple(table for table in [restored_table(summary)] if table),
        "stopping": tuple(table for table in [stopping_table(summary)] if table),
        "cost": tuple(table for table in [cost_table(summary)] if table),
    }
