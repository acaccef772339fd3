"""One step, by closures or by phases: the same bits, every wrong order refused, nothing left behind by an error."""

import gc
from contextlib import nullcontext, suppress
from functools import partial
from itertools import product

import pytest
import torch
from helpers import (
    Problem,
    assert_params_close,
    assert_same_bits,
    backends,
    calling_backward,
    run_phases,
    snapshot,
    step_by_closures,
    step_by_phases,
    step_on,
    storages_of_grads,
    watch,
)
from torch.multiprocessing.reductions import StorageWeakRef

from blur_optim import BLUR


def make(backend="foreach", **options):
    """The fused update that closures may take agrees with phases up to rounding, so bits are compared without it."""
    problem = Problem()
    return problem, BLUR(problem.params, torch.optim.AdamW, lr=0.1, backend=backend, **options)


def by_returned_losses(opt, problem, parts):
    return opt.step(
        lambda: sum(problem.forget_loss(i, parts) for i in range(parts)),
        lambda: sum(problem.retain_loss(i, parts) for i in range(parts)),
    )


def by_closures_that_zero(opt, problem, parts, set_to_none):
    """As torch's documentation writes closures."""

    def zeroing(closure):
        opt.zero_grad(set_to_none)
        return closure()

    forget, retain = (calling_backward(loss, parts) for loss in (problem.forget_loss, problem.retain_loss))
    return opt.step(partial(zeroing, forget), partial(zeroing, retain))


def by_phases(opt, problem, parts, step, set_to_none):
    with opt.forget():
        calling_backward(problem.forget_loss, parts)()
    problem.model.zero_grad()  # Nothing to do with the stash.
    with opt.retain():
        calling_backward(problem.retain_loss, parts)()
    step(opt)
    opt.zero_grad(set_to_none)


WAYS = [
    ("closures that return the loss", by_returned_losses),
    ("closures that drop gradients", partial(by_closures_that_zero, set_to_none=True)),
    ("closures that zero gradients", partial(by_closures_that_zero, set_to_none=False)),
    ("closures under no_grad", torch.no_grad()(step_by_closures)),
    ("phases", step_by_phases),
    ("phases as in accelerate", partial(by_phases, step=lambda opt: opt.step(None), set_to_none=True)),
    ("phases as in DCP", partial(by_phases, step=lambda opt: opt.step(closure=None), set_to_none=False)),
]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("way", [w[1] for w in WAYS], ids=[w[0] for w in WAYS])
def test_every_way_has_the_same_bits(way, parts):
    (problem, opt), (twin, twin_opt) = make(gamma=0.5), make(gamma=0.5)
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
    (problem, opt), (twin, twin_opt) = make(), make()
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
    with pytest.raises(RuntimeError, match=STEP_FIRST):
        run_phases(opt, problem)
    assert all(p.grad is None for p in problem.params)


@pytest.mark.parametrize(("absent", "gamma", "alpha"), [("retain", 0.5, 0.0), ("forget", 0.0, 2.0), ("both", 0.0, 0.0)])
def test_a_closure_that_returns_none_has_nothing_to_compute(absent, gamma, alpha):
    (problem, opt), twin = make(gamma=0.5, retain_weight=2.0), Problem()
    losses = {"forget": problem.forget_loss, "retain": problem.retain_loss}
    closures = {name: (lambda: None) if absent in (name, "both") else loss for name, loss in losses.items()}
    says = pytest.warns(UserWarning, match="neither phase left") if absent == "both" else nullcontext()
    with says:
        returned = opt.step(**closures)
    assert [loss is None for loss in returned] == [absent in (name, "both") for name in closures]
    f, r = (torch.autograd.grad(loss(), twin.params) for loss in (twin.forget_loss, twin.retain_loss))
    if absent != "both":
        u = [gamma * x + alpha * y for x, y in zip(f, r, strict=True)]
        step_on(torch.optim.AdamW(twin.params, lr=0.1), twin.params, u)
    assert all(torch.equal(p, q) for p, q in zip(problem.params, twin.params, strict=True))


def test_what_the_closures_return():
    (problem, opt), activations = make(), []

    def forget():
        hidden = problem.model[0](problem.forget_inputs).exp()
        activations.append(StorageWeakRef(hidden.untyped_storage()))
        return hidden.mean()

    def retain():
        assert activations[0].expired()  # The forget loss came back without its graph.
        problem.retain_loss().backward()
        return 0.5, 12

    forget_loss, others = opt.step(forget, retain)
    assert not forget_loss.requires_grad
    assert others == (0.5, 12)


