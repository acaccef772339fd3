"""What a wrapper around an optimizer owes to torch, by one that has nothing to do with BLUR."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from blur_optim.optimizer_wrapper import OptimizerWrapper


class Scaled(OptimizerWrapper):
    """Multiplies gradients by ``factor``, a hyperparameter of its own, before the base's step."""

    def __init__(self, base, factor=0.5):
        super().__init__(base, {"factor": factor})

    def check_own(self, name, value):
        if value < 0:
            raise ValueError(f"`{name}` must be >= 0, got {value!r}.")

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(group["factor"])
        return super().step(closure)


class Moody(SGD):
    """Offers more than an Optimizer."""

    def train(self):
        return "training"


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


def take_steps(model, opt, scheduler=None, steps=3, factor=1.0):
    for i in range(steps):
        opt.zero_grad()
        loss = model(torch.full((2, 4), 0.5 + i)).square().mean() * factor
        loss.backward()
        opt.step()
        if scheduler is not None:
            scheduler.step()


def assert_same_params(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_is_an_optimizer_with_the_groups_and_state_of_its_base():
    model = linear()
    base = AdamW(model.parameters(), lr=0.1)
    opt = Scaled(base)
    assert isinstance(opt, Optimizer)
    assert opt.param_groups is base.param_groups
    assert opt.state is base.state
    assert opt.defaults is base.defaults
    assert opt.param_groups[0]["factor"] == 0.5
    assert repr(opt).startswith("Scaled over AdamW (")


def test_the_step_is_that_of_the_base_on_what_the_wrapper_made_of_the_gradients():
    model, other = linear(), linear()
    take_steps(model, Scaled(SGD(model.parameters(), lr=0.1), factor=0.5))
    take_steps(other, SGD(other.parameters(), lr=0.05))
    torch.testing.assert_close(model.weight, other.weight)
    assert not torch.equal(model.weight, linear().weight)


def test_a_scheduler_changes_both_hyperparameters():
    model, other = linear(), linear()
    opt, base = Scaled(AdamW(model.parameters(), lr=0.1), factor=1.0), AdamW(other.parameters(), lr=0.1)
    take_steps(model, opt, lr_scheduler.ExponentialLR(opt, 0.5))
    take_steps(other, base, lr_scheduler.ExponentialLR(base, 0.5))
    assert opt.param_groups[0]["lr"] == base.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    assert_same_params(model, other)


def test_state_dicts_move_between_the_wrapper_and_the_bare_base():
    model, other = linear(), linear()
    opt, base = Scaled(AdamW(model.parameters(), lr=0.1), factor=1.0), AdamW(other.parameters(), lr=0.1)
    take_steps(model, opt)
    other.load_state_dict(model.state_dict())
    base.load_state_dict(copy.deepcopy(opt.state_dict()))
    take_steps(model, opt)
    take_steps(other, base)
    assert_same_params(model, other)
    del base.param_groups[0]["factor"]  # As a checkpoint of a run without the wrapper.
    opt.param_groups[0]["factor"] = 0.25
    opt.load_state_dict(base.state_dict())
    assert opt.param_groups[0]["factor"] == 0.25


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_alone(copied):
    model = linear()
    opt = Scaled(AdamW(model.parameters(), lr=0.1))
    scheduler = lr_scheduler.StepLR(opt, 10)  # Wraps opt.step.
    take_steps(model, opt, scheduler)
    other, other_opt = copied((model, opt))
    assert other_opt.base is not opt.base
    take_steps(model, opt)
    assert not torch.equal(model.weight, other.weight)
    take_steps(other, other_opt)
    assert_same_params(model, other)


def test_hooks_are_called_once_with_the_base():
    model = linear()
    opt = Scaled(SGD(model.parameters(), lr=0.1))
    seen = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o)))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", o)))
    take_steps(model, opt, steps=1)
    assert seen == [("before", opt.base), ("after", opt.base)]


@pytest.mark.parametrize("fused", [True, False])
def test_a_grad_scaler_reaches_the_base(fused):
    model, other = linear(), linear()
    for net, opt in (
        (model, Scaled(AdamW(model.parameters(), lr=0.1, fused=fused), factor=1.0)),
        (other, AdamW(other.parameters(), lr=0.1, fused=fused)),
    ):
        scaler = GradScaler("cpu", init_scale=1024.0)
        for factor in (1.0, float("inf"), 1.0):
            opt.zero_grad()
            scaler.scale(net(torch.ones(2, 4)).square().mean() * factor).backward()
            scaler.step(opt)
            scaler.update()
        assert scaler.get_scale() == 512.0
        assert not hasattr(opt, "grad_scale")
    assert_same_params(model, other)


def test_a_closure_goes_to_the_base():
    model = linear()
    opt = Scaled(SGD(model.parameters(), lr=0.1))
    assert opt.step(lambda: 3.0) == 3.0


def test_what_the_base_offers_beyond_an_optimizer_is_there():
    opt = Scaled(Moody(linear().parameters(), lr=0.1))
    assert opt.train() == "training"
    with pytest.raises(AttributeError, match="'Moody' object has no attribute 'nothing'"):
        opt.nothing  # noqa: B018


def test_groups_that_are_added_get_what_they_lack():
    model = linear()
    opt = Scaled(SGD([model.weight], lr=0.1))
    opt.add_param_group({"params": [model.bias], "factor": 2.0})
    assert [group["factor"] for group in opt.param_groups] == [0.5, 2.0]
    with pytest.raises(ValueError, match="`factor` must be >= 0, got -1"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "factor": -1})
    assert len(opt.param_groups) == 2


def test_names_that_clash_are_refused():
    inner = Scaled(SGD(linear().parameters(), lr=0.1))
    message = r"`base` must not have hyperparameters called \['factor'\], got Scaled: Scaled keeps its own"
    with pytest.raises(ValueError, match=message):
        Scaled(inner)
