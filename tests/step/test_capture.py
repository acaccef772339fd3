"""CUDA graphs: what a replay would not repeat is refused while one is captured. The capture is pretended: no GPU."""

from functools import partial

import pytest
import torch
from helpers import NO_NATIVE, Problem, assert_same_bits, snapshot, step_by_closures, step_by_phases
from torch.optim import SGD, Adagrad, Adam, AdamW

from blur_optim import BLUR
from blur_optim.kernels import BACKENDS

FUSED = partial(AdamW, lr=0.1, fused=True)


@pytest.fixture
def capturing(monkeypatch):
    """Call it to begin the pretence."""

    def begin():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    return begin


def made(base=FUSED, warm=True, **options):
    problem = Problem()
    opt = BLUR(problem.params, base, **options)
    if warm:
        step_by_closures(opt, problem)
    return problem, opt


@pytest.mark.skipif(bool(NO_NATIVE), reason=NO_NATIVE)
@pytest.mark.parametrize("base", [FUSED, partial(Adam, lr=0.1, fused=True), partial(SGD, lr=0.1, fused=True)])
@pytest.mark.parametrize("options", [{}, {"stash": "int8"}, {"scope": "parameter", "max_grad_norm": 1.0}])
def test_what_a_graph_can_hold_is_taken(base, options, capturing):
    problem, opt = made(base, **options)
    capturing()
    step_by_closures(opt, problem)
    assert opt.statistics.skipped == 0


REFUSED = [
    ("unfused", partial(AdamW, lr=0.1), {}, r"AdamW asks the host whether to skip the step. Make it with fused=True"),
    ("a base of another kind", partial(Adagrad, lr=0.1, fused=True), {}, r"of Adagrad it is not known"),
    ("recompute", FUSED, {"stash": "recompute"}, r"stash='recompute' compares two evaluations on the host"),
    ("cpu", FUSED, {"stash": "cpu"}, r"stash='cpu' makes its buffers on the host"),
    ("metric", FUSED, {"metric": "retain"}, r"metric='retain' keeps the mean of a step for the next on the host"),
]


@pytest.mark.parametrize(("base", "options", "reason"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_it_cannot_is_refused_by_name(base, options, reason, capturing):
    problem, opt = made(base, **options)
    before = snapshot(opt)
    capturing()
    with pytest.raises(RuntimeError, match=rf"cannot be captured in a CUDA graph: {reason}.*Warm up"):
        step_by_closures(opt, problem)
    assert_same_bits(snapshot(opt), before)
    assert all(p.grad is None for p in problem.params)


def test_the_first_step_is_refused(capturing):
    problem, opt = made(warm=False)
    capturing()
    with pytest.raises(RuntimeError, match=r"the state of AdamW is not made yet\. Take a step first"):
        step_by_closures(opt, problem)


@pytest.mark.parametrize("name", ["lr", "gamma", "retain_weight"])
def test_a_tensor_on_the_cpu_is_refused(name, capturing):
    """Somebody made it a tensor to change it between replays, which would not see it."""
    problem, opt = made()
    opt.param_groups[0][name] = torch.tensor(0.1)
    capturing()
    with pytest.raises(RuntimeError, match=rf"`{name}` of param_groups\[0\] is a tensor on the CPU"):
        step_by_closures(opt, problem)


def test_triton_is_refused(capturing, monkeypatch):
    problem, opt = made()
    capturing()
    monkeypatch.setattr("blur_optim.step.capture.select_backend", lambda *_: BACKENDS["triton"])
    with pytest.raises(RuntimeError, match="backend='triton' copies a table from host memory that a replay reads"):
        step_by_closures(opt, problem)


def test_phases_need_a_base_that_torch_lets_step_in_a_capture(capturing):
    problem, opt = made()
    capturing()
    with pytest.raises(RuntimeError, match=r"AdamW refuses to step on p\.grad in a capture\. Make it with"):
        step_by_phases(opt, problem)


def test_outside_of_a_capture_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    problem, opt = made(partial(AdamW, lr=0.1), stash="recompute")
    step_by_closures(opt, problem)


def test_skipped_steps_are_counted_in_one_tensor():
    """A replay adds to the tensor that the capture added to. A new one for each step would be added to once."""
    problem, opt = made()
    counter = opt._two_phase.skipped
    for expected in (1, 2):
        opt.step(lambda: problem.forget_loss() * float("nan"), problem.retain_loss)
        assert opt._two_phase.skipped is counter
        assert counter == expected
    seen = opt.statistics
    opt.step(lambda: problem.forget_loss() * float("nan"), problem.retain_loss)
    assert (seen.skipped, opt.statistics.skipped) == (2, 3)


@pytest.mark.skipif(bool(NO_NATIVE), reason=NO_NATIVE)
def test_a_graph_reads_no_memory_that_a_later_step_may_give_back(capturing):
    """What steps keep for each other is neither read nor made in a capture: rates and weights are filled anew."""
    problem, opt = made()
    fused, rows = opt._two_phase.fused, opt._two_phase.plan._rows
    kept = [*fused._lrs.values(), *(t for pair in rows._on_device.values() for t in pair)]
    assert len(kept) == 3
    group, device = opt.param_groups[0], torch.device("cpu")
    assert fused.lr(group, device) is kept[0]
    assert rows.weights(device)[0] is kept[1]
    capturing()
    group["lr"], group["gamma"] = 0.2, 3.0  # Of a schedule: neither may be kept either.
    step_by_closures(opt, problem)
    fresh = [fused.lr(group, device), *rows.weights(device)]
    assert not any(new is old for new in fresh for old in kept)
    assert [*fused._lrs.values()] == kept[:1]
    assert opt._two_phase.plan._rows._on_device.get(device, (kept[1],))[0] is kept[1]