def swallow(opt, problem):
    with suppress(RuntimeError):
        opt.step()
    (problem.retain_loss() * float("nan")).backward()


# A script is a list of calls; a tuple is a phase with the calls inside it.
CALLS = {
    "backward": lambda opt, problem: problem.forget_loss().backward(),
    "closures": step_by_closures,
    "step": lambda opt, problem: opt.step(),
    "swallow": swallow,
    "zero_grad": lambda opt, problem: opt.zero_grad(),
}


def play(script, opt, problem):
    for item in script:
        if callable(item):
            item(opt, problem)
        elif isinstance(item, str):
            CALLS[item](opt, problem)
        else:
            with getattr(opt, item[0])():
                play(item[1:], opt, problem)


FORGET, RETAIN = ("forget", "backward"), ("retain", "backward")
NEST = r"opt\.forget\(\) cannot run now: the (forget|retain) phase is open\. Phases do not nest: close it first"
PAIR = r"opt\.retain\(\) cannot run now: .*\. Run `with opt\.forget\(\)` right before it"
STEP = r"opt\.step\(\) cannot run now: the (forget|retain) phase is open\. Step after the phase is closed"
EITHER = r"opt\.step\(forget, retain\) cannot run now: .*\. Use either closures or phases for a step"
BACKWARD = r"`(forget|retain)` must call backward, or return a differentiable loss, got .* and no gradient"
ABANDONED = r"abandoned inside its own phase, because of an error that was caught there"
STEP_FIRST = r"p\.grad holds the update\. opt\.step\(\) and opt\.zero_grad\(\) belong between two steps"
TWO_CLOSURES = r"must be given two closures, step\(forget, retain\), .* got one\. .* split the closure in two"

WRONG_CALLS = [
    ("retain without forget", RuntimeError, [RETAIN], PAIR),
    ("retain twice", RuntimeError, [FORGET, RETAIN, RETAIN], PAIR),
    ("forget twice", RuntimeError, [FORGET, FORGET], r"all forget micro-batches in one .* call opt\.zero_grad\(\)"),
    ("forget before the step", RuntimeError, [FORGET, RETAIN, FORGET], STEP_FIRST),
    ("forget in forget", RuntimeError, [(*FORGET, FORGET)], NEST),
    ("retain in forget", RuntimeError, [(*FORGET, RETAIN)], PAIR),
    ("forget in retain", RuntimeError, [FORGET, (*RETAIN, FORGET)], NEST),
    ("retain in retain", RuntimeError, [FORGET, (*RETAIN, RETAIN)], PAIR),
    ("step in forget", RuntimeError, [(*FORGET, "step")], STEP),
    ("step in retain", RuntimeError, [FORGET, (*RETAIN, "step")], STEP),
    ("step between", RuntimeError, [FORGET, "step", RETAIN], r"Run `with opt\.retain\(\)` before it"),
    ("closures in forget", RuntimeError, [(*FORGET, "closures")], EITHER),
    ("closures in retain", RuntimeError, [FORGET, (*RETAIN, "closures")], EITHER),
    ("closures between", RuntimeError, [FORGET, "closures"], EITHER),
    ("zero_grad between", RuntimeError, [FORGET, "zero_grad", RETAIN], r"No zero_grad\(\) belongs between the two"),
    ("backward between", RuntimeError, [FORGET, "backward", RETAIN], r"Move every backward into one of them"),
    ("backward before closures", RuntimeError, ["backward", "closures"], r"opt\.step\(forget, .* Call opt\.zero_grad"),
    ("backward before forget", RuntimeError, ["backward", FORGET, RETAIN], r"opt\.forget\(\) .* Call opt\.zero_grad"),
    ("swallowed in forget", RuntimeError, [(*FORGET, "swallow")], ABANDONED),
    ("swallowed in retain", RuntimeError, [FORGET, (*RETAIN, "swallow")], ABANDONED),
    ("closure that steps", RuntimeError, [lambda o, p: o.step(o.step, p.retain_loss)], STEP),
    ("swallowed by forget", RuntimeError, [lambda o, p: o.step(partial(swallow, o, p), p.retain_loss)], ABANDONED),
    ("swallowed by retain", RuntimeError, [lambda o, p: o.step(p.forget_loss, partial(swallow, o, p))], ABANDONED),
    ("closure that opens", RuntimeError, [lambda o, p: o.step(p.forget_loss, o.forget().__enter__)], NEST),
    ("number for a loss", RuntimeError, [lambda o, p: o.step(lambda: 1.0, p.retain_loss)], BACKWARD),
    ("loss detached", RuntimeError, [lambda o, p: o.step(p.forget_loss, lambda: p.retain_loss().detach())], BACKWARD),
    ("one closure", TypeError, [lambda o, p: o.step(p.forget_loss)], TWO_CLOSURES),
    ("one closure by keyword", TypeError, [lambda o, p: o.step(closure=p.forget_loss)], TWO_CLOSURES),
    ("retain closure alone", TypeError, [lambda o, p: o.step(retain=p.retain_loss)], TWO_CLOSURES),
    ("three", TypeError, [lambda o, p: o.step(p.forget_loss, p.retain_loss, closure=p.forget_loss)], TWO_CLOSURES),
]


