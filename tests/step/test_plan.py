"""What a step keeps from the last one: kept while nothing has changed, made anew by everything that changes."""

import copy

import pytest
import torch
from helpers import NO_NATIVE, Problem, assert_params_close, step_by_closures, step_by_phases
from torch import nn
from torch.optim import SGD, AdamW

from blur_optim import BLUR
from blur_optim.kernels import native
from blur_optim.step.fused import FusedStep

pytestmark = pytest.mark.skipif(bool(NO_NATIVE), reason=NO_NATIVE)


class Small(nn.Module):
    """A layer of each kind, in float32; the second is a convolution, whose layout can change."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 5), nn.Conv2d(5, 3, 2)

    def forward(self, x):
        return self.second(self.first(x).mT.reshape(-1, 5, 2, 2)).flatten(1)


def made(**options):
    model = Small()
    groups = [{"params": model.first.parameters()}, {"params": model.second.parameters(), "gamma": 0.5, "lr": 0.02}]
    return model, BLUR(groups, **{"base": AdamW, "lr": 0.05, "weight_decay": 0.1, "backend": "native", **options})


def losses(model):
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    x, y = (torch.randn(6, 4, 5, generator=generator).to(dtype) for _ in range(2))
    return lambda: model(x).square().mean(), lambda: (model(y) - 1).square().mean()


def step(model, opt):
    return opt.step(*losses(model))


def replace_lists(model, opt):
    for group in opt.param_groups:  # As accelerate does.
        group["params"] = list(group["params"])


def replace_parameters(model, opt):
    for old, module, name in ((model.first.weight, model.first, "weight"), (model.second.bias, model.second, "bias")):
        new = nn.Parameter(old.detach().clone())
        for group in opt.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        opt.state[new] = opt.state.pop(old)
        setattr(module, name, new)


def add_a_group(model, opt):
    torch.manual_seed(2)
    model.extra = nn.Parameter(torch.randn(5, 5))
    model.first.register_forward_hook(lambda module, args, out: out @ model.extra)
    opt.add_param_group({"params": [model.extra], "lr": 0.03})


def drop_a_parameter(model, opt):
    opt.param_groups[0]["params"] = [model.first.weight]
    model.first.bias.requires_grad_(False)


def freeze(model, opt):
    model.second.bias.requires_grad_(False)


def to_double(model, opt):
    model.double()
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))  # Casts the state, as torch does.


def channels_last(model, opt):
    model.to(memory_format=torch.channels_last)


def strided(model, opt):
    model.first.weight.data = model.first.weight.data.t().contiguous().t()


def data_elsewhere(model, opt):
    for p in model.parameters():
        p.data = p.data.clone()


def other_data(model, opt):
    model.first.weight.data = model.first.weight.data * 2


def data_in_double(model, opt):
    for p in model.parameters():
        p.data = p.data.double()
    for state in opt.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name].data = state[name].data.double()


def strided_data_of_a_moment(model, opt):
    moment = opt.state[model.first.weight]["exp_avg"]
    moment.data = moment.data.t().contiguous().t()


def load_state(model, opt):
    other_model, other = made()
    step(other_model, other)
    opt.load_state_dict(copy.deepcopy(other.state_dict()))


def replace_a_moment(model, opt):
    state = opt.state[model.first.weight]
    state["exp_avg"] = state["exp_avg"] * 2


def reorder_a_moment(model, opt):
    state = opt.state[model.first.weight]
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()


def forget_a_state(model, opt):
    opt.state.pop(model.first.weight)


def clear_the_state(model, opt):
    opt.state.clear()


def new_weights(model, opt):
    opt.param_groups[0]["gamma"], opt.param_groups[1]["retain_weight"] = 2.0, 0.25


def weights_as_tensors(model, opt):
    for group in opt.param_groups:
        group["gamma"] = torch.tensor(float(group["gamma"]) * 3)


def new_rates(model, opt):
    for group in opt.param_groups:
        group["lr"], group["weight_decay"] = group["lr"] * 2, 0.0


def rate_as_tensor(model, opt):
    opt.param_groups[0]["lr"] = torch.tensor(0.07)


def new_scope(model, opt):
    opt.scope = "parameter"


def new_rule(model, opt):
    opt.rule, opt.max_grad_norm = "weighted_sum", 0.5


def alignment(model, opt):
    opt.record_alignment = True


def another_backend(model, opt):
    opt.backend = "foreach"


def amsgrad(model, opt):
    for group in opt.param_groups:
        group["amsgrad"] = True
    for state in opt.state.values():
        state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()


CHANGES = [
    replace_lists,
    replace_parameters,
    add_a_group,
    drop_a_parameter,
    freeze,
    to_double,
    channels_last,
    strided,
    data_elsewhere,
    other_data,
    data_in_double,
    strided_data_of_a_moment,
    load_state,
    replace_a_moment,
    reorder_a_moment,
    forget_a_state,
    clear_the_state,
    new_weights,
    weights_as_tensors,
    new_rates,
    rate_as_tensor,
    new_scope,
    new_rule,
    alignment,
    another_backend,
    amsgrad,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_changes_is_seen_by_the_next_step(change):
    """A step with memory against one without: BLUR is made anew around the same base after each step."""
    (model, opt), (other, base_of) = made(), made()
    for i in range(4):
        if i == 2:
            change(model, opt)
            change(other, base_of)
        step(model, opt)
        fresh = BLUR.__new__(BLUR)
        fresh.__dict__.update(base_of.__dict__)
        fresh._two_phase = fresh._make_two_phase()
        step(other, fresh)
        assert_params_close(model.parameters(), other.parameters(), rtol=0, atol=0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for name, value in opt.state.get(p, {}).items():
            assert torch.equal(value, base_of.state[q][name]), name
        assert p.dtype == q.dtype


@pytest.fixture
def same_parameters_on_every_device():
    """Have ``model.to(device)`` keep the parameters' objects, as it does between a CPU and a GPU, on "meta" too."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("same_parameters_on_every_device")
