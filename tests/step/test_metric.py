"""Steps in the metric of the retain loss against the equations, written down once more in float64."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from helpers import (
    Problem,
    assert_params_close,
    assert_same_bits,
    backends,
    run_phases,
    snapshot,
    step_by_closures,
    step_by_phases,
)
from torch import nn
from torch.optim import SGD, Adam, AdamW

from blur_optim import BLUR
from blur_optim.kernels import BACKENDS
from blur_optim.step.metric import SMALLEST_RMS
from blur_optim.step.metric_pairs import AHEAD

DAMPING, EPS = 0.05, 1e-8


class Equations:
    """The method as docs/method.md has it, on flat vectors, one step after another."""

    def __init__(self, problem, base, gamma=0.7, alpha=1.0, rule="blur", lr=0.1, beta2=None, **options):
        self.problem, self.base, self.gamma, self.alpha, self.rule, self.lr = problem, base, gamma, alpha, rule, lr
        self.options = options
        self.beta1 = options.get("betas", (0.9, 0.999))[0] if base is not SGD else options.get("momentum", 0.0)
        self.beta2 = beta2 if beta2 is not None else options.get("betas", (0.9, 0.999))[1]
        self.m = self.v = self.vmax = 0.0
        self.mean, self.t, self.seen = None, 0, 0

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

    def see(self, r):
        """v, v-hat and the mean that damps, of a retain gradient that is seen, whether a step follows or not."""
        self.seen += 1
        self.v = self.beta2 * self.v + (1 - self.beta2) * r.square()
        second = self.v
        if self.options.get("amsgrad"):
            self.vmax = second = torch.maximum(torch.as_tensor(self.vmax), self.v)
        corrected = second / (1 - self.beta2**self.seen)
        mean = corrected.mean() if self.mean is None else self.mean
        self.mean = corrected.mean()
        return corrected, mean

    def step(self):
        f, r = self.gradients()
        self.t += 1
        o = self.options
        corrected, mean = self.see(r)
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


@pytest.mark.filterwarnings("ignore:BLUR took a step, but the forget gradient is zero everywhere")
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


# -- Phases, mixed precision, checkpoints ------------------------------------------------------------------------------


def test_accumulation():
    problem, opt = make()
    twin, other = make()
    for _ in range(3):
        step_by_phases(opt, problem, parts=3)
        step_by_phases(other, twin)
    assert_params_close(problem.params, twin.params, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("base", [AdamW, partial(AdamW, fused=True), partial(SGD, momentum=0.9)], ids=str)
def test_a_gradient_scaler_changes_no_bit(base):
    """A scale that is a power of two: dots, v and the update are those without it."""
    problem, opt = make(base, torch.float32)
    twin, other = make(base, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        with opt.forget():
            scaler.scale(problem.forget_loss()).backward()
        with opt.retain(grad_scale=scaler):
            scaler.scale(problem.retain_loss()).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        step_by_phases(other, twin)
        assert opt.statistics.to_dict() == other.statistics.to_dict()
    assert_same_bits(snapshot(opt), snapshot(other))


# By which a step is not taken after its retain phase.
def by_zero_grad(opt, problem):
    run_phases(opt, problem)
    opt.zero_grad()


def by_an_overflow(opt, problem):
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with opt.forget():
        scaler.scale(problem.forget_loss()).backward()
    with opt.retain(grad_scale=scaler):
        scaler.scale(problem.retain_loss()).backward()
    problem.params[0].grad[0, 0] = torch.inf  # In the update alone, as where only it leaves the range of float16.
    scaler.step(opt)
    opt.zero_grad()


drops = pytest.mark.parametrize("drop", [by_zero_grad, by_an_overflow])
over_some_bases = pytest.mark.parametrize(
    "base", [AdamW, partial(AdamW, fused=True), partial(SGD, momentum=0.9)], ids=["AdamW", "fused", "SGD"]
)


@drops
@over_some_bases
@pytest.mark.parametrize("dropped", [(0,), (0, 1, 3), (2,)], ids=str)
def test_a_step_that_is_dropped_has_fed_v_and_nothing_else(base, drop, dropped):
    """m, the parameters and the steps taken are as before; v has seen g_r, and is corrected for what it has seen."""
    beta2 = {"beta2": 0.8} if isinstance(base, partial) and base.func is SGD else {"betas": (0.9, 0.8)}
    problem, opt = make(base, **beta2)
    twin = Problem()
    kind = SGD if "beta2" in beta2 else AdamW
    equations = Equations(twin, kind, **beta2, **({"momentum": 0.9} if kind is SGD else {}))
    for i in range(5):
        if i in dropped:
            drop(opt, problem)
            equations.see(equations.gradients()[1])
        else:
            step_by_phases(opt, problem)
            equations.step()
        assert_params_close(problem.params, twin.params, rtol=1e-11, atol=1e-12)
        assert {int(opt.state[p]["step"]) for p in problem.params} == {equations.t}
        assert {int(opt.state[p][AHEAD]) for p in problem.params} == {equations.seen - equations.t}
    step_by_closures(opt, problem)
    equations.step()
    assert_params_close(problem.params, twin.params, rtol=1e-11, atol=1e-12)


@over_some_bases
@pytest.mark.parametrize("when", ["after a dropped step", "between its retain phase and the step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_that_is_resumed_beside_a_dropped_step_has_the_same_bits(base, when, dtype):
    problem, opt = make(base, dtype)
    step_by_phases(opt, problem)
    run_phases(opt, problem)
    if when == "after a dropped step":
        opt.zero_grad()
    file = io.BytesIO()
    torch.save([opt.state_dict(), problem.model.state_dict()], file)
    opt.zero_grad()
    file.seek(0)
    state, weights = torch.load(file)
    twin, other = make(base, dtype)
    twin.model.load_state_dict(weights)
    other.load_state_dict(state)
    for step in (step_by_phases, step_by_closures):
        step(opt, problem)
        step(other, twin)
        assert {int(other.state[p][AHEAD]) for p in twin.params} == {1}
        assert_same_bits(snapshot(other), snapshot(opt))


def test_a_gradient_that_neither_phase_has_left_is_refused():
    problem, opt = make()
    head = problem.params[3]
    head.requires_grad_(False)
    run_phases(opt, problem)
    head.grad = torch.ones_like(head)
    with pytest.raises(RuntimeError, match=r"p\.grad must hold the update alone when opt\.step\(\) is called"):
        opt.step()


def test_the_scale_has_to_be_told():
    problem, opt = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with opt.forget():
        scaler.scale(problem.forget_loss()).backward()
    with opt.retain():
        scaler.scale(problem.retain_loss()).backward()
    with pytest.raises(RuntimeError, match="must know the loss scale"):
        scaler.step(opt)


@backends
@pytest.mark.parametrize("base", [AdamW, partial(AdamW, fused=True), partial(SGD, momentum=0.9)], ids=str)
@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
@pytest.mark.parametrize("first", [0, 2], ids=["first-step", "later-step"])
def test_a_gradient_that_is_not_finite_skips_the_step(base, backend, step, first):
    problem, opt = make(base, backend=backend)
    twin, other = make(base, backend=backend)
    for _ in range(first):
        step(opt, problem)
        step(other, twin)
    whole = problem.retain_loss
    before = snapshot(opt)
    problem.retain_loss = lambda *parts: whole(*parts) * float("inf")
    step(opt, problem)
    after = snapshot(opt)
    if first:
        assert_same_bits(after, before)
    else:  # The state is there, as torch makes it before it skips.
        assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("parameter"))
        assert all(not value.any() for name, value in after.items() if name.startswith(("exp_avg", "step")))
    assert int(opt.statistics.skipped) == 1
    problem.retain_loss = whole
    for _ in range(2):
        step(opt, problem)
        step(other, twin)
    assert_same_bits(snapshot(opt), snapshot(other))


def test_an_error_in_the_rule_leaves_everything_as_it_was():
    problem, opt = make(rule=lambda dots, gamma, alpha: (_ for _ in ()).throw(ValueError("mine")))
    before = snapshot(opt)
    with pytest.raises(ValueError, match="mine"):
        step_by_closures(opt, problem)
    assert snapshot(opt).keys() == before.keys()
    assert not opt.state


@pytest.mark.parametrize("base", [AdamW, partial(AdamW, fused=True, amsgrad=True), partial(SGD, momentum=0.9)], ids=str)
@pytest.mark.parametrize("how", ["state dict", "pickle", "deepcopy"])
def test_a_resumed_run_has_the_same_bits(base, how):
    problem, opt = make(base, torch.float32)
    for _ in range(3):
        step_by_closures(opt, problem)
    if how == "state dict":
        file = io.BytesIO()
        torch.save([opt.state_dict(), problem.model.state_dict()], file)
        file.seek(0)
        state, weights = torch.load(file)
        twin, other = make(base, torch.float32)
        twin.model.load_state_dict(weights)
        other.load_state_dict(state)
    else:
        twin, other = copy.deepcopy((problem, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((problem, opt)))
    for _ in range(2):
        step_by_closures(opt, problem)
        step_by_closures(other, twin)
    assert_same_bits(snapshot(other), snapshot(opt))


def test_checkpoints_of_the_other_metric_load_with_a_warning():
    problem, opt = make()
    step_by_closures(opt, problem)
    plain_problem = Problem()
    plain = BLUR(plain_problem.params, AdamW, lr=0.1)
    step_by_closures(plain, plain_problem)
    of_plain, of_metric = copy.deepcopy(plain.state_dict()), copy.deepcopy(opt.state_dict())
    with pytest.warns(UserWarning, match="comes from a run with metric='retain'"):
        plain.load_state_dict(of_metric)
    assert "retain_mean_sq" not in plain.param_groups[0]
    step_by_closures(plain, plain_problem)
    opt.load_state_dict(of_plain)
    with pytest.warns(UserWarning, match="`exp_avg_sq` in this optimizer's state is not the second moment"):
        step_by_closures(opt, problem)
    step_by_closures(opt, problem)  # Said once.
    bare = AdamW(Problem().params, lr=0.1)
    bare.load_state_dict(of_metric)  # As torch does it: what it does not know stays in the groups.


def test_groups_with_betas_and_rates_of_their_own_and_one_added_later():
    problem = Problem()
    groups = [{"params": problem.params[:2], "betas": (0.8, 0.9), "lr": 0.05}, {"params": problem.params[2:3]}]
    opt = BLUR(groups, AdamW, lr=0.1, metric="retain")
    step_by_closures(opt, problem)
    problem.params[3].grad = None  # The loss reached it, the optimizer did not.
    opt.add_param_group({"params": problem.params[3:]})
    step_by_closures(opt, problem)
    assert [int(opt.state[p]["step"]) for p in problem.params] == [2, 2, 2, 1]
    v = opt.state[problem.params[3]]["exp_avg_sq"]
    assert v.any()
    means = {float(group["retain_mean_sq"]) for group in opt.param_groups}
    assert len(means) == 1
    corrected = [
        opt.state[p]["exp_avg_sq"] / (1 - group["betas"][1] ** opt.state[p]["step"].double())
        for group in opt.param_groups
        for p in group["params"]
    ]
    assert means.pop() == pytest.approx(float(torch.cat([c.flatten() for c in corrected]).mean()), rel=1e-12)


@backends
def test_parameters_without_one_gradient_or_both(backend):
    """v of what has no retain gradient decays; what has none at all is left alone."""
    problem, opt = make(backend=backend)
    step_by_closures(opt, problem)
    head, v = problem.params[2], opt.state[problem.params[2]]["exp_avg_sq"].clone()
    problem.params[0].requires_grad_(False)
    frozen = problem.params[0].clone()
    opt.step(problem.forget_loss, lambda: problem.params[1].square().sum())
    assert torch.allclose(opt.state[head]["exp_avg_sq"], 0.999 * v, rtol=1e-12)
    assert torch.equal(problem.params[0], frozen)
    assert int(opt.state[problem.params[0]]["step"]) == 1
    assert int(opt.state[head]["step"]) == 2


def test_complex_parameters_count_as_their_parts():
    parts = nn.Parameter(torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    whole = nn.Parameter(torch.view_as_complex(parts.detach().clone()))
    weights = torch.arange(8.0).view(4, 2).double()
    for p, view in ((parts, lambda: parts), (whole, lambda: torch.view_as_real(whole))):
        opt = BLUR([p], AdamW, lr=0.1, metric="retain")
        for _ in range(3):
            opt.step(lambda view=view: (view() * weights).sin().sum(), lambda view=view: (view() - 1).square().sum())
    torch.testing.assert_close(torch.view_as_real(whole.detach()), parts.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@backends
def test_other_dtypes_follow_float64(dtype, backend):
    problem, opt = make(dtype=dtype, backend=backend, lr=0.01)
    twin, other = make(lr=0.01)
    twin.forget_inputs, twin.retain_inputs = problem.forget_inputs.double(), problem.retain_inputs.double()
    with torch.no_grad():
        for p, q in zip(twin.params, problem.params, strict=True):
            p.copy_(q)
    for _ in range(3):
        step_by_closures(opt, problem)
        step_by_closures(other, twin)
    # The gradients are rounded to the dtype, and three adaptive steps of 0.01 pass that on in full at most.
    atol = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert_params_close([p.double() for p in problem.params], twin.params, rtol=0, atol=atol)


def test_hooks_see_the_update_and_run_once():
    problem, opt = make()
    twin, other = make()
    seen = []
    opt.register_step_pre_hook(lambda base, args, kwargs: seen.append([p.grad.clone() for p in problem.params]))
    opt.register_step_post_hook(lambda base, args, kwargs: seen.append("post"))
    step_by_closures(opt, problem)
    run_phases(other, twin)
    assert_params_close(seen[0], [p.grad for p in twin.params], rtol=1e-12, atol=1e-14)
    assert seen[1:] == ["post"]
    other.step()
    assert_params_close(problem.params, twin.params, rtol=1e-12, atol=1e-13)


def test_a_scheduler_on_the_base_knows_of_the_steps():
    problem = Problem()
    base = AdamW(problem.params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(base, 1)
    opt = BLUR(base=base, metric="retain")
    step_by_closures(opt, problem)
    scheduler.step()  # Warns where no step came before it.


def test_statistics_in_the_metric():
    problem, opt = make()
    opt.record_alignment = True
    twin = Problem()
    equations = Equations(twin, AdamW)
    step_by_closures(opt, problem)
    f, r = equations.gradients()
    equations.step()
    p = equations.p
    found = opt.statistics.to_dict()
    norms = (f @ (p * f)).sqrt(), (r @ (p * r)).sqrt()
    expected = {
        "forget_norm": f.norm(),
        "cosine": f @ r / f.norm() / r.norm(),
        "metric_forget_norm": norms[0],
        "metric_retain_norm": norms[1],
        "metric_cosine": r @ (p * f) / norms[0] / norms[1],
        "effective_share": (p * f).square().sum() ** 2 / (len(f) * (p * f).pow(4).sum()),
        "update_norm": equations.u.norm(),
    }
    assert {name: found[name] for name in expected} == pytest.approx({n: float(v) for n, v in expected.items()})
    assert opt.statistics.parameter_metric_cosines.shape == (4,)


def test_clipping_is_that_of_the_update_in_p_grad():
    problem, opt = make(max_grad_norm=0.1)
    twin, other = make()
    run_phases(opt, problem)
    run_phases(other, twin)
    nn.utils.clip_grad_norm_(twin.params, 0.1)
    assert_params_close([p.grad for p in problem.params], [p.grad for p in twin.params], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scope", ["group", "parameter"])
def test_scopes(scope):
    """Each row has its own scale and its own dots; the damping is that of all coordinates."""
    problem = Problem()
    groups = [{"params": problem.params[:2]}, {"params": problem.params[2:]}]
    opt = BLUR(groups, AdamW, lr=0.1, gamma=0.7, metric="retain", damping=DAMPING, scope=scope, weight_decay=0.0)
    twin = Problem()
    f, r = (torch.autograd.grad(loss, twin.params) for loss in (twin.forget_loss(), twin.retain_loss()))
    mean = torch.cat([x.flatten() for x in r]).square().mean()
    p = [1 / ((x.square() + DAMPING * mean).sqrt() + EPS) for x in r]
    rows = [(0, 1), (2, 3)] if scope == "group" else [(i,) for i in range(4)]
    for row in rows:
        fs, rs, ps = (torch.cat([tensors[i].flatten() for i in row]) for tensors in (f, r, p))
        s = 1 / (ps * fs).square().mean().sqrt()
        a = 0.7 * s - (rs @ (ps * fs)) / (fs @ (ps * fs))
        for i in row:
            with torch.no_grad():
                twin.params[i] -= 0.1 * p[i] * (a * f[i] + r[i])
    step_by_closures(opt, problem)
    assert_params_close(problem.params, twin.params, rtol=1e-11, atol=1e-12)
