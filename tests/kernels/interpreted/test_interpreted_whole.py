"""What the Triton backend refuses, and the backend under BLUR, in Triton's interpreter."""

import pytest
import torch
from helpers import Problem, assert_params_close, assert_same_bits, snapshot, step_by_closures
from torch import optim
from triton_case import SMALL, Case, adam, sgd

from blur_optim import BLUR


def wrong(stash=None, **changes):
    case = Case(shapes=SMALL, stash=stash)
    for name, change in changes.items():
        setattr(case, name, change(getattr(case, name)))
    return case


ERRORS = {
    "fewer gradients": ({"retain": lambda r: r[:2]}, ValueError, r"`retain` must have 4 entries like `forget`, got 2"),
    "another shape": (
        {"forget": lambda f: [f[0][:3], *f[1:]]},
        ValueError,
        r"`retain\[0\]` must have the number of elements of the other tensors, 3, got 5",
    ),
    "parameter of another shape": (
        {"params": lambda p: [p[0], p[1][1:], *p[2:]]},
        ValueError,
        r"`params\[1\]` must have the number of elements of the other tensors, 2100, got 2099",
    ),
    "gradients of two dtypes": (
        {"retain": lambda r: [*r[:3], r[3].half()]},
        ValueError,
        r"`forget\[3\]` must have the dtype of `retain\[3\]`, torch.float16, or be compressed.* got torch.float32",
    ),
    "a forget gradient in float16": (
        {"forget": lambda f: [f[0].half(), *f[1:]]},
        ValueError,
        r"`forget\[0\]` must have the dtype of `retain\[0\]`, torch.float32, or be compressed.* got torch.float16",
    ),
    "no scales": (
        {"stash": torch.int8, "scales": lambda s: []},
        ValueError,
        r"`scales\[0\]` must be a contiguous float32 tensor of shape \(1,\) .* each block of 256 of `forget\[0\]`",
    ),
    "too few scales": (
        {"stash": torch.int8, "scales": lambda s: [s[0], s[1][:8], *s[2:]]},
        ValueError,
        r"`scales\[1\]` must be a contiguous float32 tensor of shape \(9,\)",
    ),
    "compressed and alone": (
        {"stash": torch.bfloat16, "retain": lambda r: [r[0][:0], *r[1:]]},
        ValueError,
        r"`forget\[0\]` must not be compressed where `retain\[0\]` is absent",
    ),
    "state of another dtype": (
        {"state": lambda s: {**s, "m": [t.double() for t in s["m"]]}},
        ValueError,
        r"`exp_avgs\[0\]` must have the dtype",
    ),
    "parameters of another device": (
        {"params": lambda p: [t.to("meta") for t in p]},
        ValueError,
        r"`params\[0\]` must have the device",
    ),
    "dtypes that do not fit": (
        {
            "params": lambda p: [t.half() for t in p],
            "state": lambda s: {k: [t.half() for t in v] for k, v in s.items()},
        },
        TypeError,
        r"16-bit beside float32, got torch.float32 beside torch.float16",
    ),
    "rows that descend": ({"rows": lambda r: r[::-1]}, ValueError, r"`rows` must ascend"),
    "rows without coefficients": ({"rows": lambda r: [0, 0, 1, 2]}, ValueError, r"`rows` .* to less than 2"),
}


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        adam(wrong(**changes))


def test_errors_name_the_state_of_the_optimizer():
    with pytest.raises(ValueError, match=r"`momentum_buffers\[0\]` must have the dtype"):
        sgd(wrong(state=lambda s: {"m": [t.double() for t in s["m"]]}), momentum=0.9)


def test_a_step_count_for_each_parameter():
    with pytest.raises(ValueError, match=r"`steps` must have shape \(4,\) like `params`, got \(2,\)"):
        adam(Case(shapes=SMALL), steps=(1, 2))


@pytest.mark.parametrize(
    ("base", "kernel"),
    [(optim.AdamW, "adam_kernel"), (optim.Adam, "adam_kernel"), (optim.SGD, "sgd_kernel"), (optim.Adagrad, None)],
)
def test_under_blur(base, kernel, launches):
    problem, twin = Problem(), Problem()
    opt = BLUR(problem.params, base, lr=0.1, weight_decay=0.1, backend="triton")
    other = BLUR(twin.params, base, lr=0.1, weight_decay=0.1, backend="reference")
    for _ in range(3):
        step_by_closures(opt, problem)
        step_by_closures(other, twin)
    # float64 up to the order of additions in the dots, which adaptive steps pass on as they are relative.
    assert_params_close(problem.params, twin.params, rtol=1e-12, atol=1e-13)
    assert launches.count(kernel or "blend_kernel") == 3


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # Of NumPy, that infinity times 0 is none.
def test_a_skipped_step_under_blur():
    problem = Problem(torch.float32)
    opt = BLUR(problem.params, optim.AdamW, lr=0.1, fused=True, backend="triton")
    step_by_closures(opt, problem)
    before = snapshot(opt)
    opt.step(problem.forget_loss, lambda: problem.retain_loss() * float("inf"))
    assert opt.statistics.skipped == 1
    assert_same_bits(snapshot(opt), before)