@backends
@pytest.mark.parametrize("recover", [step_by_closures, step_by_phases])
@pytest.mark.parametrize(("what", "error", "script", "message"), WRONG_CALLS, ids=[case[0] for case in WRONG_CALLS])
def test_wrong_calls(what, error, script, message, recover, backend):
    (problem, opt), (twin, twin_opt) = make(backend), make(backend)
    recover(opt, problem)
    recover(twin_opt, twin)
    before, statistics = snapshot(opt), opt.statistics.to_dict()
    with pytest.raises(error, match=message):
        play(script, opt, problem)
    assert_same_bits(snapshot(opt), before)
    assert all(p.grad is None for p in problem.params)
    if "swallowed" in what:  # No gradients were combined, so there is nothing new to tell.
        assert opt.statistics.to_dict() == statistics
    recover(opt, problem)
    recover(twin_opt, twin)
    assert_same_bits(snapshot(opt), snapshot(twin_opt))


def test_zero_grad_abandons_a_step_on_purpose():
    problem, opt = make()
    with opt.forget():
        problem.forget_loss().backward()
        storages = storages_of_grads(problem.params)
    assert not any(storage.expired() for storage in storages)
    opt.zero_grad()
    assert all(storage.expired() for storage in storages)
    step_by_closures(opt, problem)  # Not refused.


PLACES = [*product(["forget", "retain"], range(3)), ("rule", 0), ("step hook", 0)]


@backends
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]} {place[1]}")
@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
def test_an_error_leaves_no_trace(step, place, error, backend):
    problem, twin, armed, storages = Problem(), Problem(), [], []

    def on_call(*here):
        storages.extend(storages_of_grads(problem.params))
        if armed and here == place:
            raise error("on purpose")

    def rule(dots, gamma, alpha):
        on_call("rule", 0)
        return gamma - alpha * dots.retain_forget / dots.forget_norm_sq, alpha

    watch(problem, on_call)
    opt, twin_opt = (BLUR(p.params, torch.optim.AdamW, lr=0.1, rule=rule, backend=backend) for p in (problem, twin))
    if place[0] == "step hook":  # A hook turns the fused update off.
        opt.register_step_pre_hook(lambda *_: on_call("step hook", 0))
        twin_opt.register_step_pre_hook(lambda *_: None)
    for _ in range(2):
        step(opt, problem, 3)
        step(twin_opt, twin, 3)
    before = snapshot(opt)
    armed.append(True)
    with pytest.raises(error, match="on purpose"):
        step(opt, problem, 3)
    armed.clear()
    gc.collect()
    assert_same_bits(snapshot(opt), before)
    assert all(storage.expired() for storage in storages)
    step(opt, problem, 3)
    step(twin_opt, twin, 3)
    assert_same_bits(snapshot(opt), snapshot(twin_opt))


@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
def test_the_stash_is_freed_before_the_base_steps(step):
    (problem, opt), stashed, seen = make(), [], []

    def on_call(name, part):
        if (name, part) == ("forget", 1):
            stashed.extend(storages_of_grads(problem.params))
        seen.append([storage.expired() for storage in stashed])

    watch(problem, on_call)
    opt.register_step_pre_hook(lambda *_: on_call("step", 0))
    step(opt, problem, 2)
    assert seen == [[], [False] * 4, [False] * 4, [False] * 4, [True] * 4]
