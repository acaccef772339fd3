"""Engines that collect gradients themselves, or step inside backward, are refused, not trained on the wrong sum.

DeepSpeed itself is in ``test_deepspeed.py``.
"""

import sys
from types import ModuleType

import pytest
import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from helpers import Problem
from torch.optim import SGD, Optimizer

from blur_optim import BLUR


def test_accelerates_wrapper_as_base():
    wrapped = object.__new__(DeepSpeedOptimizerWrapper)  # Its __init__ wants an Accelerator.
    assert isinstance(wrapped, Optimizer)
    with pytest.raises(TypeError, match=r"`base` must step on p\.grad, got .* steps by itself, inside backward"):
        BLUR(base=wrapped)


class Engine:
    """Gradients go to buffers of its own, and come back at its step."""

    def __init__(self, problem, opt):
        self.params, self.opt = problem.params, opt
        self.buffers = [torch.zeros_like(p) for p in problem.params]

    def backward(self, loss, step=False):
        loss.backward()
        for p, buffer in zip(self.params, self.buffers, strict=True):
            buffer += p.grad
            p.grad = None
        if step:
            self.step()

    def step(self):
        for p, buffer in zip(self.params, self.buffers, strict=True):
            p.grad = buffer
        self.opt.step()


def test_an_engine_that_steps_inside_backward():
    problem = Problem()
    opt = BLUR(problem.params, SGD, lr=0.1)
    before = [p.detach().clone() for p in problem.params]
    engine = Engine(problem, opt)
    with (
        pytest.raises(RuntimeError, match=r"the forget phase is open.*steps inside its backward \(DeepSpeed"),
        opt.forget(),
    ):
        engine.backward(problem.forget_loss(), step=True)
    assert all(torch.equal(p, b) for p, b in zip(problem.params, before, strict=True))


def test_an_engine_that_steps_after_both_phases():
    problem = Problem()
    opt = BLUR(problem.params, SGD, lr=0.1)
    before = [p.detach().clone() for p in problem.params]
    engine = Engine(problem, opt)
    with opt.forget():
        engine.backward(problem.forget_loss())
    with pytest.warns(UserWarning, match="neither phase left a gradient"), opt.retain():
        engine.backward(problem.retain_loss())
    with pytest.raises(RuntimeError, match=r"what the phases left there, nothing, got gradients.*DeepSpeed"):
        engine.step()
    assert all(torch.equal(p, b) for p, b in zip(problem.params, before, strict=True))


class DeepSpeedEngine:
    """What matters here of the one of this name: ZeRO-0 leaves gradients in p.grad, and averages them over the ranks
    after the backward at which its own accumulation ends, which it counts by its own steps."""

    def __init__(self, module, accumulation, ranks):
        self.module, self.accumulation, self.dp_world_size, self.boundary = module, accumulation, ranks, None

    def is_gradient_accumulation_boundary(self):
        return self.accumulation == 1 if self.boundary is None else self.boundary

    def set_gradient_accumulation_boundary(self, is_boundary):
        self.boundary = is_boundary


@pytest.mark.parametrize(
    ("accumulation", "ranks", "boundary", "refused"),
    [(1, 2, None, False), (2, 2, None, True), (2, 1, None, False), (2, 2, True, False)],
    ids=["no accumulation", "accumulation", "one rank", "boundary set"],
)
def test_an_engine_that_leaves_gradients_to_each_rank(accumulation, ranks, boundary, refused, monkeypatch):
    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["deepspeed.runtime.engine"].DeepSpeedEngine = DeepSpeedEngine
    problem, other = Problem(), Problem()
    opt = BLUR(problem.params, SGD, lr=0.1)
    elsewhere = DeepSpeedEngine(other.model, 2, 2)  # Another model's engine is no matter.
    engine = DeepSpeedEngine(problem.model, accumulation, ranks)
    engine.set_gradient_accumulation_boundary(boundary)
    if not refused:
        opt.step(problem.forget_loss, problem.retain_loss)
        return
    before = [p.detach().clone() for p in problem.params]
    with pytest.raises(RuntimeError, match=r"The forget phase must end with its gradients reduced.*_steps to 1"):
        opt.step(problem.forget_loss, problem.retain_loss)
    assert all(torch.equal(p, b) for p, b in zip(problem.params, before, strict=True))
    assert elsewhere.module is other.model
