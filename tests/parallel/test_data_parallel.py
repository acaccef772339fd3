"""BLUR around DistributedDataParallel on two ranks: as on one process, and every rank the same to the bit."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from network import (
    Losses,
    assert_close,
    assert_same_on_all_ranks,
    by_closures,
    by_phases,
    make_network,
    make_opt,
    make_tokens,
    on_one_process,
    train,
)
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

pytestmark = pytest.mark.ranks(2)
steps = pytest.mark.parametrize("step", [by_phases, by_closures])


class UnderNoSync(Losses):
    """Micro-batches of the phases in ``unreduced``, and all but the last of the others, run under ``no_sync``."""

    unreduced = ()

    def _context(self, phase, part):
        return nullcontext() if part == self.parts - 1 and phase not in self.unreduced else self.model.no_sync()

    def forget(self, part=0):
        with self._context("forget", part):
            return super().forget(part)

    def retain(self, part=0):
        with self._context("retain", part):
            return super().retain(part)


def parallel(dtype=torch.float64, **options):
    # So small that there are several buckets, in the first backward and in the rebuilt ones after it.
    return DistributedDataParallel(make_network(dtype), bucket_cap_mb=1e-4, **options)


def check(model, step=by_phases, tolerance=1e-12, parts=1, expected=None, **options):
    opt = make_opt(model.parameters(), **options)
    actual = train(opt, UnderNoSync(model, dist.get_rank(), 2, parts), step)
    assert_same_on_all_ranks(actual[1])
    return assert_close(actual, expected or on_one_process(step, **options), tolerance)


# -- As on one process -------------------------------------------------------------------------------------------------

OPTIONS = [{}, {"gradient_as_bucket_view": True}, {"gradient_as_bucket_view": True, "find_unused_parameters": True}]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(options) or "defaults")
@steps
def test_equals_one_process(step, options, parts):
    return check(parallel(**options), step, parts=parts)


@pytest.mark.parametrize("as_view", [False, True])
@steps
def test_static_graph(step, as_view):
    return check(parallel(static_graph=True, gradient_as_bucket_view=as_view), step)


@steps
def test_comm_hook(step):
    model = parallel(gradient_as_bucket_view=True)
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    return check(model, step)


@pytest.mark.parametrize("stash", ["reference", "bfloat16"])
def test_compressing_comm_hook(stash):
    model = parallel(torch.float32)
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    # Gradients of 11 bits; AdamW turns their errors into a share of its steps of lr = 0.02.
    return check(model, by_closures, 0.02, expected=on_one_process(by_closures), stash=stash)


@pytest.mark.parametrize("stash", ["reference", "bfloat16", "int8"])
@steps
def test_stashes_hold_their_own_under_bucket_views(step, stash):
    # Every rank compresses the same gradient, so even int8 is as on one process.
    return check(parallel(gradient_as_bucket_view=True), step, stash=stash, scope="parameter", max_grad_norm=0.2)


@pytest.mark.parametrize("as_view", [False, True])
@steps
def test_zero_redundancy_optimizer_as_base(step, as_view):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # It warns that it uses what is deprecated.

    model = parallel(gradient_as_bucket_view=as_view)
    base = partial(ZeroRedundancyOptimizer, optimizer_class=AdamW)
    expected = on_one_process(step)
    opt = make_opt(model.parameters(), base=base)
    actual = train(opt, UnderNoSync(model, dist.get_rank(), 2), step)
    opt.consolidate_state_dict(to=0)  # The base's own methods are there.
    return assert_close(actual, expected)


def test_float32():
    return check(parallel(torch.float32), by_closures, 1e-5, expected=on_one_process(by_closures))


def test_replicas_stay_the_same_to_the_bit():
    model = parallel(torch.float32, gradient_as_bucket_view=True)
    opt = make_opt(model.parameters(), max_grad_norm=1.0)
    for i in range(100):
        (by_closures if i % 2 else by_phases)(opt, UnderNoSync(model, dist.get_rank(), 2))
    assert_same_on_all_ranks([p.detach() for p in model.parameters()])
    assert_same_on_all_ranks([s for p in model.parameters() for s in opt.state[p].values()])


# -- Uneven data -------------------------------------------------------------------------------------------------------


@steps
def test_a_rank_without_forget_data(step):
    """It computes the loss on other rows, times zero. The others weigh theirs by ranks / ranks with data."""
    network, model = make_network(), parallel(gradient_as_bucket_view=True)
    tokens, _ = make_tokens()

    def run(network, losses, weight):
        losses.forget = lambda part: network(tokens[: 3 + losses.rank]).square().mean() * weight
        return train(make_opt(network.parameters()), losses, step)

    expected = run(network, Losses(network), 1.0)
    losses = UnderNoSync(model, dist.get_rank(), 2)
    return assert_close(run(model, losses, 2.0 if dist.get_rank() == 0 else 0.0), expected)


@steps
def test_ranks_with_sequences_of_different_lengths(step):
    network, model = make_network(), parallel()
    tokens, _ = make_tokens()

    def loss(network, rank):
        return network(tokens[rank * 4 : rank * 4 + 4, : 2 + 2 * rank]).square().mean()

    one = Losses(network)
    one.forget = lambda part: (loss(network, 0) + loss(network, 1)) / 2
    two = UnderNoSync(model, dist.get_rank(), 2)
    two.forget = lambda part: loss(model, dist.get_rank())
    expected = train(make_opt(network.parameters()), one, step)
    return assert_close(train(make_opt(model.parameters()), two, step), expected)


@steps
def test_all_ranks_skip_together(step):
    model = parallel()
    opt = make_opt(model.parameters(), base=partial(AdamW, fused=True))
    before = [p.detach().clone() for p in model.parameters()]
    losses = UnderNoSync(model, dist.get_rank(), 2)
    retain = losses.retain
    losses.retain = lambda part: retain(part) * (float("nan") if dist.get_rank() == 1 else 1.0)
    step(opt, losses)
    assert int(opt.statistics.skipped) == 1
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# -- Refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("find_unused_parameters", [False, True])
@pytest.mark.parametrize("phase", ["forget", "retain"])
@steps
def test_a_phase_under_no_sync(step, phase, find_unused_parameters):
    model = parallel(find_unused_parameters=find_unused_parameters)
    opt = make_opt(model.parameters())
    losses = UnderNoSync(model, dist.get_rank(), 2, parts=2)
    step(opt, losses)
    before = [p.detach().clone() for p in model.parameters()]
    losses.unreduced = (phase,)
    with pytest.raises(RuntimeError, match=rf"{phase} phase must end with its gradients reduced.*no_sync\(\)"):
        step(opt, losses)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    losses.unreduced = ()
    model.zero_grad()
    step(opt, losses)
    assert_same_on_all_ranks([p.detach() for p in model.parameters()])


@steps
def test_a_wrapper_whose_parameters_are_added_later(step):
    """Two wrappers stand from the beginning, and the parameters of one come in mid-run."""
    first, second = make_network(), make_network()
    ours, theirs = (DistributedDataParallel(network, bucket_cap_mb=1e-4) for network in (first, second))
    opt = make_opt(ours.parameters())
    step(opt, UnderNoSync(ours, dist.get_rank(), 2, parts=2))
    opt.add_param_group({"params": list(theirs.parameters())})
    losses = UnderNoSync(theirs, dist.get_rank(), 2, parts=2)
    losses.unreduced = ("retain",)
    with pytest.raises(RuntimeError, match=r"retain phase must end with its gradients reduced.*no_sync\(\)"):
        step(opt, losses)


@steps
def test_a_wrapper_that_is_made_after_the_first_steps(step):
    """And another in its place: what was found of wrappers before does not hold then."""
    network = make_network()
    opt, whole = make_opt(network.parameters()), Losses(network)
    for _ in range(2):
        step(opt, whole)
    for _ in range(2):
        model = DistributedDataParallel(network, bucket_cap_mb=1e-4)
        losses = UnderNoSync(model, dist.get_rank(), 2, parts=2)
        step(opt, losses)
        assert_same_on_all_ranks([p.detach() for p in model.parameters()])
        losses.unreduced = ("retain",)
        with pytest.raises(RuntimeError, match=r"retain phase must end with its gradients reduced.*no_sync\(\)"):
            step(opt, losses)
        model.zero_grad()


@pytest.mark.parametrize("as_view", [False, True])
def test_both_forwards_before_both_backwards(as_view):
    """DDP prepares one backward alone, so the second would leave the gradients of this rank."""
    model = parallel(gradient_as_bucket_view=as_view)
    opt = make_opt(model.parameters())
    losses = UnderNoSync(model, dist.get_rank(), 2)
    forget, retain = losses.forget(), losses.retain()
    with opt.forget():
        forget.backward()
    match = r"retain phase must end with its gradients reduced.*in the phase itself"
    with pytest.raises(RuntimeError, match=match), opt.retain():
        retain.backward()


def test_a_forward_without_gradients_ends_no_phase():
    """An evaluation as the last thing in a phase leaves DDP as if under no_sync, but the gradients are reduced."""
    model = parallel()
    losses = UnderNoSync(model, dist.get_rank(), 2)
    forget = losses.forget

    def forget_and_evaluate(part):
        forget(part).backward()
        with torch.no_grad():
            return forget(part)

    losses.forget = forget_and_evaluate
    opt = make_opt(model.parameters())
    seen = [opt.step(lambda: losses.forget(0), lambda: losses.retain(0)) for _ in range(3)]
    assert len(seen) == 3
    return assert_close((torch.zeros(0), list(model.parameters())), (torch.zeros(0), on_one_process(by_closures)[1]))


@pytest.mark.parametrize("as_view", [False, True])
def test_recompute(as_view):
    model = parallel(gradient_as_bucket_view=as_view)
    opt = make_opt(model.parameters(), stash="recompute")
    with pytest.raises(RuntimeError, match=r"must be final .* stash='recompute'.* DistributedDataParallel averages"):
        by_closures(opt, UnderNoSync(model, dist.get_rank(), 2))
    assert all(p.grad is None for p in model.parameters())
