"""Activations of a model that torch.compile has been at: captured as if it had not been."""

import pytest
import torch
from torch import nn

from blur_optim.integrations.objectives import find_module
from blur_optim.losses import capture_activations


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))


def compile_whole(model):
    return torch.compile(model, backend="eager")


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def compile_layers(model):
    for layer in model:
        layer.compile(backend="eager")
    return model


@pytest.mark.parametrize("name", ["1", "1.0"], ids=["a layer", "inside a layer"])
@pytest.mark.parametrize("compiled", [compile_whole, compile_in_place, compile_layers])
def test_capture_on_a_model_that_ran_before(compiled, name):
    torch.compiler.reset()
    inputs = torch.randn(2, 4)
    plain = make_model()
    with capture_activations(plain.get_submodule(name)) as expected:
        plain(inputs)
    model = compiled(make_model())
    model(inputs)  # From here on there is code that does not look for hooks.
    for _ in range(2):
        with capture_activations(find_module(model, name)) as captured:
            output = model(inputs)
        assert torch.equal(captured.output, expected.output)
        assert torch.equal(output, plain(inputs))
    captured.output.sum().backward()
    expected.output.sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)
    with capture_activations(find_module(model, name)) as unused:
        pass
    model(inputs)
    with pytest.raises(RuntimeError, match="got none so far"):
        _ = unused.output
