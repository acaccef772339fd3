"""State in and out: files, copies, groups added later, distributed checkpoints; from and to the bare base optimizer."""

import copy
import pickle
from functools import partial

import pytest
import pytorch_optimizer
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
    step_on,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim import SGD, AdamW, lr_scheduler

from blur_optim import BLUR

# An exchanged state is continued with the bare optimizer's gradients in both.
pytestmark = pytest.mark.filterwarnings("ignore:opt.step\\(\\) had no phases before it:UserWarning")

BASES = {
    "AdamW": partial(AdamW, lr=0.1),
    "AdamW-fused": partial(AdamW, lr=0.1, fused=True),
    "SGD": partial(SGD, lr=0.1, momentum=0.9),
    "Lion": partial(pytorch_optimizer.Lion, lr=0.1),
}
# Lion loses attributes in a copy of its own, with or without BLUR around it.
COPYABLE = {name: base for name, base in BASES.items() if name != "Lion"}


def make(base=BASES["AdamW"], **options):
    problem = Problem()
    return problem, BLUR(problem.params, base, **options)


def make_bare(base=BASES["AdamW"]):
    problem = Problem()
    return problem, base(problem.params)


def trained(maker, base=BASES["AdamW"], steps=3, **options):
    """A model and optimizer after a few steps on the forget gradient, the same numbers for BLUR and the bare base."""
    problem, opt = maker(base, **options)
    for _ in range(steps):
        step_on(opt, problem.params, torch.autograd.grad(problem.forget_loss(), problem.params))
    return problem, opt


def through_file(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def states(opt):
    return {name: value for name, value in snapshot(opt).items() if not name.startswith("group")}


def assert_go_on_alike(problem, opt, other, other_opt):
    """Both optimizers take the same plain steps to the bit, so parameters and state were the same."""
    assert_same_bits(states(opt), states(other_opt))
    for p, o in ((problem, opt), (other, other_opt)):
        step_on(o, p.params, torch.autograd.grad(p.retain_loss(), p.params))
    assert_same_bits(states(opt), states(other_opt))


# -- state_dict --------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_resumed_training_equals_uninterrupted_training(base, step, backend, tmp_path):
    problem, opt = make(base, gamma=0.5, backend=backend)
    for _ in range(3):
        step(opt, problem)
    checkpoint = through_file({"model": problem.model.state_dict(), "opt": opt.state_dict()}, tmp_path / "last.pt")
    resumed, resumed_opt = make(base, backend=backend)
    resumed.model.load_state_dict(checkpoint["model"])
    resumed_opt.load_state_dict(state_dict=checkpoint["opt"])
    assert resumed_opt.param_groups[0]["gamma"] == 0.5  # As with every hyperparameter, the checkpoint's counts.
    for _ in range(3):
        step(opt, problem)
        step(resumed_opt, resumed)
    assert_same_bits(snapshot(resumed_opt), snapshot(opt))


EXCHANGES = [("BLUR to bare", make, make_bare), ("bare to BLUR", make_bare, make), ("BLUR to BLUR", make, make)]
exchanges = pytest.mark.parametrize(("giver", "taker"), [e[1:] for e in EXCHANGES], ids=[e[0] for e in EXCHANGES])


@exchanges
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_state_dicts_are_exchanged_with_the_bare_base(base, giver, taker, tmp_path):
    problem, opt = trained(giver, base)
    other, other_opt = taker(base)
    other.model.load_state_dict(problem.model.state_dict())
    other_opt.load_state_dict(through_file(opt.state_dict(), tmp_path / "opt.pt"))
    assert_go_on_alike(problem, opt, other, other_opt)
    other_opt.load_state_dict(copy.deepcopy(opt.state_dict()))  # Into an optimizer that has a state already.
    assert_go_on_alike(problem, opt, other, other_opt)


def test_weights_are_kept_where_the_state_dict_has_none():
    problem, twin = Problem(), Problem()
    groups = [{"params": problem.params[:2], "gamma": 0.25}, {"params": problem.params[2:], "retain_weight": 0.5}]
    opt = BLUR(groups, AdamW, lr=0.1, gamma=3.0)
    bare = AdamW([{"params": twin.params[:2]}, {"params": twin.params[2:]}], lr=0.7)
    opt.load_state_dict(bare.state_dict())
    assert [(g["lr"], g["gamma"], g["retain_weight"]) for g in opt.param_groups] == [(0.7, 0.25, 1.0), (0.7, 3.0, 0.5)]


def test_a_state_dict_that_does_not_fit_changes_nothing():
    problem, opt = trained(make)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"different number of parameter groups"):
        opt.load_state_dict(BLUR([{"params": [p]} for p in problem.params]).state_dict())
    assert_same_bits(snapshot(opt), before)


