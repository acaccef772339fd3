"""Steps in the metric of the retain loss against the equations, written down once more in float64."""

import pytest
import torch
from helpers import Problem, assert_params_close, backends, run_phases, step_by_closures, step_by_phases
from metric_equations import CASES, DAMPING, EPS, Equations, make
from torch import nn
from torch.optim import SGD, AdamW

from blur_optim import BLUR
from blur_optim.kernels import BACKENDS
from blur_optim.step.metric import SMALLEST_RMS

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


class Against(Problem):
    """The two gradients oppose each other, where those of ``Problem`` agree."""

    def retain_loss(self, part=0, parts=1):
        return -super().retain_loss(part, parts)


SMALL_GAMMA = 0.1  # So small that the barrier has something to hold back.
agreeing_or_not = pytest.mark.parametrize("kind", [Problem, Against])


@agreeing_or_not
@pytest.mark.parametrize("rule", ["blur", "retain_first", "conflict", "barrier", "weighted_sum", "normalized"])
def test_every_rule_works_in_the_metric(rule, kind):
    problem, opt = make(rule=rule, gamma=SMALL_GAMMA, kind=kind)
    twin = kind()
    equations = Equations(twin, AdamW, rule=rule, gamma=SMALL_GAMMA)
    for _ in range(3):
        step_by_closures(opt, problem)
        equations.step()
    assert_params_close(problem.params, twin.params, rtol=1e-11, atol=1e-12)


# What a rule makes of unit gradients, by their cosine, gamma and alpha.
OF_UNIT_GRADIENTS = {
    "blur": lambda c, gamma, alpha: (gamma - alpha * c, alpha),
    "retain_first": lambda c, gamma, alpha: (gamma, alpha - gamma * c),
    "conflict": lambda c, gamma, alpha: (gamma - alpha * min(c, 0.0), alpha),
    "barrier": lambda c, gamma, alpha: (max(gamma - alpha * c, 0.0), alpha),
    "weighted_sum": lambda c, gamma, alpha: (gamma, alpha),
}


@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
@agreeing_or_not
@pytest.mark.parametrize("rule", OF_UNIT_GRADIENTS)
def test_unit_gradients_are_those_of_the_metric(rule, kind, step):
    """The rule sees the cosine in the metric; s, by which g_f is scaled before it is divided by its norm, is gone."""

    class Normalized(Equations):
        def coefficients(self, f, r, p):
            norms = (f @ (p * f)).sqrt(), (r @ (p * r)).sqrt()
            a, b = OF_UNIT_GRADIENTS[rule](r @ (p * f) / norms[0] / norms[1], self.gamma, self.alpha)
            return a / norms[0], b / norms[1]

    problem, opt = make(rule=rule, normalize=True, gamma=SMALL_GAMMA, retain_weight=1.3, kind=kind)
    twin = kind()
    equations = Normalized(twin, AdamW, gamma=SMALL_GAMMA, alpha=1.3)
    for _ in range(3):
        step(opt, problem)
        equations.step()
    assert_params_close(problem.params, twin.params, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [{"normalize": True}, {"rule": "normalized"}], ids=str)
def test_with_unit_gradients_gamma_is_the_length_of_the_step_below_the_floor_too(options):
    problem, opt = make(retain_weight=0.0, weight_decay=0.0, **options)
    before = [p.detach().clone() for p in problem.params]
    equations = Equations(Problem(), AdamW)
    equations.step()
    opt.step(lambda: 1e-25 * problem.forget_loss(), problem.retain_loss)
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(problem.params, before, strict=True)])
    assert float((moved.square() / equations.p).sum().sqrt()) == pytest.approx(0.7 * 0.1, rel=1e-10)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_rule_of_ones_own_sees_the_dots_in_the_metric(normalize):
    """The shortest vector between the two weighted gradients, as in MGDA: in the metric, of P^(1/2) g."""
    seen, expected = [], []

    def shortest(dots, gamma, alpha):
        seen.append([float(x) for x in (*dots, gamma, alpha)])
        rf, ff, rr = gamma * alpha * dots[0], gamma**2 * dots[1], alpha**2 * dots[2]
        t = (rr - rf) / (ff + rr - 2 * rf)
        return gamma * t, float(alpha * (1 - t))

    class Shortest(Equations):
        def coefficients(self, f, r, p):
            x, y = p.sqrt() * f, p.sqrt() * r
            c, d = (1 / x.norm(), 1 / y.norm()) if normalize else (1 / (p * f).square().mean().sqrt(), 1.0)
            expected.append([float(value) for value in (c * d * x @ y, c * c * x @ x, d * d * y @ y, 0.7, 1.3)])
            between = 1.3 * d * y - 0.7 * c * x
            t = float(1.3 * d * y @ between / between.square().sum())
            assert 0.05 < t < 0.95
            return 0.7 * t * c, 1.3 * (1 - t) * d

    problem, opt = make(rule=shortest, normalize=normalize, retain_weight=1.3)
    twin = Problem()
    equations = Shortest(twin, AdamW)
    for _ in range(3):
        step_by_closures(opt, problem)
        equations.step()
    assert_params_close(problem.params, twin.params, rtol=1e-11, atol=1e-12)
    assert len(seen) == 3
    for mine, theirs in zip(seen, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-10)


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
    with pytest.raises(TypeError, match="must be AdamW, Adam or SGD with metric='retain', got torch's Adagrad"):
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


@backends
@pytest.mark.parametrize(("base", "options"), [(AdamW, {}), (SGD, {"momentum": 0.9, "beta2": 0.8})])
def test_clipped_steps_by_closures_are_those_of_the_equations(base, options, backend):
    """The update is clipped, in the Euclidean norm, and not what v sees; below the limit nothing is."""
    limit = 1.5
    problem, opt = make(base, max_grad_norm=limit, backend=backend, **options)
    twin = Problem()
    equations = Equations(twin, base, max_grad_norm=limit, **options)
    norms = []
    for _ in range(5):
        step_by_closures(opt, problem)
        equations.step()
        norms.append(float(equations.u.norm()))
        assert float(opt.statistics.update_norm) == pytest.approx(norms[-1], rel=1e-10)
    assert {norm > 0.999 * limit for norm in norms} == {True, False}
    assert_params_close(problem.params, twin.params, rtol=1e-11, atol=1e-12)


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
