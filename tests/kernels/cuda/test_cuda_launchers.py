"""The launchers by their C names, as the tuning sweep calls them: its structures are those of the headers.

On the emulator, and so without a GPU: a field that is not where the library looks for it would change every result.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from gpu.launchers import Launchers
from kernel_metric_operations import adamw_, blend_, dots_error, sgd_
from kernel_operations import Problem, adamw_error, blend_error, dot_error, sgd_error

from blur_optim.kernels import foreach
from blur_optim.kernels.blocks import quantize


class Sgd:
    """``fused_sgd_`` of the first tensor alone, as the check of a problem calls it."""

    def __init__(self, path, problem):
        self.path, self.problem = path, problem

    def fused_sgd_(self, params, buffers, forget, retain, rows, coefficients, lr, **options):
        small = Problem(1, params[0].numel(), retain[0].dtype, params[0].device)
        small.params, small.forget, small.retain, small.lr = params, forget, retain, lr
        small.state = lambda name: buffers
        small.coefficients = coefficients
        Launchers(self.path, small).sgd()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_operation_is_right(dtype, emulated, build_folder):
    emulated.schedule(0)
    path, problem = build_folder / "emulated.so", Problem(3, 1001, dtype, torch.device("cpu"))
    launchers = Launchers(path, problem)
    assert dot_error(problem, launchers.dots) < 1e-7
    assert blend_error(problem, launchers.blend) <= 2 * torch.finfo(dtype).eps
    assert adamw_error(problem, launchers) < 5e-2  # As kernel_bench allows.
    assert sgd_error(problem, Sgd(path, problem)) < 5e-2
    before = [p.detach().clone() for p in problem.params]
    launchers.adamw()
    launchers.sgd()
    assert all((p != b).any() for p, b in zip(problem.params, before, strict=True))
    assert dots_error(problem, launchers.metric_dots) < 1e-6
    for take, launch in (
        (adamw_, launchers.metric_adamw),
        (sgd_, launchers.metric_sgd),
        (blend_, launchers.metric_blend),
    ):
        twin = copy.deepcopy(problem)
        take(twin, foreach)
        launch()
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(problem.state(name), twin.state(name), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(problem.params, twin.params, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(problem.retain, twin.retain, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    launchers.compress()
    for values, scales, grad in zip(*launchers.compressed, problem.retain, strict=True):
        wanted, wanted_scales = quantize(grad)
        assert torch.equal(values, wanted)
        assert torch.equal(scales, wanted_scales)
