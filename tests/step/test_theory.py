"""The paper's convergence statement (Theorem 3.2) on a problem whose constants are known."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from blur_optim import BLUR

# f(x) = mean_i 1/2 sin(x_i)  and  r(x) = 0.45 mean_i cos(x_i + phase_i), in DIM dimensions. |f|, |r| <= 1/2; each entry
# of a gradient is at most 1/(2 DIM), so its norm is at most 1/(2 sqrt(DIM)) <= 1/2; f's Hessian is diagonal with
# entries of at most 1/(2 DIM). Hence C = 1/2 bounds values and gradients, and L_F = 1/(2 DIM) is the smoothness of f.
DIM = 4
C = 0.5
L_F = 1 / (2 * DIM)
PHASE = torch.linspace(0, 3, DIM, dtype=torch.float64)


def forget_loss(x):
    return 0.5 * torch.sin(x).mean()


def retain_loss(x):
    return 0.45 * torch.cos(x + PHASE).mean()


@pytest.mark.parametrize("gamma", [0.25, 1.0, 4.0])
@pytest.mark.parametrize(("steps", "lr"), [(50, 0.5), (400, 0.2), (2000, 0.05)])
def test_mean_squared_forget_gradient_stays_under_the_bound(gamma, steps, lr):
    x = nn.Parameter(torch.linspace(-1, 2, DIM, dtype=torch.float64))
    opt = BLUR([x], torch.optim.SGD, gamma=gamma, lr=lr)
    norms = []
    for _ in range(steps):
        opt.step(lambda: forget_loss(x), lambda: retain_loss(x))
        assert float(opt.statistics.update_norm) <= (2 + gamma) * C
        norms.append(float(opt.statistics.forget_norm) ** 2)
    c1 = (2 + gamma) * C
    bound = 2 * C / (steps * lr * gamma) + L_F * lr * c1**2 / (2 * gamma)
    assert sum(norms) / steps <= bound


def quadratics():
    """Two bowls in a plane with minima far apart: every step towards one is a step away from the other."""
    x = nn.Parameter(torch.tensor([4.0, 1.0], dtype=torch.float64))
    return x, lambda: x.square().sum(), lambda: 5 * (x - torch.tensor([5.0, 0.0])).square().sum()


def run(rule, steps=200):
    x, forget, retain = quadratics()
    opt = BLUR([x], torch.optim.SGD, rule=rule, gamma=0.5, lr=0.01)
    losses = [float(opt.step(forget, retain)[0]) for _ in range(steps)]
    return losses, float(opt.statistics.cosine)


def test_the_forget_loss_falls_although_the_retain_loss_pulls_the_other_way():
    losses, cosine = run("blur")
    assert cosine < -0.5
    assert all(after < before for before, after in pairwise(losses))
    assert losses[-1] < 0.2 * losses[0]


def test_the_weighted_sum_of_the_same_weights_does_not():
    losses, _ = run("weighted_sum")
    assert losses[-1] > losses[0]


def test_first_order_decrease_is_that_of_forgetting_alone():
    """One small step lowers f by lr * gamma * |g_f|^2, whatever the retain weight."""
    for alpha in (0.0, 1.0, 10.0):
        x, forget, retain = quadratics()
        opt = BLUR([x], torch.optim.SGD, gamma=0.5, retain_weight=alpha, lr=1e-7)
        before = float(opt.step(forget, retain)[0])
        drop = before - float(forget().detach())
        assert math.isclose(drop, 1e-7 * 0.5 * float(opt.statistics.forget_norm) ** 2, rel_tol=1e-3)
