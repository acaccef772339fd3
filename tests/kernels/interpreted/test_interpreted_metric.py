"""The metric's operations in Triton's interpreter, on the CPU."""

import pytest
import torch
from helpers import Problem, assert_params_close, step_by_closures, step_by_phases
from metric_case import OPERATIONS, SOME_KINDS, TOLERANCE, MetricCase

from blur_optim import BLUR
from blur_optim.kernels import triton
from blur_optim.kernels.blocks import BLOCK_SIZE


def clones(tensors):
    return [t.clone(memory_format=torch.preserve_format) for t in tensors]


# Around a block of 2048 and the blocks of int8; a chunk is left to the compiled backends' tests.
NUMELS = [2048 + BLOCK_SIZE + 1, 0, 2048, 1, 7, BLOCK_SIZE, 33]


@pytest.mark.parametrize("dtypes", SOME_KINDS, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_values(dtypes, operation, monkeypatch):
    monkeypatch.setitem(TOLERANCE, torch.bfloat16, 2**-6)  # Which the interpreter truncates to.
    case = MetricCase(dtypes, NUMELS)
    case.assert_close(case.run(triton, operation, clones), operation)


@pytest.mark.parametrize(
    ("operation", "options"),
    [
        pytest.param("adamw", {"amsgrad": True, "decoupled": False, "maximize": True}, id="amsgrad-L2-maximize"),
        pytest.param("dots", {"amsgrad": True}, id="dots-amsgrad"),
        pytest.param("sgd", {"momentum": 0.0, "dampening": 0.0}, id="plain"),
        pytest.param("sgd", {"nesterov": True, "first_step": True}, id="nesterov-first-step"),
    ],
)
def test_options(operation, options):
    case = MetricCase((torch.float64,) * 3, [35, 7, 300], amsgrad=options.get("amsgrad", False))
    options = {} if operation == "dots" else options
    case.assert_close(case.run(triton, operation, clones, **options), operation, **options)


@pytest.mark.parametrize("operation", OPERATIONS[1:])
def test_found_inf(operation):
    case = MetricCase((torch.float32,) * 3, [35, 7, 300])
    actual = case.run(triton, operation, clones, found_inf=torch.tensor(1.0))
    if operation == "blend":
        actual, expected = actual[3:], case.exp_avg_sqs
    else:
        expected = [*case.params, *case.exp_avgs, *case.exp_avg_sqs]
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("base", "step"), [(torch.optim.AdamW, step_by_closures), (torch.optim.SGD, step_by_phases)], ids=["AdamW", "SGD"]
)
def test_under_blur(base, step):
    problem, twin = Problem(), Problem()
    opt = BLUR(problem.params, base, lr=0.1, metric="retain", backend="triton")
    other = BLUR(twin.params, base, lr=0.1, metric="retain", backend="reference")
    for _ in range(3):
        step(opt, problem)
        step(other, twin)
    assert_params_close(problem.params, twin.params, rtol=1e-11, atol=1e-12)


def test_the_metric_is_checked():
    case = MetricCase((torch.float32,) * 3, [4, 5])
    case.metric = case.metric[:1]
    with pytest.raises(ValueError, match=r"`metric` must be a float64 tensor of shape \(2, 5\)"):
        case.run(triton, "adamw", clones)
