"""The metric of the retain loss in training: phases, mixed precision, skipped steps, param groups, checkpoints."""

import copy
import io
import pickle
from functools import partial

import pytest
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
)
from metric_equations import DAMPING, Equations, make
from torch.optim import SGD, Adam, AdamW

from blur_optim import BLUR


def test_accumulation():
    problem, opt = make()
    twin, other = make()
    for _ in range(3):
        step_by_phases(opt, problem, parts=3)
        step_by_phases(other, twin)
    assert_params_close(problem.params, twin.params, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("base", [AdamW, partial(AdamW, fused=True), partial(SGD, momentum=0.9)], ids=str)
def test_a_gradient_scaler_changes_no_bit(base):
    """A scale that is a power of two: dots, v and the update are those without it."""
    problem, opt = make(base, torch.float32)
    twin, other = make(base, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        with opt.forget():
            scaler.scale(problem.forget_loss()).backward()
        with opt.retain(grad_scale=scaler):
            scaler.scale(problem.retain_loss()).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        step_by_phases(other, twin)
        assert opt.statistics.to_dict() == other.statistics.to_dict()
    assert_same_bits(snapshot(opt), snapshot(other))


def test_the_scale_has_to_be_told():
    problem, opt = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with opt.forget():
        scaler.scale(problem.forget_loss()).backward()
    with opt.retain():
        scaler.scale(problem.retain_loss()).backward()
    with pytest.raises(RuntimeError, match="must know the loss scale"):
        scaler.step(opt)


@backends
@pytest.mark.parametrize("base", [AdamW, partial(AdamW, fused=True), partial(SGD, momentum=0.9)], ids=str)
@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
@pytest.mark.parametrize("first", [0, 2], ids=["first-step", "later-step"])
def test_a_gradient_that_is_not_finite_skips_the_step(base, backend, step, first):
    problem, opt = make(base, backend=backend)
    twin, other = make(base, backend=backend)
    for _ in range(first):
        step(opt, problem)
        step(other, twin)
    whole = problem.retain_loss
    before = snapshot(opt)
    problem.retain_loss = lambda *parts: whole(*parts) * float("inf")
    step(opt, problem)
    after = snapshot(opt)
    if first:
        assert_same_bits(after, before)
    else:  # The state is there, as torch makes it before it skips.
        assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("parameter"))
        assert all(not value.any() for name, value in after.items() if name.startswith(("exp_avg", "step")))
    assert int(opt.statistics.skipped) == 1
    problem.retain_loss = whole
    for _ in range(2):
        step(opt, problem)
        step(other, twin)
    assert_same_bits(snapshot(opt), snapshot(other))


def test_an_error_in_the_rule_leaves_everything_as_it_was():
    problem, opt = make(rule=lambda dots, gamma, alpha: (_ for _ in ()).throw(ValueError("mine")))
    before = snapshot(opt)
    with pytest.raises(ValueError, match="mine"):
        step_by_closures(opt, problem)
    assert snapshot(opt).keys() == before.keys()
    assert not opt.state


@pytest.mark.parametrize("base", [AdamW, partial(AdamW, fused=True, amsgrad=True), partial(SGD, momentum=0.9)], ids=str)
@pytest.mark.parametrize("how", ["state dict", "pickle", "deepcopy"])
def test_a_resumed_run_has_the_same_bits(base, how):
    problem, opt = make(base, torch.float32)
    for _ in range(3):
        step_by_closures(opt, problem)
    twin, other = continued(problem, opt, how, lambda: make(base, torch.float32))
    for _ in range(2):
        step_by_closures(opt, problem)
        step_by_closures(other, twin)
    assert_same_bits(snapshot(other), snapshot(opt))


@pytest.mark.parametrize("stash", ["reference", "bfloat16", "int8", "cpu"])
@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
@backends
def test_a_resumed_run_has_the_same_bits_with_each_stash(stash, step, backend):
    def maker():
        return make(AdamW, torch.float32, stash=stash, backend=backend)

    problem, opt = maker()
    for _ in range(2):
        step(opt, problem)
    twin, other = continued(problem, opt, "state dict", maker)
    for _ in range(2):
        step(opt, problem)
        step(other, twin)
    assert_same_bits(snapshot(other), snapshot(opt))


def continued(problem, opt, how, maker):
    """Another problem and optimizer, where these two are."""
    if how == "deepcopy":
        return copy.deepcopy((problem, opt))
    if how == "pickle":
        return pickle.loads(pickle.dumps((problem, opt)))
    file = io.BytesIO()
    torch.save([opt.state_dict(), problem.model.state_dict()], file)
    file.seek(0)
    state, weights = torch.load(file)
    twin, other = maker()
    twin.model.load_state_dict(weights)
    other.load_state_dict(state)
    return twin, other


def test_checkpoints_of_the_other_metric_load_with_a_warning():
    problem, opt = make()
    step_by_closures(opt, problem)
    plain_problem = Problem()
    plain = BLUR(plain_problem.params, AdamW, lr=0.1)
    step_by_closures(plain, plain_problem)
    of_plain, of_metric = copy.deepcopy(plain.state_dict()), copy.deepcopy(opt.state_dict())
    with pytest.warns(UserWarning, match="comes from a run with metric='retain'"):
        plain.load_state_dict(of_metric)
    assert "retain_mean_sq" not in plain.param_groups[0]
    step_by_closures(plain, plain_problem)
    opt.load_state_dict(of_plain)
    with pytest.warns(UserWarning, match="`exp_avg_sq` in this optimizer's state is not the second moment"):
        step_by_closures(opt, problem)
    step_by_closures(opt, problem)  # Said once.
    bare = AdamW(Problem().params, lr=0.1)
    bare.load_state_dict(of_metric)  # As torch does it: what it does not know stays in the groups.


def test_groups_with_betas_and_rates_of_their_own_and_one_added_later():
    problem = Problem()
    groups = [{"params": problem.params[:2], "betas": (0.8, 0.9), "lr": 0.05}, {"params": problem.params[2:3]}]
    opt = BLUR(groups, AdamW, lr=0.1, metric="retain")
    step_by_closures(opt, problem)
    problem.params[3].grad = None  # The loss reached it, the optimizer did not.
    opt.add_param_group({"params": problem.params[3:]})
    step_by_closures(opt, problem)
    assert [int(opt.state[p]["step"]) for p in problem.params] == [2, 2, 2, 1]
    v = opt.state[problem.params[3]]["exp_avg_sq"]
    assert v.any()
    means = {float(group["retain_mean_sq"]) for group in opt.param_groups}
    assert len(means) == 1
    corrected = [
        opt.state[p]["exp_avg_sq"] / (1 - group["betas"][1] ** opt.state[p]["step"].double())
        for group in opt.param_groups
        for p in group["params"]
    ]
    assert means.pop() == pytest.approx(float(torch.cat([c.flatten() for c in corrected]).mean()), rel=1e-12)


GROUPS = {
    "AdamW": (
        AdamW,
        {"betas": (0.8, 0.9), "lr": 0.05, "weight_decay": 0.3},
        {"betas": (0.6, 0.7), "lr": 0.2, "weight_decay": 0.0},
    ),
    "Adam, L2": (
        Adam,
        {"betas": (0.8, 0.9), "lr": 0.05, "weight_decay": 0.3},
        {"betas": (0.9, 0.95), "lr": 0.1, "weight_decay": 0.0},
    ),
    "SGD": (
        SGD,
        {"momentum": 0.9, "lr": 0.05, "weight_decay": 0.3, "metric_beta": 0.8},
        {"momentum": 0.0, "lr": 0.2, "weight_decay": 0.0, "metric_beta": 0.95},
    ),
}


@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
@pytest.mark.parametrize(("base", "first", "second"), GROUPS.values(), ids=GROUPS)
@backends
def test_groups_with_hyperparameters_of_their_own(base, first, second, step, backend):
    """Rates, betas and decay are each group's; the dots and the mean of v-hat are over all of them."""
    problem, twin = Problem(), Problem()
    groups = [{"params": problem.params[:2], **first}, {"params": problem.params[2:], **second}]
    opt = BLUR(groups, base, lr=1.0, gamma=0.7, metric="retain", damping=DAMPING, backend=backend)

    def each(choose):
        return torch.cat(
            [
                torch.full((p.numel(),), float(choose(g)), dtype=torch.float64)
                for g in opt.param_groups
                for p in g["params"]
            ]
        )

    both = {"lr": each(lambda g: g["lr"]), "weight_decay": each(lambda g: g["weight_decay"])}
    if base is SGD:
        both |= {"momentum": each(lambda g: g["momentum"]), "beta2": each(lambda g: g["metric_beta"])}
    else:
        both |= {"betas": tuple(each(lambda g, i=i: g["betas"][i]) for i in (0, 1))}
    equations = Equations(twin, base, **both)
    for _ in range(4):
        step(opt, problem)
        equations.step()
    assert_params_close(problem.params, twin.params, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
@pytest.mark.parametrize("base", [AdamW, partial(SGD, momentum=0.9)], ids=str)
def test_a_group_added_in_mid_run_and_a_checkpoint_before_its_first_step(base, step):
    """What is new has no v yet; the mean of the step before goes on, also by way of a checkpoint."""

    def maker():
        problem = Problem(torch.float32)
        return problem, BLUR(problem.params[:2], base, lr=0.1, metric="retain")

    def add(problem, opt):
        for p in problem.params[2:]:
            p.grad = None  # The losses reached it, the optimizer did not.
        opt.add_param_group({"params": problem.params[2:], "lr": 0.05})

    problem, opt = maker()
    for _ in range(2):
        step(opt, problem)
    mean = opt.param_groups[0]["retain_mean_sq"]
    add(problem, opt)

    def maker_of_both():
        twin, other = maker()
        add(twin, other)
        return twin, other

    twin, other = continued(problem, opt, "state dict", maker_of_both)
    assert float(other._two_phase._known_mean()) == float(mean) > 0
    for _ in range(2):
        step(opt, problem)
        step(other, twin)
    assert_same_bits(snapshot(other), snapshot(opt))
    assert [int(opt.state[p]["step"]) for p in problem.params] == [4, 4, 2, 2]


# -- Steps that are not taken -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["forget", "retain"])
@pytest.mark.parametrize("taken", [0, 2], ids=["first-step", "later-step"])
@backends
def test_an_exception_in_a_closure_leaves_everything_as_it_was(which, taken, backend):
    problem, opt = make(backend=backend)
    for _ in range(taken):
        step_by_closures(opt, problem)

    def fail():
        problem.forget_loss().backward()
        raise KeyError("mine")

    before, mean = snapshot(opt), opt._two_phase._known_mean()
    closures = {"forget": problem.forget_loss, "retain": problem.retain_loss, which: fail}
    with pytest.raises(KeyError, match="mine"):
        opt.step(closures["forget"], closures["retain"])
    for p in problem.params:
        p.grad = None
    assert_same_bits(without_nan(snapshot(opt)), without_nan(before))
    assert opt._two_phase._known_mean() is mean
    twin, other = make(backend=backend)
    for _ in range(taken):
        step_by_closures(other, twin)
    step_by_closures(opt, problem)
    step_by_closures(other, twin)
    assert_same_bits(snapshot(opt), snapshot(other))


def without_nan(copied):
    """The mean of v-hat is NaN before the first step, and no NaN equals another."""
    return {n: v for n, v in copied.items() if not (n.endswith("retain_mean_sq") and bool(torch.isnan(v)))}


@pytest.mark.parametrize("base", [AdamW, partial(AdamW, fused=True), partial(SGD, momentum=0.9)], ids=str)
def test_an_update_that_is_dropped_has_fed_v_and_nothing_else(base):
    """As documented: g_r is gone once u is in p.grad, so v has seen it, and counts it."""
    problem, opt = make(base)
    step_by_phases(opt, problem)
    before = snapshot(opt)
    run_phases(opt, problem)
    opt.zero_grad()
    after = snapshot(opt)
    changed = {
        name.partition(" of")[0]
        for name, v in after.items()
        if isinstance(v, torch.Tensor) and v.ne(before[name]).any()
    }
    assert changed == {"exp_avg_sq", "retain_ahead", "group 0: retain_mean_sq"}
    step_by_phases(opt, problem)  # And the run goes on.
    assert [int(opt.state[p]["step"]) for p in problem.params] == [2] * 4


@pytest.mark.parametrize("base", [AdamW, partial(AdamW, fused=True), partial(SGD, momentum=0.9)], ids=str)
def test_an_overflow_under_a_scaler_skips_the_step_and_v_and_the_scale_falls(base):
    problem, opt = make(base, torch.float32)
    twin, other = make(base, torch.float32)
    step_by_phases(opt, problem)
    step_by_phases(other, twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-117)
    before = snapshot(opt)
    for is_overflow in (True, False):
        with opt.forget():
            scaler.scale(8 * problem.forget_loss()).backward()
        with opt.retain(grad_scale=scaler):
            scaler.scale(problem.retain_loss()).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        if is_overflow:
            assert_same_bits(snapshot(opt), before)
            assert scaler.get_scale() == 2.0**10
    other.step(lambda: 8 * twin.forget_loss(), twin.retain_loss)
    assert int(opt.statistics.skipped) == 1
    # By phases in one and closures in the other: float32's rounding, once.
    assert_params_close(problem.params, twin.params, rtol=1e-5, atol=1e-6)


def test_a_learning_rate_that_is_a_tensor_is_read_in_each_step():
    problem, opt = make(lr=torch.tensor(0.1, dtype=torch.float64))
    twin, other = make(lr=0.1)
    for rate in (0.1, 0.02):
        opt.param_groups[0]["lr"].fill_(rate)
        other.param_groups[0]["lr"] = rate
        step_by_closures(opt, problem)
        step_by_closures(other, twin)
    assert_params_close(problem.params, twin.params, rtol=1e-12, atol=1e-14)


def test_a_scheduler_that_begins_at_zero_feeds_v_from_the_first_step():
    problem, opt = make(lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(1.0, step / 2))
    before = [p.detach().clone() for p in problem.params]
    for step in (step_by_phases, step_by_closures):
        assert opt.param_groups[0]["lr"] == (0.0 if step is step_by_phases else 0.05)
        step(opt, problem)
        scheduler.step()
        if step is step_by_phases:
            assert all(torch.equal(p, b) for p, b in zip(problem.params, before, strict=True))
            assert all(opt.state[p]["exp_avg_sq"].any() for p in problem.params)
    assert not any(torch.equal(p, b) for p, b in zip(problem.params, before, strict=True))
    assert [int(opt.state[p]["step"]) for p in problem.params] == [2] * 4
