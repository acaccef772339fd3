"""Membership inference against cases worked out by hand."""

import math
import zlib

import pytest
import torch
from unlearning.metrics.likelihood import TokenScores
from unlearning.metrics.privacy import (
    auc,
    loss_score,
    membership_scores,
    min_k_plus_score,
    min_k_score,
    privacy_leakage,
    zlib_score,
)

LOG_PROBS = torch.tensor([-1.0, -5.0, -2.0, -4.0, -3.0])


def test_loss_and_zlib_by_hand() -> None:
    assert loss_score(LOG_PROBS) == -3
    text = "abcabcabcabcabcabc"
    assert zlib_score(LOG_PROBS, text) == pytest.approx(-3 / len(zlib.compress(text.encode())))
    # At the same loss, what compresses well is less surprising, and so less like a member.
    assert zlib_score(LOG_PROBS, "a" * 50) < zlib_score(LOG_PROBS, "the quick brown fox jumps over the lazy dog, no?")


@pytest.mark.parametrize(
    ("k", "expected"),
    [(0.4, -4.5), (0.2, -5), (0.1, -5), (0.6, -4), (0.79, -4), (1.0, -3)],  # int(0.79 * 5) = 3 tokens
)
def test_min_k_by_hand(k: float, expected: float) -> None:
    assert min_k_score(LOG_PROBS, k) == pytest.approx(expected)


def test_min_k_plus_by_hand() -> None:
    # (x - mean) / std: 1, -2, 0, -1, -3: not the order of the log-probabilities. The lowest two of five: -2.5.
    scores = TokenScores(
        LOG_PROBS,
        torch.ones(5).bool(),
        mean=torch.tensor([-2.0, -3.0, -2.0, -2.0, -1.5]),
        std=torch.tensor([1.0, 1.0, 1.0, 2.0, 0.5]),
    )
    assert min_k_plus_score(scores, 0.4) == pytest.approx(-2.5)
    assert min_k_plus_score(scores, 1.0) == pytest.approx(-1)
    assert membership_scores(scores, "text") == {
        "loss": loss_score(LOG_PROBS),
        "min_k": pytest.approx(-4.5),
        "min_k_plus": pytest.approx(-2.5),
        "zlib": zlib_score(LOG_PROBS, "text"),
    }


def test_min_k_plus_needs_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="vocabulary=True"):
        min_k_plus_score(TokenScores(LOG_PROBS, torch.ones(5).bool()))


def test_one_token_is_enough_and_none_is_not() -> None:
    one = TokenScores(torch.tensor([-2.0]), torch.tensor([True]), torch.tensor([-1.0]), torch.tensor([0.5]))
    assert membership_scores(one, "a") == {
        "loss": -2,
        "min_k": -2,
        "min_k_plus": -2,
        "zlib": pytest.approx(-2 / len(zlib.compress(b"a"))),
    }
    for score in (loss_score, min_k_score):
        with pytest.raises(ValueError, match="at least one"):
            score(torch.tensor([]))


def test_the_order_of_tokens_does_not_matter() -> None:
    assert min_k_score(LOG_PROBS.flip(0)) == min_k_score(LOG_PROBS)
    assert loss_score(LOG_PROBS.flip(0)) == loss_score(LOG_PROBS)


def test_auc_by_hand() -> None:
    # Pairs: 3 > 2, 3 > 1, 1 < 2, 1 = 1: (1 + 1 + 0 + 1/2) / 4.
    assert auc([3, 1], [2, 1]) == pytest.approx(2.5 / 4)
    assert auc([5, 6], [1, 2, 3]) == 1  # the forgotten are plainly remembered
    assert auc([1, 2], [3, 4]) == 0
    assert auc([1, 1], [1, 1, 1]) == 0.5


def test_auc_is_antisymmetric_and_takes_ranks_alone() -> None:
    a, b = [-3.0, -1.0, -0.5], [-2.0, -2.5, -0.7]
    assert auc(a, b) == pytest.approx(1 - auc(b, a))
    assert auc([math.exp(x) for x in a], [math.exp(x) for x in b]) == auc(a, b)


def test_auc_of_nan_is_nan_and_of_nothing_an_error() -> None:
    assert math.isnan(auc([1.0, math.nan], [1.0]))
    with pytest.raises(ValueError, match="got 1 and 0"):
        auc([1.0], [])


@pytest.mark.parametrize(
    ("own", "retrained", "leakage"),
    [
        (0.6, 0.6, 0),  # as if retrained
        (1.0, 0.5, -100),  # A = 0 beside 1/2: as well remembered as can be
        (0.75, 0.5, -50),
        (0.25, 0.5, 50),  # A = 3/4 beside 1/2
        (0.0, 0.5, 100),
        (0.0, 0.6, 150),  # A = 1 beside 0.4
    ],
)
def test_privacy_leakage_by_hand(own: float, retrained: float, leakage: float) -> None:
    assert privacy_leakage(own, retrained) == pytest.approx(leakage)


def test_privacy_leakage_is_undefined_where_retraining_leaks_everything() -> None:
    assert math.isnan(privacy_leakage(0.7, 1.0))
