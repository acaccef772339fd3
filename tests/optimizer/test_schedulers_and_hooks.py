"""Learning-rate schedulers and hooks see BLUR as they see its base: the same trajectories, once a step."""

import inspect
from functools import partial

import pytest
import torch
from helpers import Problem, assert_params_close, step_by_closures, step_by_phases, step_on
from torch.optim import SGD, AdamW, lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from blur_optim import BLUR

STEPS = 12


def chained(opt):
    return lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.9)])


def sequential(opt):
    parts = [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.CosineAnnealingLR(opt, 5)]
    return lr_scheduler.SequentialLR(opt, parts, milestones=[3])


SCHEDULERS = {
    "ChainedScheduler": chained,
    "ConstantLR": partial(lr_scheduler.ConstantLR, factor=0.5, total_iters=3),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=5, eta_min=0.01),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3, T_mult=2),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=3, cycle_momentum=True),
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.7),
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "LinearLR": partial(lr_scheduler.LinearLR, start_factor=0.1, total_iters=4),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[2, 5], gamma=0.1),
    "MultiplicativeLR": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.9),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.3, total_steps=STEPS, pct_start=0.4),
    "PolynomialLR": partial(lr_scheduler.PolynomialLR, total_iters=8, power=2.0),
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, patience=1, factor=0.5),
    "SequentialLR": sequential,
    "StepLR": partial(lr_scheduler.StepLR, step_size=3, gamma=0.5),
    "SWALR": partial(swa_utils.SWALR, swa_lr=0.02, anneal_epochs=4),
}
BASES = {"momentum": partial(SGD, lr=0.1, momentum=0.9), "betas": partial(AdamW, lr=0.1)}


def test_no_scheduler_of_torch_is_missing_here():
    exported = {name: getattr(lr_scheduler, name) for name in lr_scheduler.__all__}
    schedulers = {n for n, c in exported.items() if inspect.isclass(c) and hasattr(c, "get_last_lr")}
    assert schedulers - {"LRScheduler"} | {"SWALR"} == SCHEDULERS.keys()


def advance(scheduler, step):
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0 + step // 4)  # A metric that does not improve.
    else:
        scheduler.step()


def scheduled(opt):
    """What schedulers change, of every group."""
    return [{key: group[key] for key in ("lr", "momentum", "betas") if key in group} for group in opt.param_groups]


