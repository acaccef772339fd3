"""``stash="recompute"``: the same step as the reference, with one gradient set, and closures that do not repeat."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from helpers import (
    Problem,
    assert_params_close,
    assert_same_bits,
    backends,
    calling_backward,
    snapshot,
    step_by_closures,
    storages_of_grads,
)
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

from blur_optim import BLUR
from blur_optim.step.rules import RETAIN_NORM_FREE, RULES


def pair_of(base=AdamW, dtype=torch.float64, **options):
    """The same problem under recompute and under reference."""
    problems = Problem(dtype), Problem(dtype)
    stashes = "recompute", "reference"
    options = {"lr": 0.1, **options}
    return problems, [BLUR(p.params, base, stash=s, **options) for p, s in zip(problems, stashes, strict=True)]


def assert_same_statistics(a, b):
    for name in ("forget_norm", "retain_norm", "cosine", "update_norm", "forget_coefficient", "retain_coefficient"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-12, msg=name)


@backends
@pytest.mark.parametrize("base", [AdamW, SGD], ids=lambda base: base.__name__)
@pytest.mark.parametrize("scope", ["global", "group", "parameter"])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_as_with_the_reference_stash(rule, scope, base, backend):
    problems, opts = pair_of(base, rule=rule, scope=scope, gamma=0.7, retain_weight=1.3, backend=backend)
    for _ in range(3):
        for opt, problem in zip(opts, problems, strict=True):
            step_by_closures(opt, problem)
        assert_same_statistics(*(opt.statistics for opt in opts))
    assert_params_close(problems[0].params, problems[1].params, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("max_grad_norm", [None, 1e-2, 1e9])
@pytest.mark.parametrize("rule", sorted(RETAIN_NORM_FREE))
@pytest.mark.parametrize("parts", [1, 3])
def test_accumulation_and_clipping(rule, parts, max_grad_norm):
    problems, opts = pair_of(rule=rule, max_grad_norm=max_grad_norm)
    for _ in range(2):
        for opt, problem in zip(opts, problems, strict=True):
            step_by_closures(opt, problem, parts)
        assert_same_statistics(*(opt.statistics for opt in opts))
    assert_params_close(problems[0].params, problems[1].params, rtol=1e-9, atol=1e-12)


NEEDS_THE_NORM = [
    {"rule": "retain_first"},
    {"rule": "normalized"},
    {"normalize": True},
    {"rule": lambda d, g, a: (g, a)},
]


@pytest.mark.parametrize("options", NEEDS_THE_NORM, ids=["retain_first", "normalized", "normalize", "own"])
def test_accumulation_under_a_rule_that_needs_the_retain_norm_first(options):
    (problem, _), (opt, _) = pair_of(**options)
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match=r"runs several backward passes.*Use stash='int8'"):
        step_by_closures(opt, problem, parts=2)
    assert_same_bits(snapshot(opt), before)
    step_by_closures(opt, problem)


@pytest.mark.parametrize(
    ("rule", "alpha"),
    [
        ("blur", 0.0),
        (lambda d, g, a: (g, 0.0), 1.0),
        (lambda d, g, a: (0.0, 0.0), 1.0),
        (lambda d, g, a: (0.0, a), 1.0),
    ],
    ids=["alpha is 0", "b is 0", "both are 0", "a is 0"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_coefficients_of_zero(rule, alpha, dtype):
    problems, opts = pair_of(SGD, dtype, rule=rule, retain_weight=alpha)
    for opt, problem in zip(opts, problems, strict=True):
        step_by_closures(opt, problem)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert_params_close(problems[0].params, problems[1].params, rtol=tolerance, atol=tolerance)
    assert all(p.isfinite().all() for p in problems[0].params)


def test_losses_that_blur_differentiates_itself():
    problems, opts = pair_of()
    for opt, problem in zip(opts, problems, strict=True):
        losses = opt.step(problem.forget_loss, problem.retain_loss)
        torch.testing.assert_close(losses[1], Problem().retain_loss().detach())
    assert_params_close(problems[0].params, problems[1].params, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("which", ["forget", "retain", "both"])
def test_closures_with_nothing_to_compute(which):
    problems, opts = pair_of()
    for opt, problem in zip(opts, problems, strict=True):
        forget = (lambda: None) if which in ("forget", "both") else problem.forget_loss
        retain = (lambda: None) if which in ("retain", "both") else problem.retain_loss
        with pytest.warns(UserWarning, match="neither phase left") if which == "both" else nullcontext():
            opt.step(forget, retain)
    assert_params_close(problems[0].params, problems[1].params, rtol=1e-12, atol=1e-12)
    assert torch.equal(problems[0].params[0], Problem().params[0]) == (which == "both")


@pytest.mark.parametrize(("stash", "most"), [("recompute", 4), ("reference", 8)])
def test_one_gradient_set_is_all_that_ever_exists(stash, most):
    """Counted after each gradient is accumulated: those of the forget phase that are alive, and others in p.grad."""
    problem, forget_storages, alive = Problem(), [], []
    opt = BLUR(problem.params, SGD, lr=0.1, stash=stash)

    def count(_):
        kept = {s.cdata for s in forget_storages if not s.expired()}
        new = {s.cdata for s in storages_of_grads(problem.params)} - kept
        alive.append(len(kept) + len(new))

    def forget():
        loss = problem.forget_loss()
        loss.backward()
        forget_storages.extend(storages_of_grads(problem.params))
        return loss

    def retain():
        # After BLUR's own, which are there by now.
        handles = [p.register_post_accumulate_grad_hook(count) for p in problem.params]
        loss = problem.retain_loss()
        loss.backward()
        for handle in handles:
            handle.remove()
        return loss

    opt.step(forget, retain)
    assert max(alive) == most


class Dropping(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 20), nn.Linear(20, 20)
        self.drop = nn.Dropout(0.5)
        self.reentrant = reentrant

    def block(self, x):
        return self.second(self.drop(torch.tanh(x)))

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):  # Twice the same weights: their gradient is a sum.
            x = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.first.weight.sum() * self.drop(x).square().mean()


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant checkpoint"])
def test_dropout_and_checkpointing(reentrant):
    """The random numbers of the second evaluation are those of the first, and the stream goes on as without it."""
    models = Dropping(reentrant), Dropping(reentrant)
    data, following = torch.randn(2, 5, 6), []
    for model, stash in zip(models, ("recompute", "reference"), strict=True):
        opt = BLUR(model.parameters(), SGD, lr=0.1, stash=stash)
        torch.manual_seed(7)
        for _ in range(2):
            opt.step(lambda model=model: model(data[0]), lambda model=model: model(data[1]))
        following.append(torch.rand(3))
    assert torch.equal(*following)
    assert_params_close(models[0].parameters(), models[1].parameters(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["around", "inside"])
def test_autocast(where):
    models, data = (Dropping(), Dropping()), torch.randn(2, 5, 6)
    for model, stash in zip(models, ("recompute", "reference"), strict=True):
        opt = BLUR(model.parameters(), SGD, lr=0.1, stash=stash)
        torch.manual_seed(7)

        def loss(row, model=model):
            with torch.autocast("cpu", torch.bfloat16, enabled=where == "inside"):
                return model(data[row])

        with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
            opt.step(lambda loss=loss: loss(0), lambda loss=loss: loss(1))
    assert_params_close(models[0].parameters(), models[1].parameters(), rtol=1e-4, atol=1e-5)


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.embedding.weight

        def loss(self, tokens):
            return nn.functional.cross_entropy(self.head(self.embedding(tokens)), tokens.roll(1))

    models, tokens = (Tied(), Tied()), torch.randint(0, 11, (2, 30))
    for model, stash in zip(models, ("recompute", "reference"), strict=True):
        opt = BLUR(model.parameters(), AdamW, lr=0.1, stash=stash, max_grad_norm=0.5)
        for _ in range(2):
            opt.step(lambda model=model: -model.loss(tokens[0]), lambda model=model: model.loss(tokens[1]))
    assert_params_close(models[0].parameters(), models[1].parameters(), rtol=1e-5, atol=1e-5)


def next_batch(problem):
    batches = itertools.cycle(problem.retain_inputs)

    def retain():
        problem.retain_inputs = next(batches)[None]
        return problem.retain_loss()

    return retain


def other_random_numbers(problem):
    calls = itertools.count()

    def retain():
        torch.rand(next(calls))
        return problem.retain_loss()

    return retain


def growing(problem):
    scales = itertools.count(1)
    return lambda: problem.retain_loss() * (1 + 1e-3 * next(scales))


def as_float(problem):
    batches = next_batch(problem)

    def retain():
        loss = batches()
        loss.backward()
        return float(loss.detach())

    return retain


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (next_batch, r"the loss was tensor.*Fetch the batch outside the closure"),
        (other_random_numbers, r"drew other random numbers"),
        (growing, r"the loss was"),
        (as_float, r"the loss was [-\d]"),
    ],
)
def test_a_closure_that_does_not_repeat_itself(closure, message):
    problem = Problem()
    opt = BLUR(problem.params, AdamW, lr=0.1, stash="recompute")
    step_by_closures(opt, problem)
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match=message):
        opt.step(problem.forget_loss, closure(problem))
    assert_same_bits(snapshot(opt), before)
    assert all(p.grad is None for p in problem.params)


def test_an_exception_in_the_second_evaluation_loses_nothing():
    problem, calls = Problem(), itertools.count()
    opt = BLUR(problem.params, AdamW, lr=0.1, stash="recompute")
    step_by_closures(opt, problem)
    before = snapshot(opt)

    def retain():
        problem.retain_loss().backward()
        if next(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opt.step(problem.forget_loss, retain)
    assert_same_bits(snapshot(opt), before)
    assert not any(p._post_accumulate_grad_hooks for p in problem.params)
    step_by_closures(opt, problem)


def test_phases_are_refused():
    opt = BLUR(Problem().params, AdamW, stash="recompute")
    with pytest.raises(RuntimeError, match=r"`stash` must not be 'recompute' with phases.*opt\.step\(forget, retain\)"):
        opt.forget().__enter__()


def test_float16_is_refused():
    p = nn.Parameter(torch.ones(3, dtype=torch.float16))
    opt = BLUR([p], SGD, stash="recompute")
    with pytest.raises(TypeError, match=r"must have float32 or bfloat16 gradients, got float16"):
        opt.step(lambda: p.sum(), lambda: p.square().sum())


def test_sparse_gradients_are_refused():
    embedding, head = nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1)
    opt = BLUR([*embedding.parameters(), *head.parameters()], SGD, stash="recompute")
    with pytest.raises(TypeError, match=r"must be dense, got torch\.sparse_coo\. Use sparse=False"):
        opt.step(lambda: head(torch.ones(2)).sum(), lambda: head(embedding(torch.tensor([1]))).sum())


def test_a_large_coefficient_does_not_drown_the_retain_gradient():
    """a / b of 1e6: in float32 the sum is rounded to the larger term, as in the update itself."""
    p = nn.Parameter(torch.zeros(1000))
    forget, retain = torch.randn(2, 1000)
    updates = []
    for stash in ("recompute", "reference"):
        opt = BLUR([p], SGD, lr=1.0, stash=stash, rule=lambda d, g, a: (1e3, 1e-3))
        before = p.detach().clone()
        opt.step(lambda: (p * forget).sum(), lambda: (p * retain).sum())
        updates.append(before - p.detach())
        p.data.copy_(before)
    torch.testing.assert_close(*updates, rtol=1e-6, atol=1e-3 * 2**-23 * 1e3)


def test_users_hooks_still_run():
    problem, calls = Problem(), []
    problem.params[0].register_post_accumulate_grad_hook(lambda p: calls.append(p.grad is not None))
    opt = BLUR(problem.params, AdamW, lr=0.1, stash="recompute")
    opt.step(calling_backward(problem.forget_loss), calling_backward(problem.retain_loss))
    assert len(calls) == 3
