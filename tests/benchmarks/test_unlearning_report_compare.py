"""Fronts, equal retain, hypervolume and pairs against cases done by hand."""

import math

import pytest
from unlearning.report.compare import Point, crossings, front, hypervolume, lowest_at, paired, spread, t_interval


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(kept, log_prob, math.exp(log_prob)) for kept, log_prob in pairs]


def test_the_front_drops_what_another_point_beats() -> None:
    good = points((1.0, -0.1), (0.9, -2.0), (0.5, -3.0))
    beaten = points((0.9, -1.0), (0.8, -2.0), (0.4, -2.9), (1.0, -0.05))
    assert front([*beaten, *good]) == tuple(good)
    assert front([]) == ()


def test_equal_points_are_on_the_front_once() -> None:
    assert front(points((0.9, -1.0), (0.9, -1.0))) == tuple(points((0.9, -1.0)))


@pytest.mark.parametrize(("tau", "expected"), [(0.99, -0.1), (0.95, -1.0), (0.9, -2.0), (1.01, None)])
def test_the_lowest_log_prob_is_among_points_that_keep_enough(tau: float, expected: float | None) -> None:
    found = lowest_at(points((1.0, -0.1), (0.95, -1.0), (0.91, -2.0), (0.89, -9.0)), tau)
    assert (found and found.log_prob) == expected


def test_a_share_that_is_tau_but_for_rounding_counts() -> None:
    kept = 0.99 * 0.011 / 0.011
    assert kept < 0.99  # or this proves nothing
    assert lowest_at(points((kept, -1.0)), 0.99) == Point(kept, -1.0, math.exp(-1))
    assert lowest_at(points((0.9499, -1.0)), 0.95) is None


def test_the_start_alone_is_not_unlearning() -> None:
    start = Point(1.0, -0.02, 0.98, start=True)
    assert lowest_at([start, *points((0.5, -9.0))], 0.9) is None
    [forgotten] = points((0.9, -1.0))
    assert lowest_at([start, forgotten], 0.9) is forgotten
    assert lowest_at([start, *points((1.0, -0.01))], 0.9) is start


def test_hypervolume_is_the_area_of_the_union() -> None:
    assert hypervolume([(0.5, 1.0), (1.0, 0.5)]) == pytest.approx(0.5 + 0.25)
    assert hypervolume([(0.5, 1.0), (1.0, 0.5), (0.4, 0.4), (0.5, 0.9)]) == pytest.approx(0.75)
    assert hypervolume([(0.2, 0.9), (0.6, 0.7), (0.9, 0.1)]) == pytest.approx(0.2 * 0.2 + 0.6 * 0.6 + 0.9 * 0.1)
    assert hypervolume([(-1.0, 2.0), (0.0, 1.0)]) == 0
    assert hypervolume([]) == 0


def test_spread_has_the_sample_standard_deviation() -> None:
    found = spread([1.0, 2.0, 6.0])
    assert found is not None
    assert (found.mean, found.sd, found.median, found.low, found.high, found.n) == (3, math.sqrt(7), 2, 1, 6, 3)
    alone = spread([4.0])
    assert alone is not None
    assert (alone.mean, alone.sd) == (4, None)
    assert spread([]) is None


def test_the_t_interval_is_that_of_the_tables() -> None:
    low, high = t_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-6)


def compare(ours: list[float | None], theirs: list[float | None], *, lower_wins: bool = True):
    seeds = range(len(ours))
    return paired(dict(zip(seeds, ours)), dict(zip(seeds, theirs)), seeds, lower_wins=lower_wins)  # noqa: B905


@pytest.mark.parametrize(
    ("ours", "verdict", "wins"),
    [
        ([-3.0, -3.1, -2.9], "better", 3),
        ([-1.0, -1.1, -0.9], "worse", 0),
        ([-2.5, -1.5, -2.1], "tie", 2),
        ([-2.0, -2.0, -2.0], "tie", 0),
    ],
)
def test_the_verdict_follows_from_the_interval(ours: list[float | None], verdict: str, wins: int) -> None:
    theirs: list[float | None] = [-2.0, -2.0, -2.0]
    found = compare(ours, theirs)
    assert (found.verdict, found.wins, found.pairs) == (verdict, wins, 3)
    opposite = {"better": "worse", "worse": "better", "tie": "tie"}[verdict]
    assert compare(ours, theirs, lower_wins=False).verdict == opposite


def test_differences_are_taken_seed_by_seed() -> None:
    """Seeds differ much more than the two methods do."""
    found = compare([-10.5, -1.6, -5.4], [-10.0, -1.0, -5.0])
    assert found.mean == pytest.approx(-0.5)
    assert (found.low, found.high) == pytest.approx((-0.748414, -0.251586), abs=1e-5)
    assert found.verdict == "better"


def test_one_pair_has_no_interval_and_no_verdict() -> None:
    found = compare([-3.0], [-2.0])
    assert (found.mean, found.low, found.high, found.verdict) == (-1, None, None, "one seed")


def test_seeds_without_a_pair_are_counted_by_reason() -> None:
    ours = {1: -3.0, 2: None, 3: -3.0, 4: None}
    theirs = {1: -2.0, 2: -2.0, 3: None, 4: None, 5: -2.0}
    found = paired(ours, theirs, (1, 2, 3, 4, 5), lower_wins=True)
    counts = (found.pairs, found.only_theirs, found.only_ours, found.neither, found.not_run)
    assert counts == (1, 1, 1, 1, 1)
    assert found.seeds == 5


def test_without_a_pair_there_is_nothing_to_say() -> None:
    found = compare([None, -1.0], [-1.0, None])
    assert (found.mean, found.low, found.wins, found.verdict) == (None, None, 0, "no pair")


def test_a_difference_that_is_sure_but_next_to_nothing_is_a_tie() -> None:
    small = paired({1: -1.003, 2: -1.0031, 3: -1.0029}, {1: -1.0, 2: -1.0, 3: -1.0}, (1, 2, 3), lower_wins=True)
    assert small.high is not None
    assert small.high < 0
    assert small.verdict == "tie"


def test_a_run_that_passes_a_level_between_two_looks_is_compared_there() -> None:
    down_and_up = points((1.0, math.log(0.8)), (0.9, math.log(0.4)), (0.94, math.log(0.2)))
    first, second = crossings(down_and_up, 0.92)
    assert (first.kept, first.log_prob) == pytest.approx((0.92, math.log(0.8 - 0.8 * 0.4)))  # 0.8 of it
    assert (second.kept, second.log_prob) == pytest.approx((0.92, math.log(0.3)))  # in the middle of the way up
    assert list(crossings(down_and_up, 0.9)) == []  # A look is there: it counts as it is.
    assert list(crossings(down_and_up, 0.5)) == []


def test_a_run_that_collapses_between_two_looks_gains_little_by_it() -> None:
    [point] = crossings(points((1.0, -0.1), (0.0, -60.0)), 0.9)
    assert point.log_prob == pytest.approx(-0.1 + math.log(0.9))  # By the logarithm it would be -6.09.
