"""Step counts: a tensor for each parameter to everybody, one vector inside of a step."""

import pickle

import pytest
import torch
from helpers import Problem, assert_same_bits, snapshot, step_by_closures
from torch.optim import AdamW, RMSprop

from blur_optim import BLUR
from blur_optim.step.base_state import Counts


def stepped(steps=3):
    problem = Problem()
    opt = BLUR(problem.params, AdamW, lr=0.1)
    for _ in range(steps):
        step_by_closures(opt, problem)
    return problem, opt


def counts_of(opt):
    return [state["step"] for state in opt.state.values()]


def test_counts_that_other_processes_share_stay_where_they_are():
    problem, opt = stepped(1)
    for count in counts_of(opt):
        count.share_memory_()
    for _ in range(3):
        step_by_closures(opt, problem)
    assert all(count.is_shared() and count == 4 for count in counts_of(opt))


def test_a_state_dict_carries_no_count_but_its_own():
    problem, opt = stepped()
    assert len({count.untyped_storage().data_ptr() for count in counts_of(opt)}) == 1  # One vector, while it steps.
    before = snapshot(opt)
    loaded = opt.state_dict()
    for state in loaded["state"].values():
        assert state["step"] == 3
        assert len(pickle.dumps(state["step"])) < 1.2 * len(pickle.dumps(torch.zeros(())))
        state["step"].add_(1)  # It is a copy.
    assert_same_bits(snapshot(opt), before)
    step_by_closures(opt, problem)
    assert counts_of(opt) == [4.0] * len(problem.params)


def test_counts_on_several_devices_are_read_on_one():
    apart = Counts([torch.zeros(()), torch.zeros((), device="meta")])
    assert apart.read(torch.device("meta"), torch.float64).shape == (2,)
    # What torch refuses to stack.
    with pytest.raises(RuntimeError, match="device"):
        torch.stack(apart._entries)


def test_a_metric_that_a_base_cannot_have_leaves_no_mark_on_it():
    problem = Problem()
    base = RMSprop(problem.params, lr=0.1)
    groups = [dict(group) for group in base.param_groups]
    with pytest.raises(TypeError, match="metric"):
        BLUR(base=base, metric="retain")
    assert base.param_groups == groups
    BLUR(base=base)
