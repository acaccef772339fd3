"""The operations of kernel_operations in the metric of the retain loss, which every backend has."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from harness import Candidate
from kernel_operations import GAMMA, HYPERPARAMETERS, SGD, Backends, Problem, blend_error, check
from torch import Tensor

from blur_optim.kernels import Backend, reference
from blur_optim.kernels.blocks import BLOCK_SIZE

# beta2, the weight of r^2, the inverse bias correction of a second step, a hundredth of a mean of 1, eps.
BETA2 = HYPERPARAMETERS["beta2"]
NUMBERS = [BETA2, 1 - BETA2, 1 / (1 - BETA2**2), 0.01, HYPERPARAMETERS["eps"]]
OPTIONS: dict[str, Any] = {
    "beta1": HYPERPARAMETERS["beta1"],
    "weight_decay": HYPERPARAMETERS["weight_decay"],
    "amsgrad": False,
    "maximize": False,
    "decoupled": True,
    "found_inf": None,
}


def metric(problem: Problem) -> Tensor:
    return torch.tensor([NUMBERS] * problem.count, dtype=torch.float64, device=problem.device)


def take_dots(problem: Problem, kernels: Backend) -> Tensor:
    lists = problem.forget, problem.retain, problem.state("exp_avg_sq"), [], problem.rows
    return kernels.multi_tensor_metric_dots(*lists, 1, metric(problem), problem.scales)


def blend_(problem: Problem, kernels: Backend) -> None:
    lists = problem.retain, problem.forget, problem.state("exp_avg_sq"), problem.coefficients, problem.rows
    kernels.multi_tensor_metric_blend_(*lists, metric(problem), None, problem.scales)


def step_(problem: Problem, kernels: Backend, coefficients: Tensor) -> None:
    state = [p.detach() for p in problem.params], problem.state("exp_avg"), problem.state("exp_avg_sq"), []
    gradients = problem.forget, problem.retain, problem.rows, coefficients
    numbers = problem.steps, problem.lr, metric(problem)
    kernels.metric_adamw_(*state, *gradients, *numbers, scales=problem.scales, **OPTIONS)


def sgd_(problem: Problem, kernels: Backend) -> None:
    """With momentum, whose buffer is AdamW's first moment, and v, which is its second."""
    state = [p.detach() for p in problem.params], problem.state("exp_avg"), problem.state("exp_avg_sq")
    gradients = problem.forget, problem.retain, problem.rows, problem.coefficients
    options = {"found_inf": None, "first_step": False, "scales": problem.scales}
    kernels.metric_sgd_(*state, *gradients, problem.lr, metric(problem), **options, **SGD)


def whole_(problem: Problem, kernels: Backend) -> None:
    sums = take_dots(problem, kernels)
    scale = (problem.numel / sums[:, 6]).sqrt()
    xi = GAMMA * scale - sums[:, 3] / sums[:, 4]
    step_(problem, kernels, torch.stack([xi, torch.ones_like(xi)], dim=1))


def dots_error(problem: Problem, run: Callable[[], Tensor]) -> float:
    """Relative to the products of the norms, in the metric and plain."""
    actual, expected = run().double()[0], take_dots(problem, cast(Backend, reference))[0]
    _, ff, rr, _, fpf, rpr = expected[:6]
    size = torch.stack([(ff * rr).sqrt(), ff, rr, (fpf * rpr).sqrt(), fpf, rpr, *expected[6:]])
    return float(((actual - expected).abs() / size).max())


