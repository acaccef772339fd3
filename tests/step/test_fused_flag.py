"""``fused`` of the base: who sets it, and what a checkpoint or a param group may say instead."""

import copy
from functools import partial

import pytest
import torch
from helpers import (
    Problem,
    assert_params_close,
    assert_same_bits,
    backends,
    snapshot,
    step_by_closures,
    step_by_phases,
    step_on,
)
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD, Adagrad, Adam, AdamW

from blur_optim import BLUR
from blur_optim.step import base as step_base

BASES = [AdamW, Adam, partial(SGD, momentum=0.9), Adagrad]
bases = pytest.mark.parametrize("base", BASES, ids=lambda base: getattr(base, "__name__", "SGD"))


def trained(base, **options):
    problem = Problem(torch.float32)
    opt = base(problem.params, lr=0.1, **options)
    step_on(opt, problem.params, torch.autograd.grad(problem.forget_loss(), problem.params))
    return problem, opt


def unfused_by_checkpoint(opt, old):
    opt.load_state_dict(copy.deepcopy(old.state_dict()))


def unfused_by_the_user(opt, old):
    unfused_by_checkpoint(opt, old)
    for group in opt.param_groups:
        group["fused"] = False


def unfused_in_one_group(opt, old):
    unfused_by_checkpoint(opt, old)
    for group in opt.param_groups:
        group["fused"] = True
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "fused": False})


@bases
@backends
@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
@pytest.mark.parametrize("change", [unfused_by_checkpoint, unfused_by_the_user, unfused_in_one_group])
def test_a_fused_base_that_is_not_any_longer_goes_on(base, backend, step, change):
    """The steps of the same base that was never fused, from the same state."""
    _, old = trained(base)
    problems = Problem(torch.float32), Problem(torch.float32)
    opts = [
        BLUR(p.params, partial(base, lr=0.1, **f), backend=backend)
        for p, f in zip(problems, ({"fused": True}, {}), strict=True)
    ]
    change(opts[0], old)
    unfused_by_checkpoint(opts[1], old)
    for opt, problem in zip(opts, problems, strict=True):
        for _ in range(2):
            step(opt, problem)
    # float32 in another order, where one takes torch's fused step and the other not.
    assert_params_close(problems[0].params, problems[1].params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [None, float("inf")])
def test_a_grad_scaler_unscales_for_it(bad):
    _, old = trained(AdamW)
    problems = Problem(torch.float32), Problem(torch.float32)
    opts = [BLUR(p.params, partial(AdamW, lr=0.1, **f)) for p, f in zip(problems, ({"fused": True}, {}), strict=True)]
    for opt, problem in zip(opts, problems, strict=True):
        opt.load_state_dict(copy.deepcopy(old.state_dict()))
        before, scaler = snapshot(opt), GradScaler("cpu", init_scale=256.0)
        with opt.forget():
            scaler.scale(problem.forget_loss() * (1.0 if bad is None else bad)).backward()
        with opt.retain(grad_scale=scaler):
            scaler.scale(problem.retain_loss()).backward()
        scaler.step(opt)
        scaler.update()
        if bad is not None:
            assert_same_bits(snapshot(opt), before)
            assert scaler.get_scale() == 128.0
    assert_params_close(problems[0].params, problems[1].params, rtol=0, atol=0)


class TestDefault:
    """On the CPU there is none; the devices where there is are pretended."""

    @pytest.fixture(autouse=True)
    def cpu_counts(self, monkeypatch):
        monkeypatch.setattr(step_base, "_FUSED_DEVICES", frozenset(("cpu",)))

    @pytest.mark.parametrize("base", [AdamW, Adam, SGD], ids=lambda base: base.__name__)
    @pytest.mark.parametrize(
        "params",
        [
            lambda p: p,
            iter,
            lambda p: [("a", p[0]), ("b", p[1])],
            lambda p: [{"params": iter(p)}],
            lambda p: [{"params": p[0]}, {"params": [p[1]], "lr": 0.2}],
        ],
        ids=["list", "iterator", "named", "iterator in a group", "groups"],
    )
    def test_fused_where_nothing_was_said(self, base, params):
        p = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
        opt = BLUR(params(p), base, lr=0.1)
        assert all(group["fused"] is True for group in opt.param_groups)
        assert next(q for group in opt.param_groups for q in group["params"]) is p[0]
        opt.step(lambda: p[0].sum() + p[1].sum(), lambda: p[0].square().sum())

    @pytest.mark.parametrize(
        ("base", "params", "kwargs"),
        [
            (AdamW, lambda p: [p], {"fused": False}),
            (AdamW, lambda p: [p], {"fused": None}),
            (AdamW, lambda p: [p], {"foreach": True}),
            (AdamW, lambda p: [{"params": [p], "foreach": True}], {}),
            (partial(AdamW, lr=0.1), lambda p: [p], {}),
            (Adagrad, lambda p: [p], {}),
            (AdamW, lambda p: [p, nn.Parameter(torch.ones(2, dtype=torch.complex64))], {}),
            (AdamW, lambda p: [p, nn.Parameter(torch.ones(2, device="meta"))], {}),
        ],
        ids=["False", "None", "foreach", "foreach in a group", "a factory", "Adagrad", "complex", "another device"],
    )
    def test_left_alone_where_something_was_or_torch_could_not(self, base, params, kwargs):
        opt = BLUR(params(nn.Parameter(torch.ones(2))), base, backend="foreach", **kwargs)
        assert not any(group.get("fused") for group in opt.param_groups)

    def test_an_instance_is_as_it_was_made(self):
        assert BLUR(base=AdamW([nn.Parameter(torch.ones(2))])).param_groups[0]["fused"] is None


def test_on_the_cpu_nothing_is_set():
    assert BLUR([nn.Parameter(torch.ones(2))], AdamW).param_groups[0]["fused"] is None


class TestDifferentiable:
    message = r"`differentiable` must be False, got True: .* would miss the forget gradient"

    @pytest.mark.parametrize("base", [AdamW, SGD])
    def test_refused_in_the_constructor(self, base):
        p = nn.Parameter(torch.ones(2))
        with pytest.raises(ValueError, match=self.message):
            BLUR([p], base, lr=0.1, differentiable=True)
        with pytest.raises(ValueError, match=self.message):
            BLUR([{"params": [p], "differentiable": True}], base, lr=0.1)
        with pytest.raises(ValueError, match=self.message):
            BLUR(base=base([p], lr=0.1, differentiable=True))

    @pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
    def test_refused_where_it_comes_later(self, step):
        problem = Problem()
        opt = BLUR(problem.params, SGD, lr=0.1)
        state = opt.state_dict()
        state["param_groups"][0]["differentiable"] = True
        opt.load_state_dict(state)
        with pytest.raises(ValueError, match=self.message):
            step(opt, problem)
