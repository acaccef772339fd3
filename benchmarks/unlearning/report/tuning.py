"""What tuning tried, and how far one setting does for all losses."""

from collections.abc import Sequence
from typing import NamedTuple

from .compare import Point, crossings, hypervolume, lowest_at
from .load import Run
from .names import FORGET_ONLY
from .numbers import percent
from .summary import MethodSummary, Summary, path_of
from .table import METHOD, Cell, Column, Table

TUNING_TAUS = (0.98, 0.95, 0.9)


class Tried(NamedTuple):
    """A run of the tuning seed: lowest log p_forget at ``TUNING_TAUS``, and the area that its points dominate."""

    lr: float
    weight: float
    at_tau: tuple[float | None, ...]
    hypervolume: float


def tuning_table(summary: Summary) -> Table | None:
    """Every run of the tuning seed; None where its target is not known."""
    rows = [
        (method.method.label, run.lr, run.weight, *run.at_tau, run.hypervolume, _chosen(method, run))
        for method in summary.methods
        for run in _tried(summary, method)
    ]
    columns = (
        METHOD,
        Column("lr", "weight"),
        Column("w", "weight"),
        *(Column(f"log p_forget, {percent(tau)} kept", "number") for tau in TUNING_TAUS),
        Column("hypervolume", "number"),
        Column("chosen"),
    )
    return Table("tuning", "Every run of the tuning seed", columns, tuple(rows), folded=True) if rows else None


def one_setting_table(summary: Summary) -> Table | None:
    """Of each way of combining, the one learning rate and weight that does best for the losses it does worst for.

    Its hypervolume on the tuning seed, as a share of that of the setting chosen for the losses. None with fewer than
    two pairs of losses.
    """
    found: dict[str, list[MethodSummary]] = {}
    for method in summary.methods:
        if method.method.combine != FORGET_ONLY and _tried(summary, method) and method.selected:
            found.setdefault(method.method.combine_label, []).append(method)
    rows = [(name, *cells) for name, some in found.items() if len(some) > 1 and (cells := _one_setting(summary, some))]
    columns = (
        Column("combined by"),
        Column("losses"),
        Column("lr", "weight"),
        Column("w", "weight"),
        Column("least share of the tuned hypervolume", "ratio"),
    )
    return Table("one-setting", "One setting for all losses", columns, tuple(rows)) if rows else None


def _tried(summary: Summary, method: MethodSummary) -> list[Tried]:
    target = summary.setting.tuning_target
    if target is None:
        return []
    return [_look_at(run, path_of(run, target)) for run in method.tuning]


def _look_at(run: Run, path: Sequence[Point]) -> Tried:
    at_tau = [lowest_at([*path, *crossings(path, tau)], tau) for tau in TUNING_TAUS]
    area = hypervolume((1 - point.probability, point.kept) for point in path)
    return Tried(run.lr, run.weight, tuple(None if point is None else point.log_prob for point in at_tau), area)


def _chosen(method: MethodSummary, run: Tried) -> Cell:
    chosen = method.selected and (method.selected.lr, method.selected.weight)
    return "yes" if chosen == (run.lr, run.weight) else None


def _one_setting(summary: Summary, methods: Sequence[MethodSummary]) -> tuple[Cell, ...]:
    """Return losses, learning rate, weight and the least share; nothing where no setting was tried for all."""
    areas = [{(run.lr, run.weight): run.hypervolume for run in _tried(summary, method)} for method in methods]
    chosen = [(method.selected.lr, method.selected.weight) for method in methods if method.selected]
    tuned = [found.get(one) for found, one in zip(areas, chosen, strict=True)]
    common = set.intersection(*(set(found) for found in areas))
    if not common or not all(tuned):
        return ()
    least = {one: min(found[one] / best for found, best in zip(areas, tuned, strict=True) if best) for one in common}
    lr, weight = max(least, key=lambda one: (least[one], one))
    return ", ".join(m.method.losses_label for m in methods), lr, weight, least[lr, weight]
