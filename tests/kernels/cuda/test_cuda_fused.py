"""The fused updates of the CUDA source on the emulator: against torch.optim, and bit for bit against the CPU kernels.

Every call is repeated under other schedules of the CUDA threads and has to give the same bits. No GPU runs any of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cuda_emulator import (
    GRADIENTS,
    NUMELS,
    TOLERANCE,
    coefficients,
    copied,
    make,
    make_forget,
    same_bits,
    with_absent,
)
from torch import Tensor

from blur_optim.kernels import native, reference

# (parameters and state, retain gradients, forget gradients).
DTYPES = [(dtype, dtype, stash) for dtype, stash in GRADIENTS]
DTYPES += [(torch.float32, dtype, stash) for dtype, stash in GRADIENTS if dtype.itemsize == 2]
FLOAT = (torch.float32, torch.float32, torch.float32)


class Case:
    """Parameters, state and gradients of a fused update, over tensors of several sizes and two rows."""

    def __init__(
        self, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], numels: Sequence[int], misaligned: bool = False
    ) -> None:
        param_dtype, retain_dtype, stash = dtypes
        self.params = make(numels, param_dtype, 0, misaligned)
        self.moments = [[t.abs() for t in make(numels, param_dtype, seed, misaligned)] for seed in (1, 2, 3)]
        self.forget, self.scales = make_forget(numels, stash, 4, misaligned)
        self.retain = make(numels, retain_dtype, 5, misaligned)
        with_absent(self.forget, self.retain)
        self.rows = [0] + [1] * (len(numels) - 1)
        self.coefficients = coefficients((-1.3, 0.7), (0.4, 2.1))
        self.lr = torch.tensor(0.01, dtype=torch.float64)
        self.steps = torch.tensor([float(3 + i) for i in range(len(numels))])

    def updates(self) -> list[Tensor]:
        """u of each tensor in float64."""
        result = []
        forget = reference._in_float64(self.forget, self.scales)
        for f, r, row in zip(forget, self.retain, self.rows, strict=True):
            a, b = self.coefficients[row]
            result.append((a * f if f.numel() else 0) + (b * r.double() if r.numel() else 0))
        return result


def run_adam(ops: Any, case: Case, found_inf: float | None = None, **options: Any) -> list[Tensor]:
    params, *moments = copied(case.params), *(copied(moment) for moment in case.moments)
    settings = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False, "maximize": False}
    settings |= {"decoupled": True, "found_inf": None if found_inf is None else torch.tensor(found_inf)} | options
    tail = moments[2] if settings["amsgrad"] else []
    gradients = (case.forget, case.retain, case.rows, case.coefficients)
    arguments = (params, moments[0], moments[1], tail, *gradients, case.steps, case.lr)
    ops.fused_adamw_(*arguments, **settings, scales=case.scales)
    return [*params, *moments[0], *moments[1], *moments[2]]


def run_sgd(ops: Any, case: Case, found_inf: float | None = None, **options: Any) -> list[Tensor]:
    params, buffers = copied(case.params), copied(case.moments[0])
    settings = {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "nesterov": False, "maximize": False}
    settings |= {"first_step": False, "found_inf": None if found_inf is None else torch.tensor(found_inf)} | options
    if settings["first_step"]:
        buffers = [torch.full_like(t, torch.nan) for t in buffers]  # Whatever new memory holds.
    gradients = (case.forget, case.retain, case.rows, case.coefficients)
    arguments = (params, buffers if settings["momentum"] else [], *gradients, case.lr)
    ops.fused_sgd_(*arguments, **settings, scales=case.scales)
    return [*params, *(buffers if settings["momentum"] else [])]


def step_in_float64(case: Case, base: type, state: list[dict[str, Tensor]], **options: Any) -> list[Tensor]:
    """The parameters after a step of torch's own optimizer on u, then its state."""
    params = [torch.nn.Parameter(p.double().clone()) for p in case.params]
    optimizer = base(params, lr=0.01, weight_decay=0.1, foreach=False, **options)
    for p, u, s in zip(params, case.updates(), state, strict=True):
        p.grad = u
        optimizer.state[p] = {name: value.clone() for name, value in s.items()}
    optimizer.step()
    moments = [[optimizer.state[p][name] for p in params] for name in (state[0] if state else {}) if name != "step"]
    return [p.detach() for p in params] + [t for moment in moments for t in moment]


def assert_updated(actual: list[Tensor], expected: list[Tensor], before: list[Tensor]) -> None:
    for a, e, b in zip(actual, expected, before, strict=False):
        assert ((a.double() - e).abs() <= TOLERANCE[a.dtype] * (e.abs() + b.double().abs() + 1)).all()


def assert_bits_of_the_cpu(run: Callable[..., list[Tensor]], actual: list[Tensor], case: Case, **options: Any) -> None:
    """The kernels of both devices do the same arithmetic on an element."""
    if not native.why_not(torch.device("cpu")):
        assert same_bits(actual, run(torch.ops.blur_optim, case, **options))


# With amsgrad it is another kernel; with decoupled decay the same.
ADAM = [(dtypes, amsgrad, not amsgrad) for dtypes in DTYPES for amsgrad in (False, True)]
ADAM += [(FLOAT, False, False), (FLOAT, True, True)]


