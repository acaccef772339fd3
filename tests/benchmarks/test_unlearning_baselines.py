"""The relatives of the bi-level step, each against its paper's equation, written out in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import unlearning  # noqa: F401  (puts shared_lib on the path)
from torch import Tensor, nn
from unlearning.baselines import Dampening, DualMoments, ForgetGain, PrimalDual, RetainNormal
from unlearning.baselines.primal_dual import SLACK
from unlearning.methods import COMBINATIONS, Method, make_optimizer
from unlearning.retain_metric import RetainMetric

from blur_optim.step.rules import Dots

LR = 0.01
SHAPES = ((4, 3), (5,))
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64 on both sides: what is left is the order of sums


class Problem:
    """Two quadratics over two tensors, f(θ) = ½ Σ d_f (θ − t_f)², likewise r, and their gradients."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw() -> list[Tensor]:
            return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]

        self.params = [nn.Parameter(x) for x in draw()]
        self.start = [p.detach().clone() for p in self.params]
        self.forget_target, self.retain_target = draw(), draw()
        self.forget_scale = [x.abs() + 0.1 for x in draw()]

    def gradients(self, kind: str, at: list[Tensor]) -> list[Tensor]:
        if kind == "forget":
            return [d * (p - t) for d, p, t in zip(self.forget_scale, at, self.forget_target, strict=True)]
        return [p - t for p, t in zip(at, self.retain_target, strict=True)]

    def closure(self, kind: str, value: float = 1.0) -> Callable[[], Tensor]:
        def run() -> Tensor:
            for p, grad in zip(self.params, self.gradients(kind, [p.detach() for p in self.params]), strict=True):
                p.grad = grad.clone()
            return torch.tensor(value, dtype=torch.float64)

        return run

    def step(self, optimizer: Any, retain_loss: float = 1.0) -> None:
        optimizer.step(self.closure("forget"), self.closure("retain", retain_loss))

    def moved(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


class Adam:
    """AdamW's step for one stream of gradients, by its equation."""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.betas, self.t = betas, 0
        self.m = [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
        self.v = [torch.zeros(s, dtype=torch.float64) for s in SHAPES]

    def step(self, params: list[Tensor], grads: list[Tensor], lr: float) -> list[Tensor]:
        self.t += 1
        (one, two), t = self.betas, self.t
        self.m = [one * m + (1 - one) * g for m, g in zip(self.m, grads, strict=True)]
        self.v = [two * v + (1 - two) * g * g for v, g in zip(self.v, grads, strict=True)]
        return [
            p - lr * (m / (1 - one**t)) / ((v / (1 - two**t)).sqrt() + 1e-8)
            for p, m, v in zip(params, self.m, self.v, strict=True)
        ]


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def test_dual_moments_step_in_turn_with_moments_apart() -> None:
    problem = Problem()
    optimizer = DualMoments(problem.params, gamma=0.3, lr=LR, weight_decay=0.0)
    at, forget, retain = problem.start, Adam(), Adam()
    for _ in range(3):
        problem.step(optimizer)
        at = forget.step(at, problem.gradients("forget", at), 0.3 * LR)
        at = retain.step(at, problem.gradients("retain", at), LR)
    same(problem.moved(), at)


def test_dual_moments_follow_the_schedule() -> None:
    problem = Problem()
    optimizer = DualMoments(problem.params, gamma=0.3, lr=LR, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.0
    problem.step(optimizer)
    same(problem.moved(), problem.start)


def test_the_forget_part_of_gu_is_orthogonal_to_the_retain_gradient_in_adams_metric() -> None:
    problem = Problem()
    optimizer = RetainNormal(problem.params, gamma=0.7, lr=LR, weight_decay=0.0)
    taken: list[list[Tensor]] = []
    optimizer.base_step = lambda update, step=optimizer.base_step: (taken.append(list(update)), step(update))
    at, adam = problem.start, Adam()
    for number in range(3):
        scales = [1 / ((v / (1 - 0.999**adam.t)).sqrt() + 1e-8) if number else torch.ones_like(v) for v in adam.v]
        f, r = problem.gradients("forget", at), problem.gradients("retain", at)
        problem.step(optimizer)
        parts = [(u - y) / 0.7 for u, y in zip(taken[-1], r, strict=True)]  # what is left of g_f
        for part, x, y, scale in zip(parts, f, r, scales, strict=True):
            assert (part * scale * y).sum().item() == pytest.approx(0, abs=1e-9)
            c = (y * scale * x).sum() / (y * scale * y).sum()
            torch.testing.assert_close(part, x - c * y, **EXACT)
        at = adam.step(at, taken[-1], LR)
        same(problem.moved(), at)


@pytest.mark.parametrize("gamma", [0.01, 0.3, 30.0])
def test_hamu_gains_what_was_asked_for_within_its_radius(gamma: float) -> None:
    problem, rule = Problem(), ForgetGain()
    f, r = (problem.gradients(kind, problem.start) for kind in ("forget", "retain"))
    dots = Dots(inner(r, f), inner(f, f), inner(r, r))
    one = torch.ones((), dtype=torch.float64)
    a, b = rule(dots, gamma * one, one)
    u = [a * x + b * y for x, y in zip(f, r, strict=True)]
    gain = gamma * dots.forget_norm_sq
    if dots.retain_forget >= gain:
        assert (float(a), float(b)) == (0, 1)
    elif gain**2 > dots.forget_norm_sq * dots.retain_norm_sq:  # Out of reach within the radius: forgetting comes first.
        torch.testing.assert_close(inner(f, u), gain, **EXACT)
        assert b == 0
    else:
        torch.testing.assert_close(inner(f, u), gain, **EXACT)
        torch.testing.assert_close(inner(u, u), dots.retain_norm_sq, **EXACT)
    # The gain stays what it was, however small the gradient becomes.
    small = Dots(-0.1 * dots.retain_forget.abs(), 0.01 * dots.forget_norm_sq, dots.retain_norm_sq)
    a, b = rule(small, gamma * one, one)
    torch.testing.assert_close(a * small.forget_norm_sq + b * small.retain_forget, gain, **EXACT)


def test_the_multiplier_follows_the_retain_loss() -> None:
    problem = Problem()
    optimizer = PrimalDual(problem.params, gamma=0.5, lr=LR, weight_decay=0.0)
    at, adam, multiplier = problem.start, Adam(), 1.0
    for loss in (0.1, 0.9, 0.1, 0.0):
        u = [
            0.5 * f + multiplier * r
            for f, r in zip(problem.gradients("forget", at), problem.gradients("retain", at), strict=True)
        ]
        at = adam.step(at, u, LR)
        problem.step(optimizer, loss)
        multiplier = max(0.0, multiplier + loss - 0.1 - SLACK)
        assert optimizer.multiplier == pytest.approx(multiplier)
    same(problem.moved(), at)


def test_dampening_shrinks_what_matters_to_the_forgotten_alone() -> None:
    problem = Problem()
    optimizer = Dampening(problem.params, gamma=1.0, steps=4, lr=LR, weight_decay=0.0)
    f, r = (problem.gradients(kind, problem.start) for kind in ("forget", "retain"))
    for taken in range(4):
        problem.step(optimizer)
        if taken < 2:
            same(problem.moved(), problem.start)
            continue
        alpha = 1000.0 if taken == 2 else 1.0
        ratios = [(x / y) ** 2 for x, y in zip(f, r, strict=True)]
        expected = [
            torch.where(ratio > alpha, (1 / ratio).clamp(max=1), 1.0) * p
            for ratio, p in zip(ratios, problem.start, strict=True)
        ]
        same(problem.moved(), expected)
    assert any((p != q).any() for p, q in zip(problem.moved(), problem.start, strict=True))


@pytest.mark.parametrize("rule", ["blur", "weighted_sum", "normalized"])
@pytest.mark.parametrize("damping_scope", ["all", "parameter"])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_step_in_the_metric_is_its_equation(rule: str, damping_scope: str, power: float) -> None:
    problem = Problem()
    betas, damping, gamma, decay = (0.9, 0.99), 0.05, 0.3, 0.1
    optimizer = RetainMetric(
        problem.params,
        gamma,
        lr=LR,
        weight_decay=decay,
        damping=damping,
        damping_scope=damping_scope,
        power=power,
        rule=rule,
    )
    at, v, m = problem.start, [torch.zeros_like(p) for p in problem.start], [torch.zeros_like(p) for p in problem.start]
    count, overall = sum(p.numel() for p in at), None
    for t in range(1, 4):
        f, r = problem.gradients("forget", at), problem.gradients("retain", at)
        v = [betas[1] * x + (1 - betas[1]) * g * g for x, g in zip(v, r, strict=True)]
        hat = [x / (1 - betas[1] ** t) for x in v]
        now = sum(x.sum() for x in hat) / count
        overall, before = now, now if overall is None else overall
        metric = [(x + damping * (before if damping_scope == "all" else x.mean())) ** power + 1e-8 for x in hat]
        steps = [x / y for x, y in zip(f, metric, strict=True)]
        scale = (count / inner(steps, steps)).sqrt()
        weighted = [x / y for x, y in zip(r, metric, strict=True)]
        if rule == "blur":
            a, b = gamma * scale - inner(r, steps) / inner(f, steps), 1.0
        elif rule == "weighted_sum":
            a, b = gamma * scale, 1.0
        else:
            a, b = gamma / inner(f, steps).sqrt(), 1 / inner(r, weighted).sqrt()
        m = [betas[0] * x + (1 - betas[0]) * (a * y + b * z) for x, y, z in zip(m, f, r, strict=True)]
        at = [(1 - LR * decay) * p - LR * x / (1 - betas[0] ** t) / y for p, x, y in zip(at, m, metric, strict=True)]
        problem.step(optimizer)
    same(problem.moved(), at)
    if rule == "blur":  # What is gained in f, momentum aside, is what gamma asks for.
        asked = gamma * scale * inner(f, steps)
        gained = inner(f, [(a * x + b * y) / z for x, y, z in zip(f, r, metric, strict=True)])
        torch.testing.assert_close(gained, asked, **EXACT)


# A scope is none of its options: tests/step/test_metric.py has those of the library.
IN_METRIC = [name for name, options in COMBINATIONS.items() if "metric" in name and "scope" not in options]


@pytest.mark.parametrize("combine", IN_METRIC)
def test_without_what_ablations_change_it_is_the_library_s_step(combine: str) -> None:
    ours, theirs = Problem(), Problem()
    options = {name: value for name, value in COMBINATIONS[combine].items() if name != "metric"}
    own = RetainMetric(ours.params, 0.3, lr=LR, **options)
    library = make_optimizer(Method("npo", "nll", combine), theirs.params, 0.3, LR, 4)
    for _ in range(4):
        ours.step(own)
        theirs.step(library)
    same(ours.moved(), theirs.moved())


def test_a_forget_gradient_below_the_floor_fades() -> None:
    steps = []
    for size in (1.0, 1e-6, 1e-10, 1e-12):
        problem = Problem()
        problem.forget_scale = [size * d for d in problem.forget_scale]
        problem.retain_target = [x - 1.0 for x in problem.start]  # A retain gradient of ones: the metric is flat.
        optimizer = RetainMetric(problem.params, 0.3, lr=LR, rule="weighted_sum", weight_decay=0.0)
        problem.step(optimizer)
        retain = [-LR / (1.01**0.5 + 1e-8) * torch.ones_like(x) for x in problem.start]
        forget = [new - old - r for new, old, r in zip(problem.moved(), problem.start, retain, strict=True)]
        steps.append((inner(forget, forget) / sum(x.numel() for x in forget)).sqrt().item() / LR)
    assert steps[:2] == pytest.approx([0.3, 0.3])
    assert steps[2] < 0.01
    assert steps[3] == pytest.approx(steps[2] / 100, rel=1e-3)


def test_what_is_of_no_use_does_no_harm_in_the_metric() -> None:
    problem = Problem()
    problem.forget_scale = [torch.zeros_like(d) for d in problem.forget_scale]  # Nothing left to forget.
    problem.step(RetainMetric(problem.params, 0.3, lr=LR))
    assert all(p.isfinite().all() for p in problem.params)