@pytest.mark.parametrize("metric", ["euclidean", "retain"])
def test_a_model_that_moves_to_another_device_and_back(metric):
    """The other, "meta", has no numbers: what is seen is that a step is taken there, on all that has moved."""
    (model, opt), (twin, stayed) = (made(fused=True, backend=None, metric=metric) for _ in range(2))
    for _ in range(2):
        step(model, opt)
        step(twin, stayed)
    params = list(model.parameters())
    values, state = [p.detach().clone() for p in params], copy.deepcopy(opt.state_dict())
    model.to("meta")
    assert all(p is q for p, q in zip(model.parameters(), params, strict=True))
    opt.load_state_dict(opt.state_dict())  # Which moves the state to where the parameters are.
    x = torch.ones(6, 4, 5, device="meta")
    opt.step(lambda: model(x).square().mean(), lambda: (model(x) - 1).square().mean())
    seen = [opt.statistics.update_norm, *(value for s in opt.state.values() for value in s.values())]
    assert {t.device.type for t in [*seen, *params]} == {"meta"}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    opt.load_state_dict(state)
    opt._two_phase.skipped = torch.zeros((), dtype=torch.int64)  # The count cannot come back from "meta".
    for _ in range(2):
        step(model, opt)
        step(twin, stayed)
    assert_params_close(model.parameters(), twin.parameters(), rtol=0, atol=0)
    assert opt.statistics.update_norm == stayed.statistics.update_norm


def test_weights_that_are_tensors_are_read_anew_each_step():
    (model, opt), (other, plain) = made(), made()
    gamma = torch.tensor(1.0)
    opt.param_groups[0]["gamma"] = gamma
    for value in (1.0, 3.0, 0.5):
        gamma.fill_(value)
        plain.param_groups[0]["gamma"] = value
        step(model, opt)
        step(other, plain)
    assert_params_close(model.parameters(), other.parameters(), rtol=0, atol=0)
    gamma.fill_(-1.0)
    with pytest.raises(ValueError, match="`gamma` must be finite and >= 0"):
        step(model, opt)


