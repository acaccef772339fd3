"""The operations of kernel_operations in the metric of the retain loss, which every backend has."""

from collections.abc import Callable
from typing import Any, cast

import torch
from harness import Candidate
from kernel_operations import GAMMA, HYPERPARAMETERS, Backends, Problem, check
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


def step_(problem: Problem, kernels: Backend, coefficients: Tensor) -> None:
    state = [p.detach() for p in problem.params], problem.state("exp_avg"), problem.state("exp_avg_sq"), []
    gradients = problem.forget, problem.retain, problem.rows, coefficients
    numbers = problem.steps, problem.lr, metric(problem)
    kernels.metric_adamw_(*state, *gradients, *numbers, scales=problem.scales, **OPTIONS)


def whole_(problem: Problem, kernels: Backend) -> None:
    sums = take_dots(problem, kernels)
    scale = (problem.numel / sums[:, 6]).sqrt()
    xi = GAMMA * scale - sums[:, 3] / sums[:, 4]
    step_(problem, kernels, torch.stack([xi, torch.ones_like(xi)], dim=1))


def dots_error(problem: Problem, kernels: Backend) -> float:
    """Relative to the products of the norms, in the metric and plain."""
    actual, expected = (take_dots(problem, k).double()[0] for k in (kernels, cast(Backend, reference)))
    _, ff, rr, _, fpf, rpr = expected[:6]
    size = torch.stack([(ff * rr).sqrt(), ff, rr, (fpf * rpr).sqrt(), fpf, rpr, *expected[6:]])
    return float(((actual - expected).abs() / size).max())


def adamw_error(problem: Problem, kernels: Backend) -> float:
    """Of the step of one parameter tensor, against the reference, relative to its largest element."""
    n = min(problem.forget[0].numel(), 10_000)
    tensors = problem.params[0].detach(), problem.state("exp_avg")[0], problem.state("exp_avg_sq")[0]
    lists, exact = ([[t[:n].to(dtype, copy=True)] for t in tensors] for dtype in (torch.float32, torch.float64))
    gradients = [problem.forget[0][:n]], [problem.retain[0][:n]], [0], problem.coefficients
    scales = [problem.scales[0][: -(-n // BLOCK_SIZE)]] if problem.scales else []
    before = exact[0][0].clone()
    for backend, state in ((kernels, lists), (cast(Backend, reference), exact)):
        numbers = problem.steps[:1], problem.lr, metric(problem)[:1]
        backend.metric_adamw_(*state, [], *gradients, *numbers, scales=scales, **OPTIONS)
    return float((lists[0][0].double() - exact[0][0]).abs().max() / (exact[0][0] - before).abs().max())


def metric_dots(problem: Problem, backends: Backends, compiled: bool) -> list[Candidate]:
    nbytes = problem.pair_bytes + problem.state_bytes // 3
    found = [Candidate(name, lambda k=k: take_dots(problem, k), nbytes) for name, k in backends.items()]
    check(found, lambda c: dots_error(problem, backends[c.name]), 1e-6)
    return found


def metric_adamw(problem: Problem, backends: Backends, compiled: bool) -> list[Candidate]:
    nbytes = problem.pair_bytes + 2 * problem.state_bytes
    found = [
        Candidate(name, lambda k=k: step_(problem, k, problem.coefficients), nbytes) for name, k in backends.items()
    ]
    check(found, lambda c: adamw_error(problem, backends[c.name]), 5e-2)  # As for AdamW.
    return found


def metric_whole_update(problem: Problem, backends: Backends, compiled: bool) -> list[Candidate]:
    nbytes = 2 * problem.pair_bytes + problem.state_bytes // 3 + 2 * problem.state_bytes
    return [Candidate(name, lambda k=k: whole_(problem, k), nbytes) for name, k in backends.items()]


METRIC_OPERATIONS: dict[str, Callable[[Problem, Backends, bool], list[Candidate]]] = {
    "dots in the metric": metric_dots,
    "AdamW in the metric": metric_adamw,
    "whole update in the metric": metric_whole_update,
}
