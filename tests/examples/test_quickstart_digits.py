"""The second act: its loss, its data, and how runs are compared."""

import math

import pytest
import torch
from quickstart_lib.digits import (
    CLASS,
    COUNT,
    RUNS,
    Match,
    Outcome,
    forget_digits,
    kl_to_uniform,
    load,
    match_at_retain_loss,
)


def outcome(method: str, retain_loss: float, forget_kl: float) -> Outcome:
    return Outcome(method, 1.0, forget_kl, retain_loss, retain_accuracy=1.0, median_cosine=-1.0)


def test_kl_is_zero_for_a_network_without_opinion() -> None:
    assert kl_to_uniform(torch.full((3, 10), 7.0)).item() == pytest.approx(0.0, abs=1e-6)


def test_kl_by_hand() -> None:
    logits = torch.tensor([[0.8, 0.2], [0.5, 0.5]]).log()
    expected = (0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)) / 2  # sum_c 1/2 log(1/2 / p_c), mean of rows
    assert kl_to_uniform(logits).item() == pytest.approx(expected)


def test_images_to_forget_are_of_one_class_and_not_kept() -> None:
    digits = load()
    assert digits.forget.shape == (COUNT, 64)
    assert len(digits.retain) == len(digits.labels) == 1797 - COUNT
    assert (digits.labels == CLASS).sum() > 100


def test_match_takes_the_best_at_no_higher_retain_loss() -> None:
    cheap, dear = outcome("weighted_sum", 0.1, 0.5), outcome("weighted_sum", 0.01, 0.9)
    good, better, costly = outcome("blur", 0.1, 0.3), outcome("blur", 0.05, 0.2), outcome("blur", 0.2, 0.0)
    assert match_at_retain_loss([cheap, good, dear, costly, better]) == [Match(cheap, better), Match(dear, None)]


def test_all_runs_begin_at_the_same_network_and_are_reproducible() -> None:
    done: list[None] = []
    first = forget_digits(2, seed=0, advance=lambda: done.append(None))
    assert len(first) == len(done) == RUNS
    assert first == forget_digits(2, seed=0, advance=lambda: None)
