"""One step, by closures or by phases: the same bits, every wrong order refused, nothing left behind by an error."""

import gc
from functools import partial

import pytest
import torch
from helpers import (
    Problem,
    assert_params_close,
    assert_same_bits,
    calling_backward,
    run_phases,
    snapshot,
    step_by_closures,
    step_by_phases,
    step_on,
    storages_of_grads,
)

from blur_optim import BLUR


def make(**options):
    problem = Problem()
    return problem, BLUR(problem.params, torch.optim.AdamW, lr=0.1, **options)


# -- The ways of one step ----------------------------------------------------------------------------------------------


def by_returned_losses(opt, problem, parts):
    return opt.step(
        lambda: sum(problem.forget_loss(i, parts) for i in range(parts)),
        lambda: sum(problem.retain_loss(i, parts) for i in range(parts)),
    )


def by_closures_that_zero_gradients(opt, problem, parts, set_to_none=True):
    """As torch's documentation writes closures."""

    def zeroing(closure):
        opt.zero_grad(set_to_none)
        return closure()

    forget, retain = (calling_backward(loss, parts) for loss in (problem.forget_loss, problem.retain_loss))
    return opt.step(partial(zeroing, forget), partial(zeroing, retain))


def by_closures_without_gradient_mode(opt, problem, parts):
    with torch.no_grad():
        return step_by_closures(opt, problem, parts)


def by_phases_and_step_of_none(opt, problem, parts):
    """As accelerate calls every optimizer."""
    run_phases(opt, problem, parts)
    opt.step(None)
    opt.zero_grad()


def by_phases_and_keyword_closure(opt, problem, parts):
    """As torch.distributed.checkpoint calls every optimizer."""
    run_phases(opt, problem, parts)
    opt.step(closure=None)
    opt.zero_grad(set_to_none=False)


def by_phases_with_model_zero_grad(opt, problem, parts):
    with opt.forget():
        calling_backward(problem.forget_loss, parts)()
    problem.model.zero_grad()  # Nothing to do with the stash.
    with opt.retain():
        calling_backward(problem.retain_loss, parts)()
    opt.step()
    problem.model.zero_grad()


WAYS = [
    ("closures that return the loss", by_returned_losses),
    ("closures that zero the gradients", by_closures_that_zero_gradients),
    ("closures that fill the gradients with zeros", partial(by_closures_that_zero_gradients, set_to_none=False)),
    ("closures under no_grad", by_closures_without_gradient_mode),
    ("phases", step_by_phases),
    ("phases and step(None)", by_phases_and_step_of_none),
    ("phases and step(closure=None) and zeros", by_phases_and_keyword_closure),
    ("phases and zero_grad of the model", by_phases_with_model_zero_grad),
]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("way", [w[1] for w in WAYS], ids=[w[0] for w in WAYS])
def test_every_way_has_the_same_bits(way, parts):
    problem, opt = make(gamma=0.5)
    twin, twin_opt = make(gamma=0.5)
    for _ in range(3):
        losses = way(opt, problem, parts)
        expected = step_by_closures(twin_opt, twin, parts)
        # One backward over the sum of micro-batches adds the gradients up in another order than one each does.
        if way is by_returned_losses and parts > 1:
            assert_params_close(problem.params, twin.params, rtol=1e-12, atol=1e-14)
        else:
            assert_same_bits(snapshot(opt), snapshot(twin_opt))
        if losses is not None:
            torch.testing.assert_close(losses, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
@pytest.mark.parametrize("parts", [2, 3, 4, 12])
def test_accumulation_equals_one_large_batch(parts, step):
    problem, opt = make()
    twin, twin_opt = make()
    for _ in range(4):
        step(opt, problem, parts)
        step(twin_opt, twin)
    assert_params_close(problem.params, twin.params, rtol=1e-12, atol=1e-14)


def test_what_is_left_in_the_gradients():
    problem, opt = make(gamma=0.5, retain_weight=2.0)
    step_by_closures(opt, problem)
    assert all(p.grad is None for p in problem.params)
    u = problem.update(0.5, 2.0)
    run_phases(opt, problem)
    assert_params_close([p.grad for p in problem.params], u, rtol=1e-12, atol=1e-14)
    grads = [p.grad.clone() for p in problem.params]
    opt.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(problem.params, grads, strict=True))
    opt.zero_grad()
    assert all(p.grad is None for p in problem.params)


def test_a_step_without_phases_is_a_plain_base_step():
    problem, opt = make()
    twin = Problem()
    bare = torch.optim.AdamW(twin.params, lr=0.1)
    for p, q in ((problem, opt), (twin, bare)):
        step_on(q, p.params, torch.autograd.grad(p.forget_loss(), p.params))
    assert [torch.equal(a, b) for a, b in zip(problem.params, twin.params, strict=True)] == [True] * 4
    assert opt.statistics is None


@pytest.mark.parametrize(("absent", "gamma", "alpha"), [("retain", 0.5, 0.0), ("forget", 0.0, 2.0), ("both", 0.0, 0.0)])
def test_a_closure_that_returns_none_has_nothing_to_compute(absent, gamma, alpha):
    problem, opt = make(gamma=0.5, retain_weight=2.0)
    closures = {"forget": problem.forget_loss, "retain": problem.retain_loss}
    closures |= {name: lambda: None for name in closures if absent in (name, "both")}
    twin = Problem()
    f, r = (torch.autograd.grad(loss(), twin.params) for loss in (twin.forget_loss, twin.retain_loss))
    bare = torch.optim.AdamW(twin.params, lr=0.1)
    losses = opt.step(**closures)
    assert [loss is None for loss in losses] == [absent in (name, "both") for name in closures]
    if absent == "both":
        assert not opt.state
    else:
        step_on(bare, twin.params, [gamma * x + alpha * y for x, y in zip(f, r, strict=True)])
    assert all(torch.equal(p, q) for p, q in zip(problem.params, twin.params, strict=True))


def test_a_closure_may_return_anything_once_it_called_backward():
    problem, opt = make()

    def forget():
        loss = problem.forget_loss()
        loss.backward()
        return loss.item(), {"rows": 12}

    assert opt.step(forget, lambda: problem.retain_loss().backward()) == ((forget_loss := problem, opt) and None, None)
