"""In the metric, a step that is not taken after its retain phase: v has seen the retain gradient, nothing else has."""

import io
from functools import partial

import pytest
import torch
from helpers import (
    Problem,
    assert_params_close,
    assert_same_bits,
    run_phases,
    snapshot,
    step_by_closures,
    step_by_phases,
)
from metric_equations import Equations, make
from torch.optim import SGD, AdamW

from blur_optim.step.metric import AHEAD


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
