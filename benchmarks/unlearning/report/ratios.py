"""How many times less, run by run: p_forget over the weighted sum's, and over the retrained model's."""

from collections.abc import Mapping

from .compare import ROUNDING, spread
from .numbers import percent
from .summary import Summary
from .table import METHOD, Cell, Column, Table

RATIO_TAUS = (0.98, 0.95)
TENTH, FACTOR = 0.1, 3.0  # of the weighted sum's p_forget; of the retrained model's

COLUMNS = (
    METHOD,
    Column("p_forget", "p"),
    Column("over the weighted sum's", "p"),
    Column("at most a tenth in"),
    Column("over the retrained model's", "p"),
    Column("at most three times in"),
)


def ratio_tables(summary: Summary) -> tuple[Table, ...]:
    """Return a table for each of ``RATIO_TAUS``, of the runs that keep so much; ones that do not are not within."""
    return tuple(_ratios(summary, tau) for tau in RATIO_TAUS)


def _ratios(summary: Summary, tau: float) -> Table:
    rows = []
    for method in summary.methods:
        ours = _probabilities(summary, method.method.id, tau)
        baseline = summary.baseline(method)
        theirs = _probabilities(summary, baseline.method.id, tau) if baseline else {}
        retrained = {
            seed: found.final.forget.probability for seed in ours if (found := summary.setting.retrained_model(seed))
        }
        reached = [p for p in ours.values() if p is not None]
        cells = (*_compared(ours, theirs, TENTH), *_compared(ours, retrained, FACTOR))
        rows.append((method.method.label, spread(reached), *cells))
    return Table(f"ratios-{tau:g}", f"Keeping {percent(tau)} of retain and untouched", COLUMNS, tuple(rows))


def _probabilities(summary: Summary, method: str, tau: float) -> dict[int, float | None]:
    found = summary.by_id[method].lowest[tau]
    return {seed: None if point is None else point.probability for seed, point in found.items()}


def _compared(ours: Mapping[int, float | None], theirs: Mapping[int, float | None], bound: float) -> tuple[Cell, Cell]:
    """Return the quotients, and in how many of the seeds with a value of theirs ours is at most ``bound`` times it."""
    with_theirs = [(ours[seed], value) for seed, value in theirs.items() if value is not None and seed in ours]
    pairs = [(mine, value) for mine, value in with_theirs if mine is not None]
    if not with_theirs:
        return None, None
    within = sum(mine <= bound * value * (1 + ROUNDING) for mine, value in pairs)
    return spread([mine / value for mine, value in pairs if value > 0]), f"{within} of {len(with_theirs)}"
