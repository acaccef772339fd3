"""Engines that collect gradients themselves, or step inside backward, are refused, not trained on the wrong sum.

DeepSpeed itself is in ``test_deepspeed.py``.
"""

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
