"""A base made of several optimizers: one projection over the whole model, each part stepped in its own way."""

import copy
import pickle

import pytest
import torch
from helpers import Problem, assert_same_bits, snapshot, step_by_closures, step_by_phases, step_on
from torch.optim import SGD, AdamW, Muon
from torch.optim.lr_scheduler import StepLR

from blur_optim import BLUR, ChainedOptimizer


def muon_and_adamw(params, lr=0.1):
    params = list(params)
    return ChainedOptimizer(
        Muon([p for p in params if p.ndim == 2], lr=lr), AdamW([p for p in params if p.ndim != 2], lr=lr)
    )


@pytest.mark.parametrize("step", [step_by_closures, step_by_phases], ids=["closures", "phases"])
def test_one_projection_and_each_takes_its_part(step):
    problem, expected = Problem(), Problem()
    opt, bare = BLUR(problem.params, muon_and_adamw), muon_and_adamw(expected.params)
    for _ in range(3):
        step(opt, problem)
        step_on(bare, expected.params, expected.update())
    # float64: sums in another order.
    for p, q in zip(problem.params, expected.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert "momentum_buffer" in opt.state[problem.params[0]]
    assert "exp_avg" in opt.state[problem.params[1]]


def test_two_blurs_would_project_each_part_on_itself():
    """Why there is such a class: the coefficients of the parts are others than those of the whole."""
    whole, apart = Problem(), Problem()
    step_by_closures(BLUR(whole.params, SGD, lr=0.1), whole)
    one, two = (BLUR(apart.params[i::2], SGD, lr=0.1) for i in (0, 1))
    with one.forget(), two.forget():
        apart.forget_loss().backward()
    with one.retain(), two.retain():
        apart.retain_loss().backward()
    one.step()
    two.step()
    assert not torch.allclose(whole.params[0], apart.params[0], atol=1e-3)


def test_a_scheduler_and_weights_in_its_groups():
    problem = Problem()
    opt = BLUR(problem.params, muon_and_adamw)
    scheduler = StepLR(opt, 1, gamma=0.5)
    opt.param_groups[1]["gamma"] = 0.25
    step_by_closures(opt, problem)
    scheduler.step()
    assert [group["lr"] for group in opt.base.param_groups] == [0.05, 0.05]
    assert [optimizer.param_groups[0]["gamma"] for optimizer in opt.base.optimizers] == [1.0, 0.25]


@pytest.mark.parametrize("way", ["state dict", "pickle", "copy"])
def test_it_goes_on_as_if_never_interrupted(way):
    through, parts = Problem(), Problem()
    one, two = BLUR(through.params, muon_and_adamw), BLUR(parts.params, muon_and_adamw)
    for opt, problem in ((one, through), (two, parts)):
        step_by_closures(opt, problem)
        step_by_closures(opt, problem)
    if way == "state dict":
        resumed = Problem()
        with torch.no_grad():
            for p, q in zip(resumed.params, parts.params, strict=True):
                p.copy_(q)
        again = BLUR(resumed.params, muon_and_adamw, gamma=9.0)
        again.load_state_dict(pickle.loads(pickle.dumps(two.state_dict())))
    else:
        carry = (lambda x: pickle.loads(pickle.dumps(x))) if way == "pickle" else copy.deepcopy
        again, model = carry((two, parts.model))
        resumed = Problem()
        resumed.model, resumed.params = model, list(model.parameters())
    step_by_closures(one, through)
    step_by_closures(again, resumed)
    assert_same_bits(snapshot(again), snapshot(one))


def test_hooks_run_once():
    problem, calls = Problem(), []
    opt = BLUR(problem.params, muon_and_adamw)
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.base.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    step_by_closures(opt, problem)
    opt.load_state_dict(opt.state_dict())
    assert calls == ["before", "loaded"]


def test_a_closure_of_its_own():
    problem = Problem()
    base = muon_and_adamw(problem.params)
    assert base.step(lambda: 3.0) == 3.0


def test_a_group_goes_to_one_of_them():
    problem = Problem()
    opt = BLUR(problem.params[:2], muon_and_adamw)
    with pytest.raises(TypeError, match=r"`param_group` must be added to one of `optimizers`"):
        opt.add_param_group({"params": problem.params[2:3]})
    opt.base.optimizers[0].add_param_group({"params": problem.params[2:3]})
    assert len(opt.param_groups) == 3


def params():
    return [torch.nn.Parameter(torch.zeros(2, 2))]


SHARED = params()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ChainedOptimizer(), ValueError, "`optimizers` must hold at least one optimizer, got none"),
        (lambda: ChainedOptimizer(SGD(SHARED), AdamW(SHARED)), ValueError, "got some that belong to several"),
        (lambda: ChainedOptimizer(torch.optim.LBFGS(SHARED)), TypeError, "which LBFGS needs"),
        (
            lambda: ChainedOptimizer(SGD(params())).load_state_dict({"param_groups": [], "state": {}}),
            ValueError,
            r"must have the 1 param groups of all optimizers, got 0",
        ),
    ],
    ids=["none", "shared", "closure", "another state"],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
