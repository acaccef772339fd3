"""The fused updates on a GPU: against torch's optimizers in float64, and in both directions of a checkpoint."""

import copy
from typing import Any

import pytest
import torch
from cases import GRADIENTS, PARAMS, backends, cuda_only, kernels, make, problem_on, restored, stashed
from helpers import Problem, assert_params_close, step_by_closures, step_on
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from blur_optim import BLUR
from blur_optim.step.rules import RULES

A, B = -0.6, 0.9
SIZES = [(7,), (257,), (64, 33), (16385,), (70_001,)]
#: Error of a parameter relative to its size and to the largest step: roundings to float32, then one to the dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-7, torch.bfloat16: 2**-8, torch.float16: 2**-10}
ADAM = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8}
UPDATES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (AdamW, {"betas": (0.9, 0.99), "weight_decay": 0.1}),
    "adam amsgrad": (Adam, {"betas": (0.9, 0.99), "weight_decay": 0.1, "amsgrad": True}),
    "sgd": (SGD, {"weight_decay": 0.1}),
    "sgd momentum": (SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "sgd nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
}
CASES = [(param, grad, stash) for param, grad in PARAMS for dtype, stash in GRADIENTS if dtype == grad]


def apply(
    backend: str, base: Any, options: dict[str, Any], params: list[Tensor], state: dict[str, list[Tensor]],
    forget: list[Tensor], retain: list[Tensor], scales: list[Tensor], found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """Call the backend's update as the optimizer ``base(**options)`` takes its third step."""
    place, rows = params[0].device, [0] * len(params)
    coefficients = torch.tensor([[A, B]], dtype=torch.float64, device=place)
    lr, maximize = torch.full((), 0.01, dtype=torch.float64, device=place), options.get("maximize", False)
    if base is SGD:
        kernels(backend).fused_sgd_(
            params, state.get("momentum_buffer", []), forget, retain, rows, coefficients, lr,
            momentum=options.get("momentum", 0.0), dampening=options.get("dampening", 0.0),
            weight_decay=options.get("weight_decay", 0.0), nesterov=options.get("nesterov", False), maximize=maximize,
            first_step=False, found_inf=found_inf, scales=scales,
        )  # fmt: skip
        return
    kernels(backend).fused_adamw_(
        params, state["exp_avg"], state["exp_avg_sq"], state.get("max_exp_avg_sq", []), forget, retain, rows,
        coefficients, torch.full((len(params),), 3.0, device=place), lr, **ADAM, decoupled=base is AdamW,
        amsgrad="max_exp_avg_sq" in state, maximize=maximize, found_inf=found_inf, scales=scales,
    )  # fmt: skip


def state_of(base: Any, options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, list[Tensor]]:
    if base is SGD:
        return {"momentum_buffer": make(SIZES, dtype, 7, device)} if options.get("momentum") else {}
    found = {"exp_avg": make(SIZES, dtype, 7, device), "exp_avg_sq": [t.abs() for t in make(SIZES, dtype, 8, device)]}
    if options.get("amsgrad"):
        found["max_exp_avg_sq"] = [2 * t.abs() for t in make(SIZES, dtype, 9, device)]
    return found


@backends
@pytest.mark.parametrize(("base", "options"), UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize(("param", "grad", "stash"), CASES, ids=str)
def test_a_step_is_that_of_torch_in_float64(
    backend: str, base: Any, options: dict[str, Any], param: torch.dtype, grad: torch.dtype, stash: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    params, retain = make(SIZES, param, 0, device), make(SIZES, grad, 1, device)
    forget, scales = stashed(make(SIZES, grad, 2, device), stash)
    state = state_of(base, options, param, device)
    exact = [nn.Parameter(p.double()) for p in params]
    optimizer = base(exact, lr=0.01, **options)
    for i, p in enumerate(exact):
        p.grad = A * restored(forget, scales)[i] + B * retain[i].double()
        optimizer.state[p] = {name: values[i].double() for name, values in state.items()}
        if base is not SGD:
            optimizer.state[p]["step"] = torch.tensor(2.0)
    before = [p.detach().clone() for p in exact]
    optimizer.step()
    apply(backend, base, options, params, state, forget, retain, scales)
    for i, (actual, e) in enumerate(zip(params, exact, strict=True)):
        step = (e.detach() - before[i]).abs().max()
        assert ((actual.double() - e.detach()).abs() <= TOLERANCE[param] * (before[i].abs() + 4 * step)).all(), i
        for name, values in state.items():
            expected = optimizer.state[exact[i]][name]
            scale = expected.abs() + expected.abs().mean()
            assert ((values[i].double() - expected).abs() <= 2 * TOLERANCE[param] * scale).all(), (name, i)


@backends
@pytest.mark.parametrize(("base", "options"), UPDATES.values(), ids=UPDATES)
def test_an_infinity_found_leaves_everything(
    backend: str, base: Any, options: dict[str, Any], device: torch.device
) -> None:
    params, state = make(SIZES, torch.float32, 0, device), state_of(base, options, torch.float32, device)
    kept = [t.clone() for t in [*params, *(t for values in state.values() for t in values)]]
    forget, retain = make(SIZES, torch.float32, 1, device), make(SIZES, torch.float32, 2, device)
    found_inf = torch.ones((), device=device)
    apply(backend, base, options, params, state, forget, retain, [], found_inf)
    after = [*params, *(t for values in state.values() for t in values)]
    assert all(torch.equal(a, k) for a, k in zip(after, kept, strict=True))


@backends
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize(("base", "options"), UPDATES.values(), ids=UPDATES)
def test_checkpoints_go_to_torch_and_come_back(
    backend: str, base: Any, options: dict[str, Any], fused: bool | None, device: torch.device
) -> None:
    problem = problem_on(device)
    opt = BLUR(problem.params, base, lr=0.01, backend=backend, fused=fused, gamma=0.7, **options)
    plain_problem = problem_on(device)
    plain = base(plain_problem.params, lr=0.01, fused=fused, **options)
    for _ in range(2):
        step_by_closures(opt, problem)
        step_on(plain, plain_problem.params, plain_problem.update(gamma=0.7))
    # Each goes on with the other's state and parameters.
    mine, theirs = copy.deepcopy(opt.state_dict()), copy.deepcopy(plain.state_dict())
    opt.load_state_dict(theirs)
    plain.load_state_dict(mine)
    for _ in range(2):
        step_by_closures(opt, problem)
        step_on(plain, plain_problem.params, plain_problem.update(gamma=0.7))
    # Four steps of roundings, and torch's own foreach steps, which divide in another order.
    assert_params_close(problem.params, plain_problem.params, rtol=2e-5, atol=2e-5)


@backends
@pytest.mark.parametrize("stash", ["reference", "bfloat16", "int8", "cpu", "recompute"])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_whole_step_is_that_of_the_cpu(backend: str, rule: str, stash: str, device: torch.device) -> None:
    found: list[Problem] = []
    for place, name in ((device, backend), (torch.device("cpu"), "reference")):
        problem = problem_on(place)
        opt = BLUR(problem.params, AdamW, lr=0.01, rule=rule, gamma=0.7, stash=stash, backend=name, max_grad_norm=0.5)
        for _ in range(3):
            step_by_closures(opt, problem)
        found.append(problem)
    here, there = ([p.detach().cpu() for p in problem.params] for problem in found)
    # A stash that compresses keeps a gradient to 4e-3 of its element, and Adam's first steps are signs of it.
    tolerance = 1e-5 if stash in ("reference", "cpu", "recompute") else 2e-3
    assert_params_close(here, there, rtol=tolerance, atol=tolerance)


@cuda_only
def test_native_agrees_with_triton_to_the_bit_in_sgd(device: torch.device) -> None:
    for backend in ("native", "triton"):
        if reason := kernels(backend).why_not(device):
            pytest.skip(f"{backend}: {reason}")
    base, options = UPDATES["sgd momentum"]
    results = []
    for backend in ("native", "triton"):
        params, state = make(SIZES, torch.float32, 0, device), state_of(base, options, torch.float32, device)
        forget, retain = make(SIZES, torch.float32, 1, device), make(SIZES, torch.float32, 2, device)
        apply(backend, base, options, params, state, forget, retain, [])
        results.append(params)
    # Products and sums, each rounded once, in one order. (AdamW also takes a power, of which each has its own way.)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