@pytest.mark.parametrize(("dtypes", "amsgrad", "decoupled"), ADAM, ids=str)
def test_adam(emulated, dtypes, amsgrad, decoupled):
    case = Case(dtypes, NUMELS, misaligned=amsgrad)
    options = {"amsgrad": amsgrad, "decoupled": decoupled, "maximize": not amsgrad}
    actual = emulated.on_every_schedule(lambda: run_adam(emulated.ops, case, found_inf=0.0, **options))
    names = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"][: 2 + amsgrad]
    states = [
        {"step": step - 1} | {name: case.moments[k][i].double() for k, name in enumerate(names)}
        for i, step in enumerate(case.steps)
    ]
    base = torch.optim.AdamW if decoupled else torch.optim.Adam
    expected = step_in_float64(case, base, states, betas=(0.9, 0.99), amsgrad=amsgrad, maximize=not amsgrad)
    assert_updated(actual, expected, [*case.params, *case.moments[0], *case.moments[1], *case.moments[2]])
    assert_bits_of_the_cpu(run_adam, actual, case, **options)


# With momentum it is another kernel; Nesterov's and the first step are the same.
SGD = {
    "plain": {"momentum": 0.0, "dampening": 0.0},
    "momentum": {"maximize": True},
    "nesterov": {"nesterov": True, "dampening": 0.0},
    "first-step": {"first_step": True},
}
SGD_CASES = [(dtypes, name) for dtypes in DTYPES for name in ("plain", "momentum")]
SGD_CASES += [(FLOAT, "nesterov"), (FLOAT, "first-step")]


@pytest.mark.parametrize(("dtypes", "name"), SGD_CASES, ids=str)
def test_sgd(emulated, dtypes, name):
    options = SGD[name]
    case = Case(dtypes, NUMELS, misaligned="maximize" in options)
    actual = emulated.on_every_schedule(lambda: run_sgd(emulated.ops, case, **options))
    settings = {"momentum": 0.9, "dampening": 0.1} | options
    new = settings.pop("first_step", False) or not settings["momentum"]
    states = [{} if new else {"momentum_buffer": moment.double()} for moment in case.moments[0]]
    expected = step_in_float64(case, torch.optim.SGD, states, **settings)
    assert_updated(actual, expected, [*case.params, *case.moments[0]])
    assert_bits_of_the_cpu(run_sgd, actual, case, **options)


@pytest.mark.parametrize("run", [run_adam, run_sgd])
def test_updates_of_several_launches(emulated, run):
    case = Case((torch.float32, torch.bfloat16, torch.int8), [5 + i % 9 for i in range(150)])
    assert_bits_of_the_cpu(run, emulated.on_every_schedule(lambda: run(emulated.ops, case)), case)


@pytest.mark.parametrize("run", [run_adam, run_sgd])
def test_found_inf_skips(emulated, run):
    case = Case(FLOAT, NUMELS)
    expected = [*case.params, *case.moments[0]]
    assert not same_bits(run(emulated.ops, case)[: len(NUMELS)], case.params)
    skipped = emulated.on_every_schedule(lambda: run(emulated.ops, case, found_inf=1.0))
    assert same_bits(skipped[: len(expected)], expected)


def test_dtypes_may_differ_between_tensors_of_one_update(emulated):
    cases = [Case(dtypes, [100]) for dtypes in DTYPES]
    alone = [run_adam(emulated.ops, case) for case in cases]
    together = Case(FLOAT, [])
    together.params = [case.params[0] for case in cases]
    together.moments = [[case.moments[k][0] for case in cases] for k in range(3)]
    together.forget, together.retain = [case.forget[0] for case in cases], [case.retain[0] for case in cases]
    together.scales = [(case.scales or case.retain)[0] for case in cases]  # Anything where nothing is int8.
    together.rows, together.steps = [0] * len(cases), torch.full((len(cases),), 3.0)
    for i, tensors in enumerate(alone):
        assert same_bits(run_adam(emulated.ops, together)[i :: len(cases)], tensors)


def test_no_tensors(emulated):
    none = Case(FLOAT, [])
    none.rows = []
    assert run_adam(emulated.ops, none) == run_sgd(emulated.ops, none) == []
    emulated.ops.multi_tensor_blend_([], [], none.coefficients, [], [])
    empty = torch.empty(0)
    assert torch.equal(emulated.dots([empty], [empty], [0], 1), torch.zeros(1, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"lr": torch.tensor(0.1)}, "`lr` must have 1 float64 elements", id="lr-in-float32"),
        pytest.param({"steps": torch.ones(3)}, "`steps` must have 9 float32 elements", id="a-step-short"),
        pytest.param({"rows": [0, 1, 2, *[1] * 6]}, r"`rows\[2\]` must be in \[0, 2\), got 2", id="row-out-of-range"),
        pytest.param({"params": [torch.ones(1)] * 9}, r"`params\[0\]` must have 16641 elements", id="wrong-size"),
        pytest.param({"forget": []}, "must have one length, got 0, 9 and 9", id="lists-differ"),
        pytest.param(
            {"forget": [torch.ones(n, dtype=torch.int8) for n in NUMELS], "scales": [torch.ones(1)] * 9},
            r"`scales\[0\]` must be a contiguous float32 tensor of 66 elements",
            id="scales",
        ),
        pytest.param({"coefficients": torch.ones(2, 2)}, "`coefficients` must be a contiguous float64", id="dtype"),
    ],
)
def test_arguments_are_checked(emulated, change, message):
    case = Case(FLOAT, NUMELS)
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(RuntimeError, match=message):
        run_adam(emulated.ops, case)