def first_tensors(problem: Problem) -> Problem:
    """The beginning of each list's first tensor as a problem, copied."""
    n = min(problem.forget[0].numel(), 10_000)
    first = copy.copy(problem)
    state = {name: [problem.state(name)[0][:n].clone()] for name in ("exp_avg", "exp_avg_sq")}
    first.params = [torch.nn.Parameter(problem.params[0].detach()[:n].clone())]
    first.forget, first.retain = ([t[0][:n].clone()] for t in (problem.forget, problem.retain))
    first.scales = [problem.scales[0][: -(-n // BLOCK_SIZE)]] if problem.scales else []
    first.count, first.numel, first.rows, first.steps = 1, n, [0], problem.steps[:1]
    first.state = state.__getitem__  # type: ignore[method-assign]
    return first


def step_error(problem: Problem, take: Callable[[Problem, Backend], None], kernels: Backend) -> float:
    """Of the step of one parameter tensor, against the reference, relative to its largest element."""
    mine, exact = first_tensors(problem), first_tensors(problem)
    before = exact.params[0].detach().double()
    exact.params = [torch.nn.Parameter(before.clone())]
    state = {name: [exact.state(name)[0].double()] for name in ("exp_avg", "exp_avg_sq")}
    exact.state = state.__getitem__  # type: ignore[method-assign]
    take(mine, kernels)
    take(exact, cast(Backend, reference))
    actual, expected = (p.params[0].detach().double() for p in (mine, exact))
    return float((actual - expected).abs().max() / (expected - before).abs().max())


def adamw_(problem: Problem, kernels: Backend) -> None:
    step_(problem, kernels, problem.coefficients)


def metric_blend_error(problem: Problem, kernels: Backend) -> float:
    """Of the update as of the plain blend, and of v relative to itself; everything is put back."""
    expected = first_tensors(problem)
    blend_(expected, cast(Backend, reference))
    kept = [v.clone() for v in problem.state("exp_avg_sq")]
    error = blend_error(problem, lambda: blend_(problem, kernels))
    v, wanted = problem.state("exp_avg_sq"), expected.state("exp_avg_sq")[0].double()
    error = max(error, float(((v[0][: len(wanted)].double() - wanted).abs() / wanted).max()))
    for tensor, k in zip(v, kept, strict=True):
        tensor.copy_(k)
    return error


def metric_dots(problem: Problem, backends: Backends, compiled: bool) -> list[Candidate]:
    nbytes = problem.pair_bytes + problem.state_bytes // 3
    found = [Candidate(name, lambda k=k: take_dots(problem, k), nbytes) for name, k in backends.items()]
    check(found, lambda c: dots_error(problem, c.run), 1e-6)
    return found


def metric_blend(problem: Problem, backends: Backends, compiled: bool) -> list[Candidate]:
    nbytes = problem.pair_bytes + problem.grad_bytes + 2 * problem.state_bytes // 3
    found = [Candidate(name, lambda k=k: blend_(problem, k), nbytes) for name, k in backends.items()]
    check(found, lambda c: metric_blend_error(problem, backends[c.name]), 2 * torch.finfo(problem.dtype).eps)
    return found


def metric_step(
    take: Callable[[Problem, Backend], None], problem: Problem, backends: Backends, compiled: bool
) -> list[Candidate]:
    """AdamW's and SGD's with momentum, which move the same bytes: parameters and two states, read and written."""
    nbytes = problem.pair_bytes + 2 * problem.state_bytes
    found = [Candidate(name, lambda k=k: take(problem, k), nbytes) for name, k in backends.items()]
    # As for AdamW; and v is exact to float32 only, which may be all of its first steps' change.
    check(found, lambda c: step_error(problem, take, backends[c.name]), 5e-2)
    return found


def metric_whole_update(problem: Problem, backends: Backends, compiled: bool) -> list[Candidate]:
    nbytes = 2 * problem.pair_bytes + problem.state_bytes // 3 + 2 * problem.state_bytes
    return [Candidate(name, lambda k=k: whole_(problem, k), nbytes) for name, k in backends.items()]


METRIC_OPERATIONS: dict[str, Callable[[Problem, Backends, bool], list[Candidate]]] = {
    "dots in the metric": metric_dots,
    "blend in the metric": metric_blend,
    "AdamW in the metric": partial(metric_step, adamw_),
    "SGD in the metric": partial(metric_step, sgd_),
    "whole update in the metric": metric_whole_update,
}
