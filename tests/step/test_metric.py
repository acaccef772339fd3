"""Steps in the metric of the retain loss against the equations, written down once more in float64."""

import pytest
import torch
from helpers import (
    Problem,
    assert_params_close,
    backends,
    step_by_closures,
    step_by_phases,
)
from torch import nn
from torch.optim import SGD, Adam, AdamW

from blur_optim import BLUR
from blur_optim.kernels import BACKENDS
from blur_optim.step.metric import SMALLEST_RMS

DAMPING, EPS = 0.05, 1e-8


class Equations:
    """The method as docs/method.md has it, on flat vectors, one step after another."""

    def __init__(self, problem, base, gamma=0.7, alpha=1.0, rule="blur", lr=0.1, beta2=None, **options):
        self.problem, self.base, self.gamma, self.alpha, self.rule, self.lr = problem, base, gamma, alpha, rule, lr
        self.options = options
        self.beta1 = options.get("betas", (0.9, 0.999))[0] if base is not SGD else options.get("momentum", 0.0)
        self.beta2 = beta2 if beta2 is not None else options.get("betas", (0.9, 0.999))[1]
        self.m = self.v = self.vmax = 0.0
        self.mean, self.t = None, 0

    def gradients(self):
        losses = self.problem.forget_loss(), self.problem.retain_loss()
        return [torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.problem.params)]) for loss in losses]

    def coefficients(self, f, r, p):
        s = 1 / (p * f).square().mean().sqrt()
        rf, ff, rr = s * (r @ (p * f)), s * s * (f @ (p * f)), r @ (p * r)
        gamma, alpha = self.gamma, self.alpha
        if self.rule == "blur":
            return s * (gamma - alpha * rf / ff), alpha
        if self.rule == "weighted_sum":
            return s * gamma, alpha
        if self.rule == "normalized":
            return gamma / (f @ (p * f)).sqrt(), alpha / rr.sqrt()
        if self.rule == "conflict":
            return s * (gamma - alpha * rf / ff if rf < 0 else gamma), alpha
        if self.rule == "barrier":
            return s * max(gamma - alpha * rf / ff, 0.0), alpha
        assert self.rule == "retain_first"
        return s * gamma, alpha - gamma * rf / rr

    def step(self):
        f, r = self.gradients()
        self.t += 1
        o = self.options
        self.v = self.beta2 * self.v + (1 - self.beta2) * r.square()
        second = self.v
        if o.get("amsgrad"):
            self.vmax = second = torch.maximum(torch.as_tensor(self.vmax), self.v)
        corrected = second / (1 - self.beta2**self.t)
        mean = corrected.mean() if self.mean is None else self.mean
        self.mean = corrected.mean()
        p = 1 / ((corrected + DAMPING * mean).sqrt() + EPS)
        a, b = self.coefficients(f, r, p)
        self.u, self.p, self.f = a * f + b * r, p, f
        theta = nn.utils.parameters_to_vector(self.problem.params).detach()
        grad = -self.u if o.get("maximize") else self.u
        decay = o.get("weight_decay", 0.01 if self.base is AdamW else 0.0)
        if self.base is AdamW:
            theta = theta * (1 - self.lr * decay)
        else:
            grad = grad + decay * theta
        if self.base is SGD:
            self.m = grad if self.t == 1 else self.beta1 * self.m + grad
            moved = grad + self.beta1 * self.m if o.get("nesterov") else self.m
        else:
            self.m = self.beta1 * self.m + (1 - self.beta1) * grad
            moved = self.m / (1 - self.beta1**self.t)
        nn.utils.vector_to_parameters(theta - self.lr * p * moved, self.problem.params)


def make(base=AdamW, dtype=torch.float64, gamma=0.7, lr=0.1, damping=DAMPING, **options):
    problem = Problem(dtype)
    own = {name: options.pop(name) for name in ("beta2",) if name in options}
    opt = BLUR(problem.params, base, gamma=gamma, metric="retain", damping=damping, lr=lr, **options)
    for group in opt.param_groups if own else ():
        group["metric_beta"] = own["beta2"]
    return problem, opt


CASES = {
    "AdamW": (AdamW, {}),
    "Adam with L2": (Adam, {"weight_decay": 0.1}),
    "amsgrad": (AdamW, {"amsgrad": True, "betas": (0.8, 0.6)}),
    "maximize": (AdamW, {"maximize": True}),
    "fused": (AdamW, {"fused": True}),
    "a tensor as lr": (AdamW, {"lr": torch.tensor(0.1, dtype=torch.float64)}),
    "SGD": (SGD, {"beta2": 0.99}),
    "SGD with momentum": (SGD, {"momentum": 0.9, "weight_decay": 0.1, "beta2": 0.8}),
    "SGD with Nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "beta2": 0.99}),
}
over_cases = pytest.mark.parametrize(("base", "options"), CASES.values(), ids=CASES)


@over_cases
@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
@pytest.mark.parametrize("backend", ["foreach", "reference", "native"])
def test_steps_are_those_of_the_equations(base, options, step, backend):
    if backend not in BACKENDS or (backend == "native" and not _has_native()):
        pytest.skip("the native backend is not built")
    problem, opt = make(base, backend=backend, **options)
    twin = Problem()
    equations = Equations(twin, base, **{k: v for k, v in options.items() if k not in ("fused", "foreach", "lr")})
    for _ in range(4):
        step(opt, problem)
        equations.step()
    # float64, and four adaptive steps that pass the rounding of gradients on as relative errors.
    assert_params_close(problem.params, twin.params, rtol=1e-11, atol=1e-12)
    assert float(opt.param_groups[0]["retain_mean_sq"]) == pytest.approx(float(equations.mean), rel=1e-11)


