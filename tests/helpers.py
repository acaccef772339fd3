"""What the tests of the optimizer share: a small problem with two losses, its update by hand, exact comparisons."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from blur_optim.kernels import native

ROWS = 12
NO_NATIVE = native.why_not(torch.device("cpu"))
#: Runs a test with the plain path of a step and with the fused update, which closures may take.
backends = pytest.mark.parametrize(
    "backend", ["foreach", pytest.param("native", marks=pytest.mark.skipif(bool(NO_NATIVE), reason=NO_NATIVE))]
)


class Problem:
    """A two-layer network with ``ROWS`` rows to forget and as many to retain; the same numbers on every call."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype))
        self.forget_inputs, self.retain_inputs = torch.randn(2, ROWS, 4, generator=generator, dtype=dtype)
        self.params = list(self.model.parameters())

    def forget_loss(self, part: int = 0, parts: int = 1) -> Tensor:
        """The part of the forget loss on micro-batch ``part``; the parts sum to the loss on all rows."""
        return self.model(self.forget_inputs.chunk(parts)[part]).square().sum() / ROWS

    def retain_loss(self, part: int = 0, parts: int = 1) -> Tensor:
        return self.model(self.retain_inputs.chunk(parts)[part]).sin().sum() / ROWS

    def update(self, gamma: float = 1.0, alpha: float = 1.0) -> list[Tensor]:
        """The equation of the method over all parameters, written down once more."""
        forget = torch.autograd.grad(self.forget_loss(), self.params)
        retain = torch.autograd.grad(self.retain_loss(), self.params)
        dot = sum((r * f).sum() for r, f in zip(retain, forget, strict=True))
        xi = gamma - alpha * dot / sum(f.square().sum() for f in forget)
        return [xi * f + alpha * r for f, r in zip(forget, retain, strict=True)]


def calling_backward(loss: Callable[..., Tensor], parts: int = 1) -> Callable[[], Tensor]:
    """A closure after torch's convention that accumulates ``loss`` over ``parts`` micro-batches."""

    def closure() -> Tensor:
        total = torch.zeros(())
        for part in range(parts):
            part_loss = loss(part, parts)
            part_loss.backward()
            total = total + part_loss.detach()
        return total

    return closure


def step_by_closures(opt: Any, problem: Problem, parts: int = 1) -> Any:
    return opt.step(calling_backward(problem.forget_loss, parts), calling_backward(problem.retain_loss, parts))


def run_phases(opt: Any, problem: Problem, parts: int = 1) -> None:
    """Both phases; afterwards ``p.grad`` holds the update."""
    with opt.forget():
        calling_backward(problem.forget_loss, parts)()
    with opt.retain():
        calling_backward(problem.retain_loss, parts)()


def step_by_phases(opt: Any, problem: Problem, parts: int = 1) -> None:
    run_phases(opt, problem, parts)
    opt.step()
    opt.zero_grad()


def step_on(opt: torch.optim.Optimizer, params: Sequence[Tensor], grads: Iterable[Tensor]) -> None:
    """One step of a plain optimizer on the given gradients."""
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    opt.step()
    opt.zero_grad()


def snapshot(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of every parameter, of every entry of the optimizer's state, and of the groups' hyperparameters."""
    copied: dict[str, Any] = {}
    for g, group in enumerate(opt.param_groups):
        copied |= {f"group {g}: {name}": value for name, value in group.items() if name != "params"}
        for i, p in enumerate(group["params"]):
            copied[f"parameter {g}.{i}"] = p.detach().clone()
            for name, value in opt.state.get(p, {}).items():
                copied[f"{name} of {g}.{i}"] = value.clone() if isinstance(value, Tensor) else value
    return copied


def assert_same_bits(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(actual[name], value) if isinstance(value, Tensor) else actual[name] == value
        assert same, f"{name}: got {actual[name]}, expected {value}"


def assert_params_close(actual: Iterable[Tensor], expected: Iterable[Tensor], rtol: float, atol: float) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol, msg=lambda text, i=i: f"parameter {i}: {text}")


def storages_of_grads(params: Iterable[Tensor]) -> list[StorageWeakRef]:
    """Weak references to the memory of the gradients (a weak reference to a tensor's Python object says less)."""
    return [StorageWeakRef(p.grad.untyped_storage()) for p in params if p.grad is not None]


def watch(problem: Problem, on_call: Callable[[str, int], None]) -> None:
    """Have ``on_call(name of the loss, micro-batch)`` called before each loss is computed."""

    def watched(loss: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        def call(part: int = 0, parts: int = 1) -> Tensor:
            on_call(name, part)
            return loss(part, parts)

        return call

    problem.forget_loss = watched(problem.forget_loss, "forget")
    problem.retain_loss = watched(problem.retain_loss, "retain")
