"""What of the theory carries over to a metric that stands still: the change of variables, and the bound that it gives.

SGD without momentum, with second moments that were given and move by 1e-12 of themselves in a step. A quadratic, whose
constants are known: f(x) = 1/2 (x - p)' A (x - p), so that f in the coordinates M^(1/2) x is smooth with the largest
eigenvalue of P^(1/2) A P^(1/2).
"""

from itertools import pairwise

import pytest
import torch
from torch import nn

from blur_optim import BLUR
from blur_optim.step.metric import BETA, MEAN

DIM = 6
GENERATOR = torch.Generator().manual_seed(0)
MIXED = torch.randn(DIM, DIM, generator=GENERATOR, dtype=torch.float64)
A = MIXED @ MIXED.T + torch.eye(DIM, dtype=torch.float64)
CURVATURES = torch.logspace(-2, 2, DIM, dtype=torch.float64)  # Of the retain loss: what the metric is made of.
POINT = torch.ones(DIM, dtype=torch.float64)
P = 1 / (CURVATURES + 1e-8)
SMOOTHNESS = float(torch.linalg.eigvalsh(P.sqrt()[:, None] * A * P.sqrt()).max())


def forget_loss(x):
    return 0.5 * (x - POINT) @ A @ (x - POINT)


def retain_loss(x):
    return 0.5 * (CURVATURES * x.square()).sum()


def make(start, **options):
    x = nn.Parameter(start.clone())
    opt = BLUR([x], torch.optim.SGD, metric="retain", damping=0.0, **options)
    opt.param_groups[0] |= {BETA: 1 - 1e-12, MEAN: torch.ones((), dtype=torch.float64)}
    opt.state[x] |= {"exp_avg_sq": CURVATURES.square(), "step": torch.tensor(1e20)}
    return x, opt


START = torch.linspace(-1, 2, DIM, dtype=torch.float64)


@pytest.mark.parametrize("rule", ["blur", "weighted_sum", "retain_first", "conflict"])
def test_a_step_in_the_metric_is_a_plain_one_in_other_coordinates(rule):
    """y = M^(1/2) x: gradients become P^(1/2) g, dots those in the metric, and the plain step on y is P u on x."""
    x, opt = make(START, lr=1e-3, rule=rule, gamma=0.5)
    y = nn.Parameter(START / P.sqrt())
    gamma = None
    for _ in range(20):
        opt.step(lambda: forget_loss(x), lambda: retain_loss(x))
        f = A @ (P.sqrt() * y.detach() - POINT)
        gamma = 0.5 / float((P * f).square().mean().sqrt())  # The scale of the forget term, which is not the metric's.
        plain = BLUR([y], torch.optim.SGD, lr=1e-3, rule=rule, gamma=gamma)
        plain.step(lambda: forget_loss(P.sqrt() * y), lambda: retain_loss(P.sqrt() * y))
        torch.testing.assert_close(P.sqrt() * y.detach(), x.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gamma", [0.25, 1.0])
@pytest.mark.parametrize(("steps", "lr"), [(50, 2e-3), (400, 5e-4)])
def test_the_descent_of_theorem_3_2(gamma, steps, lr):
    r"""Each step lowers f by lr gamma s |g_f|_P^2 less (lr^2 / 2) L |u|_P^2; the sum bounds the mean of s |g_f|_P^2."""
    x, opt = make(START, lr=lr, gamma=gamma)
    losses, asked, norms = [float(forget_loss(x.detach()))], [], []
    for _ in range(steps):
        opt.step(lambda: forget_loss(x), lambda: retain_loss(x))
        sums = opt.statistics.in_metric
        rf, ff, rr = (float(dot) for dot in sums.dots)
        a, b = float(opt.statistics.forget_coefficient), float(opt.statistics.retain_coefficient)
        norms.append(a * a * ff + 2 * a * b * rf + b * b * rr)
        asked.append(ff / float((sums.forget_sq / sums.numel).sqrt()))
        losses.append(float(forget_loss(x.detach())))
    for (before, after), s_ff, norm in zip(pairwise(losses), asked, norms, strict=True):
        assert after <= before - lr * gamma * s_ff + 0.5 * SMOOTHNESS * lr**2 * norm + 1e-9
    bound = losses[0] / (steps * lr * gamma) + SMOOTHNESS * lr / (2 * gamma) * max(norms)
    assert sum(asked) / steps <= bound


@pytest.mark.filterwarnings("ignore:`retain_weight` is 100")  # Unusual on purpose.
def test_first_order_decrease_is_that_of_forgetting_alone():
    """<g_f, step> = -lr gamma s |g_f|_P^2 whatever the retain loss wants, and for the step that is taken."""
    drops = []
    for alpha in (0.0, 1.0, 100.0):
        x, opt = make(START, lr=1e-7, gamma=0.5, retain_weight=alpha)
        g = A @ (START - POINT)
        opt.step(lambda x=x: forget_loss(x), lambda x=x: retain_loss(x))
        drops.append(float(g @ (x.detach() - START)))
        s = 1 / (P * g).square().mean().sqrt()
        assert drops[-1] == pytest.approx(float(-1e-7 * 0.5 * s * (g * P * g).sum()), rel=1e-6)
    assert drops[0] == pytest.approx(drops[2], rel=1e-6)


def test_where_momentum_and_a_moving_v_break_it():
    """The same identity under AdamW's momentum: it holds in the first step, and not in the later ones."""
    problem = nn.Parameter(START.clone())
    opt = BLUR([problem], torch.optim.AdamW, metric="retain", lr=0.1, gamma=0.5, weight_decay=0.0)
    ratios = []
    for _ in range(10):
        before = problem.detach().clone()
        g = A @ (before - POINT)
        opt.step(lambda: forget_loss(problem), lambda: retain_loss(problem))
        sums = opt.statistics.in_metric
        s_ff = float(sums.dots.forget_norm_sq) / float((sums.forget_sq / sums.numel).sqrt())
        ratios.append(float(g @ (problem.detach() - before)) / (-0.1 * 0.5 * s_ff))
    assert ratios[0] == pytest.approx(1.0, rel=1e-9)
    assert max(abs(ratio - 1) for ratio in ratios) > 1e-2