def _has_native():
    from blur_optim.kernels.select import why_not

    return not why_not("native", torch.device("cpu"))


@pytest.mark.parametrize("rule", ["blur", "retain_first", "conflict", "barrier", "weighted_sum", "normalized"])
def test_every_rule_works_in_the_metric(rule):
    problem, opt = make(rule=rule)
    twin = Problem()
    equations = Equations(twin, AdamW, rule=rule)
    for _ in range(3):
        step_by_closures(opt, problem)
        equations.step()
    assert_params_close(problem.params, twin.params, rtol=1e-11, atol=1e-12)


def test_the_identity_of_gamma():
    """<g_f, P u> = gamma s <g_f, P g_f> whatever the retain gradient is: the forget loss of the step that is taken."""
    problem, opt = make()
    step_by_closures(opt, problem)
    problem, opt = make()
    equations = Equations(problem, AdamW)
    equations.step()
    f, p, u = equations.f, equations.p, equations.u
    s = 1 / (p * f).square().mean().sqrt()
    assert float(f @ (p * u)) == pytest.approx(float(0.7 * s * (f @ (p * f))), rel=1e-12)
    assert float((p * (0.7 * s * f)).square().mean().sqrt()) == pytest.approx(0.7, rel=1e-12)


@backends
def test_the_scale_of_the_forget_loss_does_not_matter(backend):
    problem, opt = make(backend=backend)
    twin, other = make(backend=backend)
    for _ in range(3):
        step_by_closures(opt, problem)
        other.step(lambda: 1024 * twin.forget_loss(), twin.retain_loss)
    assert_params_close(problem.params, twin.params, rtol=1e-11, atol=1e-12)


@backends
def test_a_vanishing_forget_gradient_fades(backend):
    """Below the floor the forget term is proportional to the gradient; at zero the step is AdamW's on g_r."""
    problem, opt = make(backend=backend, damping=0.0, weight_decay=0.0, rule="weighted_sum")
    twin = Problem()
    plain = AdamW(twin.params, lr=0.1, weight_decay=0.0)
    for factor in (0.0, 1e-30):
        opt.step(lambda factor=factor: factor * problem.forget_loss(), problem.retain_loss)
        twin.retain_loss().backward()
        plain.step()
        plain.zero_grad()
        assert float(opt.statistics.forget_coefficient[0]) <= 0.7 / SMALLEST_RMS * 1.01
        # The floor leaves 1e-22 of the term; m and the denominator are AdamW's but for the order of operations.
        assert_params_close(problem.params, twin.params, rtol=1e-10, atol=1e-10)
    assert_params_close(
        [opt.state[p]["exp_avg_sq"] for p in problem.params],
        [plain.state[p]["exp_avg_sq"] for p in twin.params],
        rtol=1e-12,
        atol=1e-20,
    )


def test_nothing_to_retain_is_harmless():
    problem, opt = make()
    opt.step(problem.forget_loss, lambda: None)
    assert all(p.isfinite().all() for p in problem.params)
    assert int(opt.statistics.skipped) == 0


@backends
@pytest.mark.parametrize("stash", ["bfloat16", "int8", "cpu"])
def test_stashes(stash, backend):
    problem, opt = make(stash=stash, backend=backend)
    twin, other = make(stash="reference", backend=backend)
    for _ in range(2):
        step_by_closures(opt, problem)
        step_by_closures(other, twin)
    # What a stash rounds away is at most 1/254 of the largest element.
    assert_params_close(problem.params, twin.params, rtol=0, atol=5e-3 if stash != "cpu" else 0.0)


def test_what_the_metric_refuses():
    problem = Problem()
    with pytest.raises(ValueError, match="`stash` must not be 'recompute' with metric='retain'"):
        BLUR(problem.params, metric="retain", stash="recompute")
    with pytest.raises(TypeError, match="must be AdamW, Adam or SGD with metric='retain', got Adagrad"):
        BLUR(problem.params, torch.optim.Adagrad, metric="retain")
    with pytest.raises(ValueError, match="`capturable` must be False"):
        BLUR(problem.params, AdamW, metric="retain", capturable=True)
    with pytest.raises(ValueError, match="`differentiable` must be False"):
        BLUR(problem.params, SGD, metric="retain", differentiable=True)
    with pytest.raises(ValueError, match="`eps` must be 1e-30 or more"):
        BLUR(problem.params, AdamW, metric="retain", eps=0.0)
    with pytest.raises(ValueError, match=r"`metric` must be one of \['euclidean', 'retain'\], got 'fisher'"):
        BLUR(problem.params, metric="fisher")
    with pytest.raises(ValueError, match="`damping` must be finite and >= 0"):
        BLUR(problem.params, metric="retain", damping=-1.0)
    with pytest.raises(ValueError, match=r"`metric_beta` must be a number in \[0, 1\), got 1.5"):
        BLUR([{"params": problem.params, "metric_beta": 1.5}], SGD, metric="retain", lr=0.1)
    opt = BLUR(problem.params, metric="retain")
    problem.forget_loss().backward()
    with pytest.raises(RuntimeError, match=r"opt\.step\(\) must have phases before it with metric='retain'"):
        opt.step()