def test_a_group_that_is_added_between_the_phases_has_no_forget_gradient():
    model, opt = made()
    extra = nn.Parameter(torch.ones(3))
    forget, retain = losses(model)
    with opt.forget():
        forget().backward()
    opt.add_param_group({"params": [extra]})
    with opt.retain():
        (retain() + extra.square().sum()).backward()
    assert len(opt.statistics.params) == 5
    torch.testing.assert_close(extra.grad, torch.full((3,), 2.0))
    assert opt.statistics.dots.forget_norm_sq[2] == 0


@pytest.mark.parametrize("base", [AdamW, SGD], ids=lambda base: base.__name__)
def test_a_step_that_has_nothing_new_looks_nothing_up(base, monkeypatch):
    """Counts, for time is not asserted: no state by its hash, no row made, no list flattened."""
    model, opt = made(base=base, **({"momentum": 0.9} if base is SGD else {}))
    for _ in range(2):
        step(model, opt)
    hashed, made_anew = [], []
    kept = [opt._two_phase.plan, opt._two_phase.plan._rows, opt._two_phase.fused._state]
    monkeypatch.setattr("blur_optim.step.plan.Plan.__init__", lambda *_: made_anew.append("plan"))
    monkeypatch.setattr("blur_optim.step.base_state.BaseState.__init__", lambda *_: made_anew.append("state"))
    monkeypatch.setattr(torch.Tensor, "__hash__", lambda t: (hashed.append(1), id(t))[1])
    monkeypatch.setattr(base, "_init_group", lambda *_: made_anew.append("init"))
    forget, retain = losses(model)
    params = list(model.parameters())
    grads = [[g.contiguous() for g in torch.autograd.grad(loss(), params)] for loss in (forget, retain)]
    hashed.clear()

    def assign(some):
        for p, g in zip(params, some, strict=True):
            p.grad = g

    opt.step(lambda: assign(grads[0]), lambda: assign(grads[1]))
    assert hashed == made_anew == []
    assert [opt._two_phase.plan, opt._two_phase.plan._rows, opt._two_phase.fused._state] == kept


def test_the_work_of_a_step_does_not_grow_with_groups_times_tensors(monkeypatch):
    """Counts how many entries of the pairs' lists are sliced: every tensor once for each list, however many groups."""
    sliced = []
    original = native.fused_adamw_
    monkeypatch.setattr(
        native, "fused_adamw_", lambda *args, **kw: (sliced.append(len(args[0])), original(*args, **kw))
    )
    params = [nn.Parameter(torch.ones(2)) for _ in range(60)]
    opt = BLUR([{"params": [p]} for p in params], AdamW, lr=0.1, backend="native")
    opt.step(lambda: sum(p.sum() for p in params), lambda: sum(p.square().sum() for p in params))
    assert sliced == [1] * 60


@pytest.mark.parametrize("take", [step_by_closures, step_by_phases])
def test_the_plan_is_the_same_object_over_steps(take):
    problem = Problem()
    opt = BLUR(problem.params, AdamW, lr=0.1)
    take(opt, problem)
    plan, rows = opt._two_phase.plan, opt._two_phase.plan._rows
    take(opt, problem)
    assert opt._two_phase.plan is plan
    assert opt._two_phase.plan._rows is rows


def test_a_dead_state_is_not_kept_alive_by_more_than_one_step():
    model, opt = made()
    step(model, opt)
    old = opt._two_phase.fused._state
    clear_the_state(model, opt)
    step(model, opt)
    assert opt._two_phase.fused._state is not old
    assert isinstance(opt._two_phase.fused, FusedStep)