# -- Copies ------------------------------------------------------------------------------------------------------------


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("scheduled", [False, True], ids=["plain", "scheduled"])
@pytest.mark.parametrize("moment", ["between steps", "between phases", "with the update in p.grad"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("base", COPYABLE.values(), ids=COPYABLE)
def test_copies_of_model_and_optimizer(base, copied, moment, scheduled):
    options = {
        "gamma": 0.5,
        "max_grad_norm": 1.0,
        "backend": "foreach",
    }  # So that closures and phases agree to the bit.
    problem, opt = make(base, **options)
    twin, twin_opt = make(base, **options)
    if scheduled:
        lr_scheduler.StepLR(opt, 1)  # It wraps opt.step in a function of its own.
    for o, p in ((opt, problem), (twin_opt, twin)):
        step_by_closures(o, p)
    if moment == "between steps":
        twin_copy, opt_copy = copied((problem, opt))
    elif moment == "between phases":
        with opt.forget():
            problem.forget_loss().backward()
        twin_copy, opt_copy = copied((problem, opt))
        with opt.retain():
            problem.retain_loss().backward()
    else:
        run_phases(opt, problem)
        twin_copy, opt_copy = copied((problem, opt))
    if moment != "between steps":
        opt.step()
        opt.zero_grad()
        step_by_closures(twin_opt, twin)
        assert_same_bits(states(opt), states(twin_opt))  # The copy took nothing from the original.
        step_by_closures(opt_copy, twin_copy)
        assert_same_bits(states(opt_copy), states(twin_opt))
    for o, p in ((opt, problem), (twin_opt, twin), (opt_copy, twin_copy)):
        step_by_phases(o, p)
    assert_same_bits(states(opt), states(twin_opt))
    assert_same_bits(states(opt_copy), states(twin_opt))
    assert torch.equal(opt_copy.statistics.update_norm, twin_opt.statistics.update_norm)


def test_a_copy_of_optimizer_and_scheduler_goes_on():
    problem, opt = make()
    scheduler = lr_scheduler.StepLR(opt, 1, gamma=0.5)
    step_by_closures(opt, problem)
    scheduler.step()
    problem, opt, scheduler = copy.deepcopy((problem, opt, scheduler))
    step_by_closures(opt, problem)
    scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.025


def test_a_copy_skips_and_counts_on():
    problem, opt = make(BASES["AdamW-fused"])
    opt.step(problem.forget_loss, lambda: problem.retain_loss() * float("nan"))
    problem, opt = copy.deepcopy((problem, opt))
    assert opt.statistics is None
    opt.step(problem.forget_loss, lambda: problem.retain_loss() * float("nan"))
    assert int(opt.statistics.skipped) == 2
    assert_same_bits({f"parameter 0.{i}": p for i, p in enumerate(problem.params)}, states(make()[1]))


# -- Groups and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [{}, {"gamma": 0.25}, {"gamma": 0.25, "retain_weight": 2.0}], ids=str)
def test_add_param_group(weights):
    problem = Problem()
    opt = BLUR(problem.params[:2], SGD, lr=0.1, gamma=0.5, scope="group")
    step_by_closures(opt, problem)
    problem.model.zero_grad()  # The rest has gradients too, which nobody reset.
    opt.add_param_group({"params": problem.params[2:], "lr": 0.01, **weights})
    gamma, alpha = weights.get("gamma", 0.5), weights.get("retain_weight", 1.0)
    f, r = (torch.autograd.grad(loss(), problem.params[2:]) for loss in (problem.forget_loss, problem.retain_loss))
    xi = gamma - alpha * sum((x * y).sum() for x, y in zip(f, r, strict=True)) / sum(x.square().sum() for x in f)
    expected = [p.detach() - 0.01 * (xi * x + alpha * y) for p, x, y in zip(problem.params[2:], f, r, strict=True)]
    step_by_closures(opt, problem)
    assert_params_close([p.detach() for p in problem.params[2:]], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    (problem, opt), (twin, twin_opt) = make(backend="foreach"), make(backend="foreach")
    for _ in range(3):
        run_phases(opt, problem)
        opt.step()
        opt.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) if set_to_none else (p.grad == 0).all() for p in problem.params)
        step_by_phases(twin_opt, twin)
    opt.step(problem.forget_loss, problem.retain_loss)  # Zeros are no gradients, so backward is called for it.
    step_by_closures(twin_opt, twin)
    assert_same_bits(snapshot(opt), snapshot(twin_opt))


def test_zeros_that_something_was_added_to_are_gradients():
    problem, opt = make()
    step_on(opt, problem.params, problem.update())
    problem.forget_loss().backward()
    opt.zero_grad(set_to_none=False)
    problem.forget_loss().backward()
    with pytest.raises(RuntimeError, match=r"p\.grad already holds gradients"):
        step_by_closures(opt, problem)


def test_named_parameters():
    problem, twin = Problem(), Problem()
    opt, twin_opt = BLUR(problem.model.named_parameters(), lr=0.1), BLUR(twin.params, lr=0.1)
    for o, p in ((opt, problem), (twin_opt, twin)):
        step_by_closures(o, p)
    assert states(opt).keys() == states(twin_opt).keys()
    assert_same_bits(states(opt), states(twin_opt))
    names = [name for name, _ in problem.model.named_parameters()]
    assert opt.state_dict()["param_groups"][0]["param_names"] == names
    opt.add_param_group({"params": [("new", nn.Parameter(torch.zeros(1)))]})
    assert opt.param_groups[1]["param_names"] == ["new"]


# -- torch.distributed.checkpoint --------------------------------------------------------------------------------------


@exchanges
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_distributed_checkpoints_are_exchanged_with_the_bare_base(base, giver, taker, tmp_path):
    problem, opt = trained(giver, base)
    other, other_opt = taker(base)
    other.model.load_state_dict(problem.model.state_dict())
    state = through_file(get_optimizer_state_dict(problem.model, opt), tmp_path / "opt.pt")
    assert state["state"].keys() == {name for name, _ in problem.model.named_parameters()}
    set_optimizer_state_dict(other.model, other_opt, state)
    assert_go_on_alike(problem, opt, other, other_opt)


@pytest.mark.filterwarnings("error:opt.step:UserWarning")
def test_a_distributed_checkpoint_of_what_has_taken_no_step():
    """torch steps on zeros, at a rate of 0, to make the state; that is no mistake to warn of."""
    problem, opt = make()
    state = get_optimizer_state_dict(problem.model, opt)
    assert state["state"].keys() == {name for name, _ in problem.model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}], ids=str)
def test_distributed_checkpoints_of_model_and_optimizer(options):
    options = StateDictOptions(**options)
    problem, opt = make(gamma=0.5)
    step_by_closures(opt, problem)
    model_state, opt_state = copy.deepcopy(get_state_dict(problem.model, opt, options=options))
    other, other_opt = make()
    set_state_dict(other.model, other_opt, model_state_dict=model_state, optim_state_dict=opt_state, options=options)
    for o, p in ((opt, problem), (other_opt, other)):
        step_by_closures(o, p)
    assert_same_bits(states(other_opt), states(opt))
