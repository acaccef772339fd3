"""Steps that cannot move anything: BLUR knows, and says so."""

import copy
import warnings

import pytest
import torch
from helpers import Problem, step_by_closures, step_by_phases
from torch.optim import SGD

from blur_optim import BLUR

NOTHING = (
    r"BLUR took a step, but neither phase left a gradient on any of its parameters.*an adapter loaded for inference"
)
ZERO = r"BLUR took a step, but the forget gradient is zero everywhere.*Is every label masked"


def make(problem, **options):
    return BLUR(problem.params, SGD, lr=0.1, **options)


@pytest.mark.parametrize("side", ["forget", "retain"])
@pytest.mark.parametrize("stash", ["reference", "recompute"])
def test_the_loss_of_another_model_is_refused(side, stash):
    problem, other = Problem(), Problem()
    opt = make(problem, stash=stash)
    before = copy.deepcopy(problem.params)
    losses = {"forget": problem.forget_loss, "retain": problem.retain_loss, side: getattr(other, f"{side}_loss")}
    with pytest.raises(
        RuntimeError, match=rf"`{side}` must return a loss of this optimizer's parameters.*\(4 of 4 req"
    ):
        opt.step(losses["forget"], losses["retain"])
    assert all(torch.equal(p, b) for p, b in zip(problem.params, before, strict=True))
    step_by_closures(opt, problem)  # The next step can begin.


def test_nothing_is_trainable():
    problem = Problem()
    opt = make(problem)
    for p in problem.params:
        p.requires_grad_(False)
    x = torch.ones(1, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"reached none of them \(0 of 4 require grad\)"):
        opt.step(lambda: problem.forget_loss() + x.sum(), problem.retain_loss)


def test_both_phases_empty_are_said_once():
    problem = Problem()
    opt = make(problem)

    def empty_phases():
        with opt.forget():
            pass
        with opt.retain():
            pass
        opt.step()
        opt.zero_grad()

    with pytest.warns(UserWarning, match=NOTHING):
        empty_phases()
    empty_phases()  # pytest makes an error of a second warning.
    opt.step(lambda: None, lambda: None)


def test_two_closures_of_nothing():
    with pytest.warns(UserWarning, match=NOTHING):
        make(Problem()).step(lambda: None, lambda: None)


def test_a_forget_loss_that_says_nothing():
    """As NLL is where every label is masked: a gradient, and all of it zero."""
    problem = Problem()
    opt = make(problem)
    with pytest.warns(UserWarning, match=ZERO):
        opt.step(lambda: problem.forget_loss() * 0, problem.retain_loss)
    opt.step(lambda: problem.forget_loss() * 0, problem.retain_loss)


@pytest.mark.parametrize("step", [step_by_closures, step_by_phases], ids=["closures", "phases"])
def test_no_word_where_something_moves(step):
    problem = Problem()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(make(problem), problem)
        make(problem).step(lambda: None, problem.retain_loss)  # Nothing to forget in this step: that is allowed.
