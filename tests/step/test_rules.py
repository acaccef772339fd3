"""Rules as functions of three numbers: against hand-computed cases, and the properties that define them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blur_optim.step.rules import RULES, Dots, on_unit_gradients, per_row, update_norm_sq


def scalar(value):
    return torch.tensor(float(value), dtype=torch.float64)


def dots_of(f, r):
    return Dots(scalar(f @ r), scalar(f @ f), scalar(r @ r))


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


# f = (2, 0), r = (-1, 3): <r,f> = -2, |f|^2 = 4, |r|^2 = 10. With gamma = 3, alpha = 2.
AGAINST = (vector(2, 0), vector(-1, 3))
# r = (1, 3): <r,f> = 2.
ALONG = (vector(2, 0), vector(1, 3))
STRONGLY_ALONG = (vector(1, 0), vector(5, 3))  # blur's a would be 3 - 2 * 5 = -7

HAND_COMPUTED = [
    ("blur", AGAINST, 3 - 2 * (-2 / 4), 2),
    ("blur", ALONG, 3 - 2 * (2 / 4), 2),
    ("retain_first", AGAINST, 3, 2 - 3 * (-2 / 10)),
    ("conflict", AGAINST, 4, 2),
    ("conflict", ALONG, 3, 2),
    ("barrier", AGAINST, 4, 2),
    ("barrier", STRONGLY_ALONG, 0, 2),
    ("weighted_sum", AGAINST, 3, 2),
    ("normalized", AGAINST, 3 / 2, 2 / math.sqrt(10)),
]


@pytest.mark.parametrize(("rule", "gradients", "a", "b"), HAND_COMPUTED)
def test_hand_computed(rule, gradients, a, b):
    got = RULES[rule](dots_of(*gradients), scalar(3), scalar(2))
    assert [float(x) for x in got] == pytest.approx([a, b], rel=1e-15)


def test_blur_on_unit_gradients():
    # cos = -2 / (2 sqrt 10); on unit vectors a = 3 - 2 cos, b = 2, and each is divided by its gradient's norm.
    a, b = on_unit_gradients(RULES["blur"])(dots_of(*AGAINST), scalar(3), scalar(2))
    assert float(a) == pytest.approx((3 + 2 / math.sqrt(10)) / 2, rel=1e-15)
    assert float(b) == pytest.approx(2 / math.sqrt(10), rel=1e-15)


small_vectors = st.lists(st.floats(-10, 10).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=4, max_size=4)
weights = st.floats(0, 5)


@given(small_vectors, small_vectors, weights, weights)
def test_blur_keeps_the_forget_rate(f, r, gamma, alpha):
    """<g_f, u> = gamma |g_f|^2, whatever the retain gradient is."""
    f, r = vector(*f), vector(*r)
    a, b = RULES["blur"](dots_of(f, r), scalar(gamma), scalar(alpha))
    u = a * f + b * r
    assert float(f @ u) == pytest.approx(float(gamma * (f @ f)), abs=1e-11 * (1 + float(f.norm() * r.norm()) * alpha))


@given(small_vectors, small_vectors, weights, weights, st.sampled_from(sorted(RULES)))
def test_norm_from_the_dots(f, r, gamma, alpha, rule):
    f, r = vector(*f), vector(*r)
    dots = dots_of(f, r)
    a, b = RULES[rule](dots, scalar(gamma), scalar(alpha))
    u = a * f + b * r
    size = float(a.abs() * f.norm() + b.abs() * r.norm())
    assert float(update_norm_sq(dots, a, b)) == pytest.approx(float(u @ u), abs=1e-13 * size**2)


def test_norm_of_blur_is_the_closed_form():
    a, b = RULES["blur"](dots_of(*AGAINST), scalar(3), scalar(2))
    assert float(update_norm_sq(dots_of(*AGAINST), a, b)) == pytest.approx(9 * 4 + 4 * (10 - 4 / 4), rel=1e-15)


def test_norm_of_parallel_gradients_is_not_negative():
    # Rounding leaves |r|^2 - <r,f>^2/|f|^2 below zero here.
    dots = Dots(scalar(0.3), scalar(0.1), scalar(0.9 - 1e-15))
    assert float(update_norm_sq(dots, scalar(-3), scalar(1))) >= 0


@pytest.mark.parametrize("norm_sq", [0.0, 5e-324, 1e-60], ids=["zero", "denormal", "ratio-beyond-float32"])
def test_a_vanishing_forget_gradient_leaves_the_retain_step(norm_sq):
    for name in ("blur", "barrier"):
        a, b = RULES[name](Dots(scalar(-1.0), scalar(norm_sq), scalar(1.0)), scalar(3), scalar(2))
        assert (float(a), float(b)) == (0.0, 2.0)


def test_a_vanishing_retain_gradient_leaves_the_forget_step():
    for name in RULES:
        a, b = RULES[name](Dots(scalar(0), scalar(4), scalar(0)), scalar(3), scalar(2))
        assert float(a) == (1.5 if name == "normalized" else 3.0)
        assert math.isfinite(float(b))


def test_rows_are_independent():
    cases = [AGAINST, ALONG, STRONGLY_ALONG]
    rows = Dots(*(torch.stack(column) for column in zip(*(dots_of(*c) for c in cases), strict=True)))
    gamma, alpha = vector(1, 2, 3), vector(0.5, 1, 2)
    for name, rule in RULES.items():
        a, b = rule(rows, gamma, alpha)
        for i, case in enumerate(cases):
            expected = rule(dots_of(*case), gamma[i], alpha[i])
            assert (a[i], b[i]) == expected, name


def test_user_rule_is_called_on_scalars_and_may_branch_and_return_numbers():
    seen = []

    def rule(dots, gamma, alpha):
        seen.append((dots, gamma, alpha))
        return (1.5, alpha) if dots.retain_forget < 0 else (gamma, 2)

    rows = Dots(vector(-1, 1), vector(4, 4), vector(9, 9))
    a, b = per_row(rule)(rows, vector(7, 8), vector(5, 6))
    assert a.tolist() == [1.5, 8.0]
    assert b.tolist() == [5.0, 2.0]
    assert all(x.dim() == 0 and x.dtype == torch.float64 for dots, g, w in seen for x in (*dots, g, w))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (1.0, r"must return a tuple \(a, b\), got 1.0"),
        ((1.0, 2.0, 3.0), r"must return a tuple \(a, b\), got"),
        ((torch.ones(2), 1.0), r"must return numbers or 0-d tensors, got shapes \(2,\) and \(\)"),
    ],
)
def test_user_rule_that_returns_something_else(result, message):
    with pytest.raises(TypeError, match=message):
        per_row(lambda *_: result)(Dots(vector(1), vector(1), vector(1)), vector(1), vector(1))
