"""The metric's operations of the CUDA source on the emulator: against the reference, and to the bit against the CPU's.

Every call is repeated under other schedules of the CUDA threads and has to give the same bits. No GPU runs any of it.
"""

import sys
from pathlib import Path

import pytest
import torch
from cuda_emulator import CHUNK, copied, same_bits

from blur_optim.kernels import native
from blur_optim.kernels.blocks import BLOCK_SIZE

sys.path.insert(0, str(Path(__file__).parents[1]))
from metric_case import KINDS, OPERATIONS, MetricCase

NUMELS = [CHUNK + BLOCK_SIZE + 1, 0, 257, 1, 7, CHUNK + 5, 16, BLOCK_SIZE - 1]
FLOAT = (torch.float32,) * 3


def run(emulated, case, operation, **options):
    return emulated.on_every_schedule(lambda: case.run(emulated.ops, operation, copied, **options))


@pytest.mark.parametrize("dtypes", KINDS, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_values(emulated, dtypes, operation):
    case = MetricCase(dtypes, NUMELS)
    actual = run(emulated, case, operation)
    case.assert_close(actual, operation)
    # AdamW's bias correction of the first moment is a float64 power of the device's own.
    if operation in ("blend", "sgd") and not native.why_not(torch.device("cpu")):
        assert same_bits(actual, case.run(torch.ops.blur_optim, operation, copied))


@pytest.mark.parametrize(
    ("operation", "options"),
    [
        pytest.param("adamw", {"amsgrad": True, "decoupled": False, "maximize": True}, id="amsgrad-L2-maximize"),
        pytest.param("sgd", {"momentum": 0.0, "dampening": 0.0}, id="plain"),
        pytest.param("sgd", {"nesterov": True, "first_step": True}, id="nesterov-first-step"),
    ],
)
def test_options(emulated, operation, options):
    case = MetricCase((torch.float32, torch.bfloat16, torch.int8), NUMELS, amsgrad=options.get("amsgrad", False))
    case.assert_close(run(emulated, case, operation, **options), operation, **options)


def test_dots_with_amsgrad_and_rows_in_any_order(emulated):
    case = MetricCase(FLOAT, NUMELS, amsgrad=True)
    case.rows = case.rows[::-1]
    case.assert_close(run(emulated, case, "dots"), "dots")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_alignment_changes_no_bit(emulated, operation):
    cases = [
        MetricCase(FLOAT, NUMELS, layout)
        for layout in (lambda t: t, lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:])
    ]
    results = [case.run(emulated.ops, operation, copied) for case in cases]
    assert same_bits(*results)


@pytest.mark.parametrize("operation", OPERATIONS[1:])
def test_found_inf(emulated, operation):
    case = MetricCase(FLOAT, NUMELS)
    skipped = run(emulated, case, operation, found_inf=torch.tensor(1.0))
    if operation == "blend":
        assert same_bits(skipped[len(NUMELS) :], case.exp_avg_sqs)
        assert same_bits(skipped[: len(NUMELS)], run(emulated, case, operation)[: len(NUMELS)])
    else:
        assert same_bits(skipped, [*case.params, *case.exp_avgs, *case.exp_avg_sqs])


def test_lists_of_several_launches_and_dtypes(emulated):
    numels = [5 + i % 9 for i in range(150)]
    for operation in OPERATIONS:
        case = MetricCase((torch.float32, torch.bfloat16, torch.int8), numels)
        case.assert_close(case.run(emulated.ops, operation, copied), operation)


def test_arguments_are_checked(emulated):
    case = MetricCase(FLOAT, [4, 5])
    case.metric = case.metric[:1]
    with pytest.raises(RuntimeError, match=r"`metric` must be a contiguous float64 tensor of shape \[2, 5\]"):
        case.run(emulated.ops, "dots", copied)
