"""A step in a region that torch.compile compiles: few breaks of the graph, the same numbers, nothing traced in vain."""

import pytest
import torch
from helpers import Problem, assert_same_bits, snapshot, step_by_closures, step_by_phases
from torch._dynamo.utils import counters
from torch.optim import SGD, Adagrad, AdamW

from blur_optim import BLUR


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def by_closures(opt, problem):
    opt.step(problem.forget_loss, problem.retain_loss)


def by_phases(opt, problem):
    with opt.forget():
        problem.forget_loss().backward()
    with opt.retain():
        problem.retain_loss().backward()
    opt.step()
    opt.zero_grad()


@pytest.mark.parametrize("base", [AdamW, SGD, Adagrad], ids=lambda base: base.__name__)
@pytest.mark.parametrize(("step", "most"), [(by_closures, 1), (by_phases, 2)], ids=["closures", "phases"])
def test_the_graph_breaks_at_the_doors_alone(base, step, most):
    problems = Problem(), Problem()
    opts = [BLUR(problem.params, base, lr=0.1) for problem in problems]
    compiled = torch.compile(lambda: step(opts[0], problems[0]), backend="eager")
    for _ in range(3):
        compiled()
        step(opts[1], problems[1])
    breaks = counters["graph_break"]
    assert 1 <= sum(breaks.values()) <= most
    assert all("BLUR." in reason or "OutsideGraphs" in reason for reason in breaks)
    assert_same_bits(snapshot(opts[0]), snapshot(opts[1]))


def test_the_inside_of_a_step_is_not_traced():
    """Whatever the number of parameters: 25 breaks and more when it was."""
    traced = []
    problem = Problem()
    opt = BLUR(problem.params, AdamW, lr=0.1)

    def backend(graph, inputs):
        traced.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    x = torch.ones(3)

    def train():
        opt.step(problem.forget_loss, problem.retain_loss)
        return x.sin()

    torch.compile(train, backend=backend)()
    assert len(traced) == 1
    assert "sin" in traced[0]


@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
def test_a_compiled_model_is_compiled_in_a_step(step):
    problems, graphs = (Problem(), Problem()), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = torch.compile(problems[0].model, backend=backend)
    problems[0].model, opts = model, [BLUR(problem.params, AdamW, lr=0.1) for problem in problems]
    for _ in range(2):
        for opt, problem in zip(opts, problems, strict=True):
            step(opt, problem)
    assert len(graphs) == 1
    assert not counters["graph_break"]
    assert_same_bits(snapshot(opts[0]), snapshot(opts[1]))
