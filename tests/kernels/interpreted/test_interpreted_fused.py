"""The fused updates in Triton's interpreter, on the CPU: against torch's own in float64."""

import pytest
import torch
from triton_case import (
    ADAM_CASES,
    DTYPE_PAIRS,
    FUSED_SHAPES,
    LAYOUTS,
    SGD_CASES,
    SMALL,
    STASHES,
    Case,
    adam,
    assert_case_close,
    assert_close,
    sgd,
    torch_adam,
    torch_sgd,
)


@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "stash"), [*((*pair, None) for pair in DTYPE_PAIRS), *STASHES], ids=str
)
def test_dtypes(dtype, grad_dtype, stash):
    """Sizes beyond a chunk in one of them."""
    shapes = FUSED_SHAPES if stash is torch.int8 and dtype is grad_dtype is torch.float32 else SMALL
    for step, torch_step, options in ((adam, torch_adam, {"amsgrad": True}), (sgd, torch_sgd, {"momentum": 0.9})):
        case = Case(dtype, grad_dtype, shapes, stash)
        expected = torch_step(case, **options)
        step(case, **options)
        assert_case_close(case, expected)


@pytest.mark.parametrize("options", ADAM_CASES.values(), ids=ADAM_CASES)
def test_adam(options):
    case = Case(torch.float64, torch.float64, SMALL)
    expected = torch_adam(case, **options)
    adam(case, **options)
    assert_case_close(case, expected)


@pytest.mark.parametrize("options", SGD_CASES.values(), ids=SGD_CASES)
def test_sgd(options):
    case = Case(torch.float64, torch.float64, SMALL)
    expected = torch_sgd(case, **options)
    if options.get("first_step"):
        for buffer in case.state["m"]:
            buffer.fill_(torch.nan)  # Whatever lies in new memory.
    sgd(case, **options)
    assert_case_close(case, expected)


@pytest.mark.parametrize("step", [adam, sgd])
@pytest.mark.parametrize("layout", ["transposed", "misaligned"])
def test_dense_layouts(step, layout):
    case, twin = Case(shapes=[(4, 3), (30, 7)]), Case(shapes=[(4, 3), (30, 7)])
    for tensors in (case.params, case.forget, case.retain, *case.state.values()):
        tensors[:] = [LAYOUTS[layout](t) for t in tensors]
    step(case)
    step(twin)
    assert all(torch.equal(p, q) for p, q in zip(case.params, twin.params, strict=True))


@pytest.mark.parametrize("step", [adam, sgd])
def test_absent_gradients(step):
    case, twin = Case(shapes=SMALL), Case(shapes=SMALL)
    for side, i in (("forget", 0), ("retain", 1), ("retain", 3)):
        getattr(case, side)[i] = torch.empty(0)
        getattr(twin, side)[i].zero_()
    step(case)
    step(twin)
    # Equal, not the same bits: 0 times a number is added in one of them, which changes the sign of a zero.
    assert_close(case.params, [p.double() for p in twin.params], torch.float32)


@pytest.mark.parametrize("step", [adam, sgd])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf(step, found):
    case, expected = Case(shapes=SMALL), Case(shapes=SMALL)
    if found:
        case.retain[1][7] = torch.inf
    else:
        step(expected)
    step(case, found_inf=torch.tensor(found))
    for tensors, others in zip(
        (case.params, *case.state.values()), (expected.params, *expected.state.values()), strict=True
    ):
        assert all(torch.equal(t, other) for t, other in zip(tensors, others, strict=True))


@pytest.mark.parametrize("step", [adam, sgd])
def test_autograd_learns_of_the_modification(step):
    case = Case(shapes=SMALL)
    step(case)
    assert {p._version for p in case.params} == {1}
    assert {g._version for g in (*case.forget, *case.retain)} == {0}


def test_launches(launches):
    case = Case(shapes=[(4,)] * 5)
    adam(case)
    assert launches == ["adam_step_sizes_kernel", "adam_kernel"]
    sgd(case)
    assert launches[2:] == ["sgd_kernel"]


def test_no_params():
    case = Case(shapes=[])
    adam(case)
    sgd(case)