@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_blur_as_they_drive_the_base(name, base, step):
    problem, twin = Problem(), Problem()
    opt, bare = BLUR(problem.params, base), base(twin.params)
    schedulers = [SCHEDULERS[name](o) for o in (opt, bare)]
    trajectory = [scheduled(opt)]
    for i in range(STEPS - 1):
        step(opt, problem)
        step_on(bare, twin.params, twin.update())
        for scheduler in schedulers:
            advance(scheduler, i)
        assert scheduled(opt) == scheduled(bare)
        assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
        trajectory.append(scheduled(opt))
    assert any(point != trajectory[0] for point in trajectory)
    # Twelve steps at a high rate amplify the rounding of the dots.
    assert_params_close(problem.params, twin.params, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
def test_a_scheduler_notices_a_forgotten_step(step):
    problem = Problem()
    opt = BLUR(problem.params, SGD, lr=0.1)
    scheduler = lr_scheduler.StepLR(opt, 1)
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step\(\)` before `optimizer\.step\(\)"):
        scheduler.step()
    scheduler = lr_scheduler.StepLR(opt, 1)
    step(opt, problem)
    scheduler.step()  # Any warning is an error here.


def test_a_scheduler_made_for_the_base_instance_goes_on():
    problem = Problem()
    base = SGD(problem.params, lr=0.1)
    scheduler = lr_scheduler.StepLR(base, 1, gamma=0.5)
    opt = BLUR(base=base)
    for lr in (0.1, 0.05, 0.025):
        assert opt.param_groups[0]["lr"] == lr
        step_by_closures(opt, problem)
        scheduler.step()


def test_scheduling_gamma():
    """gamma and retain_weight are hyperparameters like any other: what is in the group when the phase closes counts."""
    problem, twin = Problem(), Problem()
    opt, bare = BLUR(problem.params, SGD, lr=0.1), SGD(twin.params, lr=0.1)
    schedulers = [lr_scheduler.LambdaLR(o, lambda step: 0.5**step) for o in (opt, bare)]
    for gamma, alpha in ((0.0, 1.0), (0.5, 0.7), (2.0, 0.0), (torch.tensor(0.25), torch.tensor(3.0))):
        for group in opt.param_groups:
            group["gamma"], group["retain_weight"] = gamma, alpha
        step_by_phases(opt, problem)
        step_on(bare, twin.params, twin.update(float(gamma), float(alpha)))
        for scheduler in schedulers:
            scheduler.step()
        assert float(opt.statistics.retain_coefficient) == float(alpha)
    assert_params_close(problem.params, twin.params, rtol=1e-12, atol=1e-13)


# -- Hooks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_scheduler", [False, True], ids=["plain", "scheduled"])
@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_step_hooks_run_once_a_step(step, fused, with_scheduler):
    problem, calls = Problem(), []
    opt = BLUR(problem.params, AdamW, lr=0.1, fused=fused)

    def hook(name):
        return lambda optimizer, args, kwargs: calls.append((name, optimizer))

    handles = [
        opt.register_step_pre_hook(hook("pre")),
        opt.register_step_post_hook(hook("post")),
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    try:
        if with_scheduler:
            scheduler = lr_scheduler.StepLR(opt, 2)
        for _ in range(2):
            step(opt, problem)
            assert [name for name, _ in calls] == ["global pre", "pre", "post", "global post"]
            assert {id(optimizer) for _, optimizer in calls} == {id(opt.base)}
            calls.clear()
            if with_scheduler:
                scheduler.step()
    finally:
        for handle in handles:
            handle.remove()
    step(opt, problem)
    assert calls == []


@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
def test_a_step_hook_sees_the_update_and_may_change_it(step):
    problem = Problem()
    opt = BLUR(problem.params, SGD, lr=0.1)
    start = [p.detach().clone() for p in problem.params]
    u = problem.update()

    def halve(optimizer, args, kwargs):
        assert_params_close([p.grad for p in problem.params], u, rtol=1e-12, atol=1e-14)
        for p in problem.params:
            p.grad.mul_(0.5)

    opt.register_step_pre_hook(halve)
    step(opt, problem)
    expected = [p - 0.05 * g for p, g in zip(start, u, strict=True)]
    assert_params_close([p.detach() for p in problem.params], expected, rtol=1e-12, atol=1e-14)


def test_hooks_on_the_base_instance_stay():
    problem, calls = Problem(), []
    base = SGD(problem.params, lr=0.1)
    base.register_step_post_hook(lambda *_: calls.append("post"))
    step_by_closures(BLUR(base=base), problem)
    assert calls == ["post"]


def test_a_skipped_step_runs_no_hook_where_the_base_is_not_called():
    problem, calls = Problem(), []
    opt = BLUR(problem.params, SGD, lr=0.1)
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.step(problem.forget_loss, lambda: problem.retain_loss() * float("nan"))
    assert calls == []


def test_state_dict_hooks_run_once():
    problem, calls = Problem(), []
    opt = BLUR(problem.params, AdamW, lr=0.1)
    step_by_closures(opt, problem)
    opt.register_state_dict_pre_hook(lambda optimizer: calls.append("save pre"))
    opt.register_state_dict_post_hook(lambda optimizer, state: calls.append("save post") or {**state, "extra": 1})
    opt.register_load_state_dict_pre_hook(lambda optimizer, state: calls.append(f"load pre {state['extra']}"))
    opt.register_load_state_dict_post_hook(lambda optimizer: calls.append("load post"))
    state = opt.state_dict()
    assert calls == ["save pre", "save post"]
    calls.clear()
    opt.load_state_dict(state)
    assert calls == ["load pre 1", "load post"]
