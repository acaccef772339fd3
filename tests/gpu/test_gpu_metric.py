"""The metric of the retain loss on a GPU: each operation against the float64 reference, whole steps against the CPU."""

from typing import Any

import pytest
import torch
from cases import backends, kernels, problem_on
from helpers import assert_params_close, step_by_closures, step_by_phases
from metric_case import OPERATIONS, SOME_KINDS, MetricCase
from torch import Tensor
from torch.optim import SGD, AdamW

from blur_optim import BLUR

NUMELS = [16384 + 257, 0, 257, 1, 7, 32768 + 5, 16, 255, 100_003]
FLOAT = (torch.float32,) * 3


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


@backends
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtypes", SOME_KINDS, ids=str)
def test_values(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], operation: str, device: torch.device
) -> None:
    # Without one of the gradients in one of the kinds: for Triton each is another kernel to compile.
    case = MetricCase(dtypes, NUMELS, absent=dtypes == FLOAT).to(device)
    case.assert_close(case.run(kernels(backend), operation, clones), operation)


@backends
@pytest.mark.parametrize(
    ("operation", "options"),
    [
        pytest.param("dots", {"amsgrad": True}, id="dots amsgrad"),
        pytest.param("adamw", {"amsgrad": True, "decoupled": False, "maximize": True}, id="amsgrad L2 maximize"),
        pytest.param("sgd", {"nesterov": True, "first_step": True}, id="nesterov first step"),
        pytest.param("sgd", {"momentum": 0.0, "dampening": 0.0}, id="plain"),
    ],
)
def test_options(backend: str, operation: str, options: dict[str, Any], device: torch.device) -> None:
    case = MetricCase(FLOAT, NUMELS, amsgrad=options.get("amsgrad", False), absent=False).to(device)
    options = {} if operation == "dots" else options
    case.assert_close(case.run(kernels(backend), operation, clones, **options), operation, **options)


@backends
@pytest.mark.parametrize("operation", OPERATIONS[1:])
def test_an_infinity_found_leaves_the_state(backend: str, operation: str, device: torch.device) -> None:
    case = MetricCase(FLOAT, NUMELS, absent=False).to(device)
    actual = case.run(kernels(backend), operation, clones, found_inf=torch.ones((), device=device))
    kept = case.exp_avg_sqs if operation == "blend" else [*case.params, *case.exp_avgs, *case.exp_avg_sqs]
    assert all(torch.equal(a, k) for a, k in zip(actual[-len(kept) :], kept, strict=True))


@backends
def test_the_same_bits_on_every_run(backend: str, device: torch.device) -> None:
    case = MetricCase(FLOAT, NUMELS).to(device)
    results = [case.run(kernels(backend), "dots", clones)[0] for _ in range(5)]
    assert all(torch.equal(result, results[0]) for result in results)


@backends
@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
@pytest.mark.parametrize(("base", "options"), [(AdamW, {}), (SGD, {"momentum": 0.9})], ids=["adamw", "sgd"])
def test_a_whole_step_is_that_of_the_cpu(
    backend: str, step: Any, base: Any, options: dict[str, Any], device: torch.device
) -> None:
    found = []
    for place, name in ((device, backend), (torch.device("cpu"), "reference")):
        problem = problem_on(place)
        opt = BLUR(problem.params, base, lr=0.01, metric="retain", backend=name, **options)
        for _ in range(3):
            step(opt, problem)
        found.append([p.detach().cpu() for p in problem.params])
    assert_params_close(found[0], found[1], rtol=1e-5, atol=1e-5)
