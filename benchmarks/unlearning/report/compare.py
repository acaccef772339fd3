"""How two ways of unlearning are compared: fronts, equal retain, hypervolume, pairs of seeds. Pure functions."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from scipy import stats

TAUS = (0.99, 0.98, 0.95, 0.9, 0.8)
CONFIDENCE = 0.95
TRIFLE = 0.005  # nats, or area: a difference below it is a tie, however sure it is
ROUNDING = 1e-12  # relative; a share that is tau but for the division counts as tau

BETTER, TIE, WORSE, ONE_SEED, NO_PAIR = "better", "tie", "worse", "one seed", "no pair"


@dataclass(frozen=True)
class Point:
    """A model on the way: ``kept`` = min(retain, untouched probability), each as a share of the target's."""

    kept: float
    log_prob: float
    probability: float
    start: bool = False  # nothing has been unlearned yet


@dataclass(frozen=True)
class Spread:
    """Values over seeds. ``sd`` is the sample standard deviation, None for one value."""

    mean: float
    sd: float | None
    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Paired:
    """Differences ours − theirs over seeds, with a t interval of 95 %; negative differences win if ``lower_wins``.

    Every seed is in exactly one of ``pairs``, ``only_ours``, ``only_theirs``, ``neither`` (who has a value) and
    ``not_run`` (a run is still to come). ``mean`` is None without a pair, ``low`` and ``high`` with fewer than two.
    """

    mean: float | None
    low: float | None
    high: float | None
    wins: int
    losses: int
    pairs: int
    only_ours: int
    only_theirs: int
    neither: int
    not_run: int
    lower_wins: bool

    @property
    def seeds(self) -> int:
        return self.pairs + self.only_ours + self.only_theirs + self.neither + self.not_run

    @property
    def verdict(self) -> str:
        """Return better or worse if the interval excludes 0 and the mean is no trifle, else tie.

        There is no verdict from fewer than two pairs.
        """
        if self.mean is None:
            return NO_PAIR
        if self.low is None or self.high is None:
            return ONE_SEED
        if self.low <= 0 <= self.high or abs(self.mean) < TRIFLE:
            return TIE
        return BETTER if (self.mean < 0) == self.lower_wins else WORSE


def front(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return the points that no other one beats in both ``kept`` (more) and ``log_prob`` (less), most kept first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.kept, p.log_prob)):
        if not best or point.log_prob < best[-1].log_prob:
            best.append(point)
    return tuple(best)


def lowest_at(points: Iterable[Point], tau: float) -> Point | None:
    """Return the point of lowest log p_forget among those that keep at least tau; None if only the start does."""
    enough = [point for point in points if point.kept >= tau * (1 - ROUNDING)]
    if all(point.start for point in enough):
        return None
    return min(enough, key=lambda point: point.log_prob)


def crossings(path: Sequence[Point], tau: float) -> Iterator[Point]:
    """Yield where a run passes ``tau`` between two looks, which are too far apart to be compared as they are.

    Linear in ``kept`` and in exp(log_prob), which of a run that collapses between two looks is the cautious guess.
    """
    for before, after in pairwise(path):
        if (before.kept - tau) * (after.kept - tau) < 0:
            share = (before.kept - tau) / (before.kept - after.kept)
            forgotten = (1 - share) * math.exp(before.log_prob) + share * math.exp(after.log_prob)
            known = (1 - share) * before.probability + share * after.probability
            yield Point(kept=tau, log_prob=math.log(forgotten), probability=known)


def hypervolume(points: Iterable[tuple[float, float]]) -> float:
    """Return the area that points dominate with both coordinates to be large, above the reference (0, 0)."""
    area = height = 0.0
    for x, y in sorted(points, reverse=True):
        if x > 0 and y > height:
            area += x * (y - height)
            height = y
    return area


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean, standard deviation and range; None without values."""
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else None
    median = statistics.median(values)
    return Spread(statistics.fmean(values), sd, median, min(values), max(values), len(values))


def paired(
    ours: Mapping[int, float | None],
    theirs: Mapping[int, float | None],
    seeds: Iterable[int],
    *,
    lower_wins: bool,
) -> Paired:
    """Compare seed by seed. A seed absent from a mapping has not run; None stands for "has no such value"."""
    groups: dict[str, list[int]] = {name: [] for name in ("pairs", "only_ours", "only_theirs", "neither", "not_run")}
    for seed in seeds:
        groups[_group(seed, ours, theirs)].append(seed)
    differences = [_value(ours, seed) - _value(theirs, seed) for seed in groups["pairs"]]
    gains = [-difference if lower_wins else difference for difference in differences]
    low, high = t_interval(differences) if len(differences) > 1 else (None, None)
    return Paired(
        mean=statistics.fmean(differences) if differences else None,
        low=low,
        high=high,
        wins=sum(gain > 0 for gain in gains),
        losses=sum(gain < 0 for gain in gains),
        **{name: len(members) for name, members in groups.items()},
        lower_wins=lower_wins,
    )


def _group(seed: int, ours: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> str:
    if seed not in ours or seed not in theirs:
        return "not_run"
    if ours[seed] is None:
        return "neither" if theirs[seed] is None else "only_theirs"
    return "only_ours" if theirs[seed] is None else "pairs"


def _value(values: Mapping[int, float | None], seed: int) -> float:
    value = values[seed]
    assert value is not None
    return value


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the interval mean ± t·sd/√n of 95 % for at least two values."""
    mean, n = statistics.fmean(values), len(values)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return mean - half, mean + half
