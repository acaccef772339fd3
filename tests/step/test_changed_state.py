"""A state that the user changes or loads between two steps, or within one."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import (
    NO_NATIVE,
    Problem,
    assert_params_close,
    assert_same_bits,
    backends,
    run_phases,
    snapshot,
    step_by_closures,
    step_by_phases,
)
from metric_equations import make
from torch.optim import SGD, Adam, AdamW

import blur_optim
from blur_optim import BLUR
from blur_optim.step.fused import FusedStep

steps = pytest.mark.parametrize("step", [step_by_closures, step_by_phases])

# -- Another dtype ----------------------------------------------------------------------------------------------------


def halve(opt, problem):
    for p in problem.params:
        moment = opt.state[p]["exp_avg"]
        moment.data = moment.data.bfloat16()  # The same object, in which the fit is remembered.


@pytest.mark.skipif(bool(NO_NATIVE), reason=NO_NATIVE)
def test_a_moment_that_was_given_another_dtype_takes_the_plain_path(monkeypatch):
    reasons, why_not = [], FusedStep.why_not
    monkeypatch.setattr(FusedStep, "why_not", lambda *args: reasons.append(why_not(*args)) or reasons[-1])
    problem = Problem(torch.float32)
    opt = BLUR(problem.params, SGD, lr=0.1, momentum=0.9, backend="native")
    for _ in range(3):
        step_by_closures(opt, problem)
    for p in problem.params:
        buffer = opt.state[p]["momentum_buffer"]
        buffer.data = buffer.data.bfloat16()
    step_by_closures(opt, problem)
    assert reasons[:3] == ["", "", ""]
    assert "unusual dtype" in reasons[3]


@backends
def test_in_the_metric_it_is_stepped_by_foreach(backend):
    """As where the optimizer is new, so that nothing is remembered."""
    problem, opt = make(AdamW, torch.float32, backend=backend)
    for _ in range(3):
        step_by_closures(opt, problem)
    halve(opt, problem)
    twin, other = copy.deepcopy((problem, opt))
    step_by_closures(opt, problem)
    step_by_closures(other, twin)
    assert_same_bits(snapshot(opt), snapshot(other))


# -- amsgrad that comes later -----------------------------------------------------------------------------------------


@backends
@steps
@pytest.mark.parametrize("is_new_one_there", [False, True])
def test_amsgrad_after_the_state_was_made_is_refused_in_the_metric(backend, step, is_new_one_there):
    problem = Problem()
    late = problem.params[-1:] if is_new_one_there else []
    for p in late:
        p.requires_grad_(False)  # Without a state of its own yet.
    groups = [{"params": problem.params[:1]}, {"params": problem.params[1:]}]
    opt = BLUR(groups, AdamW, lr=0.1, metric="retain", backend=backend)
    for _ in range(2):
        step(opt, problem)
    for p in late:
        p.requires_grad_(True)
    opt.param_groups[1]["amsgrad"] = True
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match=r"`amsgrad` must be False .* got True: there is no `max_exp_avg_sq`"):
        step(opt, problem)
    assert_same_bits(snapshot(opt), before)
    for p in opt.param_groups[1]["params"]:  # The remedy.
        if p in opt.state:
            opt.state[p]["max_exp_avg_sq"] = opt.state[p]["exp_avg_sq"].clone()
    step(opt, problem)
    assert [int(opt.state[p]["step"]) for p in problem.params] == [3, 3, 3, 1 if late else 3]


def test_amsgrad_between_the_retain_phase_and_the_step_is_refused_too():
    problem, opt = make()
    run_phases(opt, problem)
    opt.param_groups[0]["amsgrad"] = True
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="`amsgrad` must be False"):
        opt.step()
    assert_same_bits(snapshot(opt), before)


@backends
@pytest.mark.parametrize("base", [Adam, AdamW])
def test_amsgrad_after_the_state_was_made_is_what_torch_says(base, backend):
    problem = Problem()
    opt = BLUR(problem.params, base, lr=0.1, backend=backend)
    for _ in range(2):
        step_by_closures(opt, problem)
    opt.param_groups[0]["amsgrad"] = True
    before = snapshot(opt)
    with pytest.raises(KeyError, match="max_exp_avg_sq"):
        step_by_closures(opt, problem)
    assert_same_bits(snapshot(opt), before)


# -- A state that is loaded within a step -----------------------------------------------------------------------------


def of_a_fresh_one():
    return BLUR(Problem().params, AdamW, lr=0.1, metric="retain").state_dict()


def of_adamw():
    problem = Problem()
    base = AdamW(problem.params, lr=0.1)
    problem.retain_loss().backward()
    base.step()
    return base.state_dict()


def of_the_metric():
    problem, opt = make()
    step_by_closures(opt, problem)
    return opt.state_dict()


@pytest.mark.parametrize("state", [of_a_fresh_one, of_adamw, of_the_metric])
@pytest.mark.filterwarnings("ignore:`exp_avg_sq` in this optimizer's state is not the second moment")
def test_a_state_that_is_loaded_over_an_update_drops_it(state):
    """Else the step would go by a v that has not seen that retain gradient as by one that has."""
    problem, opt = make()
    twin, other = make()
    step_by_phases(opt, problem)
    step_by_phases(other, twin)
    run_phases(opt, problem)
    loaded = state()
    with pytest.warns(UserWarning, match=r"load_state_dict\(\) must not come between .* It has been dropped") as told:
        opt.load_state_dict(copy.deepcopy(loaded))
    assert told[0].filename == __file__
    other.load_state_dict(copy.deepcopy(loaded))
    assert all(p.grad is None for p in problem.params)
    opt.step()  # There is nothing to step on.
    for _ in range(2):
        step_by_phases(opt, problem)
        step_by_phases(other, twin)
    assert_same_bits(snapshot(opt), snapshot(other))


@pytest.mark.filterwarnings("error")
def test_a_state_that_is_loaded_after_the_step_says_nothing():
    problem, opt = make()
    run_phases(opt, problem)
    opt.step()
    opt.load_state_dict(of_the_metric())
    opt.zero_grad()
    step_by_phases(opt, problem)
    problem.model.zero_grad()
    with opt.forget():
        opt.load_state_dict(of_the_metric())
        problem.forget_loss().backward()
    with opt.retain():
        problem.retain_loss().backward()
    opt.step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_plain_sgd_lets_go_of_all_that_is_of_the_metric(momentum):
    problem, opt = make(SGD, momentum=momentum)
    step_by_closures(opt, problem)
    twin = Problem()
    plain = BLUR(twin.params, SGD, lr=0.1, momentum=momentum)
    with pytest.warns(UserWarning, match=r"metric='retain': its learning rate was in units of the metric"):
        plain.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert not {"metric_beta", "retain_mean_sq"} & plain.param_groups[0].keys()
    assert all(state.keys() <= {"momentum_buffer"} for state in plain.state.values())
    if momentum:
        bare = SGD(problem.params, lr=0.1, momentum=momentum)
        bare.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert_params_close(
            [plain.state[p]["momentum_buffer"] for p in twin.params],
            [bare.state[p]["momentum_buffer"] for p in problem.params],
            rtol=0,
            atol=0,
        )
    step_by_closures(plain, twin)


def test_the_warning_of_a_state_of_plain_gradients_is_not_of_a_line_of_ours():
    problem, opt = make()
    opt.load_state_dict(of_adamw())
    with pytest.warns(UserWarning, match="`exp_avg_sq` in this optimizer's state is not the second moment") as told:
        opt.step(problem.forget_loss, problem.retain_loss)
    assert not Path(told[0].filename).is_relative_to(Path(blur_optim.__file__).parent)
