"""TOFU's metrics against cases worked out by hand."""

import math

import pytest
import unlearning  # noqa: F401  (puts shared_lib on the path)
from shared_lib.rows import Row
from unlearning.metrics.tofu import (
    AnswerLogProbs,
    ChoiceRow,
    choice_probability,
    forget_quality,
    log_truth_ratio,
    model_utility,
    truth_balance,
    truth_told,
)


def answers(true: float, *wrong: float) -> AnswerLogProbs:
    """Return probabilities as log-probabilities."""
    return AnswerLogProbs(math.log(true), [math.log(p) for p in wrong])


def test_truth_ratio_by_hand() -> None:
    # Wrong: sqrt(0.1 * 0.4) = 0.2, (0.1 + 0.4) / 2 = 0.25. Beside 0.5: 0.4 and 0.5.
    assert math.exp(log_truth_ratio(answers(0.5, 0.1, 0.4))) == pytest.approx(0.4)
    assert math.exp(log_truth_ratio(answers(0.5, 0.1, 0.4), mean="arithmetic")) == pytest.approx(0.5)


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_truth_ratio_of_equal_answers_is_one(mean: str) -> None:
    assert log_truth_ratio(answers(0.3, 0.3, 0.3), mean) == pytest.approx(0)
    assert log_truth_ratio(answers(0.3, 0.3), mean) == pytest.approx(0)


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_truth_ratio_does_not_depend_on_the_order_of_the_wrong_answers(mean: str) -> None:
    assert log_truth_ratio(answers(0.5, 0.1, 0.4, 0.2), mean) == pytest.approx(
        log_truth_ratio(answers(0.5, 0.4, 0.2, 0.1), mean)
    )


def test_truth_ratio_survives_what_no_probability_does() -> None:
    # exp(-2000) is 0 in float64.
    hopeless = AnswerLogProbs(-2000.0, [-1000.0, -3000.0])
    assert log_truth_ratio(hopeless) == 0
    assert log_truth_ratio(hopeless, mean="arithmetic") == pytest.approx(1000 - math.log(2))
    never = AnswerLogProbs(-1.0, [-math.inf, -math.inf])
    assert log_truth_ratio(never, mean="arithmetic") == log_truth_ratio(never) == -math.inf


def test_truth_ratio_needs_a_wrong_answer() -> None:
    with pytest.raises(ValueError, match="wrong"):
        log_truth_ratio(AnswerLogProbs(-1.0, []))


def test_truth_told_and_balance_by_hand() -> None:
    ratios = [math.log(0.25), math.log(0.5), math.log(4)]
    assert truth_told(ratios) == pytest.approx((0.75 + 0.5 + 0) / 3)
    assert truth_balance(ratios) == pytest.approx((0.25 + 0.5 + 0.25) / 3)


@pytest.mark.parametrize(
    ("ratio", "told", "balance"), [(0.0, 0, 1), (-math.inf, 1, 0), (math.inf, 0, 0), (1e4, 0, 0), (-1e4, 1, 0)]
)
def test_truth_at_its_extremes(ratio: float, told: float, balance: float) -> None:
    assert truth_told([ratio]) == told
    assert truth_balance([ratio]) == balance


def test_forget_quality_by_hand() -> None:
    # Three below three: the largest distance, 1, occurs in 2 of the 20 ways to choose three of six.
    assert forget_quality([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20)
    assert forget_quality([1, 2, 3], [1, 2, 3]) == 1
    assert forget_quality([1], [5]) == 1  # nothing can be told from one row


def test_forget_quality_takes_ranks_alone() -> None:
    unlearned, retrained = [-1.0, 0.3, 0.5, 2.0, -4.0], [0.4, 1.5, 3.0, 2.5, -2.0]
    quality = forget_quality(unlearned, retrained)
    assert 0 < quality < 1
    for f in (math.exp, lambda x: math.exp(-x), lambda x: 3 * x):
        assert forget_quality([f(x) for x in unlearned], [f(x) for x in retrained]) == pytest.approx(quality)
    assert forget_quality(unlearned[::-1], retrained) == quality
    assert forget_quality(retrained, unlearned) == pytest.approx(quality)


def test_forget_quality_falls_on_both_sides() -> None:
    retrained = [x / 10 for x in range(50)]
    remembered, over = [x - 5 for x in retrained], [x + 5 for x in retrained]
    # Fifty rows wholly apart: 2 of (100 choose 50) ways.
    assert forget_quality(remembered, retrained) == pytest.approx(2 / math.comb(100, 50), rel=1e-6)
    assert forget_quality(over, retrained) == pytest.approx(2 / math.comb(100, 50), rel=1e-6)


def test_forget_quality_of_nan_is_nan_and_of_nothing_an_error() -> None:
    assert math.isnan(forget_quality([1, math.nan], [1, 2]))
    with pytest.raises(ValueError, match="got 0 and 1"):
        forget_quality([], [1])


def test_choice_probability_by_hand() -> None:
    assert choice_probability(answers(0.3, 0.1, 0.2)) == pytest.approx(0.5)
    assert choice_probability(answers(0.2, 0.2, 0.2, 0.2)) == pytest.approx(1 / 4)
    assert choice_probability(AnswerLogProbs(-2000.0, [-2000.0])) == pytest.approx(1 / 2)
    assert choice_probability(AnswerLogProbs(-2000.0, [-1.0])) == 0
    assert math.isnan(choice_probability(AnswerLogProbs(-1.0, [math.nan])))


def test_model_utility_by_hand() -> None:
    # 2 / (1 / 0.5 + 1 / 1) = 2/3; one term that is zero leaves nothing.
    assert model_utility([0.5, 1.0]) == pytest.approx(2 / 3)
    assert model_utility({"a": 0.3, "b": 0.3}) == pytest.approx(0.3)
    assert model_utility([0.9] * 8 + [0.0]) == 0
    assert model_utility([0.9] * 8 + [0.1]) == pytest.approx(9 / (8 / 0.9 + 1 / 0.1))
    assert math.isnan(model_utility([0.5, math.nan]))
    with pytest.raises(ValueError, match="at least one term"):
        model_utility([])


def test_choice_rows_come_from_rows() -> None:
    assert ChoiceRow.from_row(Row("q", "a", "", "", ("b", "c"))) == ChoiceRow("q", "a", ("b", "c"))
