"""BLUR under ``fully_shard``, alone and with replicas (HSDP): the same numbers as on one process."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from network import (
    EXACT,
    Losses,
    assert_close,
    by_closures,
    by_phases,
    everything,
    make_network,
    make_opt,
    make_tokens,
    on_one_process,
    own_losses,
    sharded,
    train,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.optim import SGD, AdamW

two_ranks = pytest.mark.ranks(2)
four_ranks = pytest.mark.ranks(4)
steps = pytest.mark.parametrize("step", [by_phases, by_closures])


def check(network, step=by_phases, tolerance=EXACT, parts=1, step_options=None, expected=None, **options):
    opt = make_opt(network.parameters(), **options)
    actual = train(opt, own_losses(network, parts), step, **(step_options or {}))
    return assert_close(actual, expected or on_one_process(step, **options), tolerance)


# -- As on one process -------------------------------------------------------------------------------------------------


@steps
@pytest.mark.parametrize("reshard", [True, False])
@two_ranks
def test_reshard_after_forward(reshard, step):
    return check(sharded(reshard_after_forward=reshard), step)


@steps
@two_ranks
def test_cpu_offload(step):
    return check(sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)), step)


@steps
@four_ranks
def test_uneven_and_empty_shards(step):
    network = sharded()
    empty = [name for name, p in network.named_parameters() if p.to_local().numel() == 0]
    assert bool(empty) == (dist.get_rank() > 0)  # The last ranks hold nothing of `gain` and of the head.
    return check(network, step)


@steps
@two_ranks
def test_accumulation_that_reduces_the_last_micro_batch(step):
    network = sharded()
    return check(network, step, parts=2, step_options={"synced": network.set_requires_gradient_sync})


@steps
@two_ranks
def test_accumulation_that_reduces_every_micro_batch(step):
    return check(sharded(), step, parts=2)


@steps
@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (1, 4)], ids=str)
@four_ranks
def test_hsdp(shape, step):
    return check(sharded(shape=shape), step)


@steps
@four_ranks
def test_hsdp_that_reduces_over_replicas_last(step):
    network = sharded(shape=(2, 2))
    return check(network, step, parts=2, step_options={"synced": network.set_requires_all_reduce})


@pytest.mark.parametrize("scope", ["group", "parameter"])
@four_ranks
def test_scope(scope):
    return check(sharded(shape=(2, 2)), by_closures, scope=scope, max_grad_norm=0.5)


@pytest.mark.parametrize("rule", ["retain_first", "conflict", "normalized"])
@two_ranks
def test_rules(rule):
    return check(sharded(), by_closures, rule=rule)


@steps
@two_ranks
def test_clipping(step):
    return check(sharded(), step, max_grad_norm=0.1)


@steps
@two_ranks
def test_bfloat16_stash(step):
    return check(sharded(), step, stash="bfloat16")  # Rounded element by element, so as on one process.


@steps
@two_ranks
def test_int8_stash(step):
    # Blocks of 256 start anew in every shard, so other values are rounded together. Rounding is at most 1/254 of the
    # largest value of a block; AdamW makes a step of the size lr = 0.02 of each.
    return check(sharded(), step, tolerance=0.02, stash="int8")


@pytest.mark.parametrize("parts", [1, 2])
@two_ranks
def test_recompute(parts):
    network = sharded()
    options = {"synced": network.set_requires_gradient_sync}
    expected = on_one_process(by_closures)
    return check(network, by_closures, parts=parts, step_options=options, expected=expected, stash="recompute")


@pytest.mark.parametrize("backend", ["foreach", None], ids=["plain path", "default"])
@pytest.mark.parametrize(
    "base",
    [partial(AdamW, fused=True), partial(AdamW, foreach=False), partial(SGD, momentum=0.9, nesterov=True)],
    ids=["AdamW fused", "AdamW for-loop", "SGD"],
)
@two_ranks
def test_base_optimizers(base, backend):
    return check(sharded(), by_closures, base=base, backend=backend)


@steps
@two_ranks
def test_float32(step):
    expected = on_one_process(step)
    # The moments of AdamW magnify the rounding of small gradients.
    return check(sharded(torch.float32), step, tolerance=1e-5, expected=expected)


@steps
@two_ranks
def test_mixed_precision(step):
    network = sharded(
        torch.float32, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    )
    assert all(p.dtype == torch.float32 for p in network.parameters())
    # A bfloat16 forward has 3 digits; a gradient that is off by per cents still gives a step of at most lr = 0.02.
    return check(network, step, tolerance=0.04, expected=on_one_process(step))


@two_ranks
def test_bfloat16_parameters():
    network = sharded(torch.bfloat16)
    return check(network, by_phases, tolerance=0.04, expected=on_one_process(by_phases))


@steps
@two_ranks
def test_parameters_that_one_loss_does_not_reach(step):
    def run(network, losses):
        losses.forget = lambda part: losses._scaled(network.embed(losses.forget_rows[part]))
        return train(make_opt(network.parameters()), losses, step)

    network = make_network()
    expected = run(network, Losses(network))
    network = fully_shard(make_network())
    plain = type(network).forward

    def forward(self, tokens, only_embed=False):
        return self.embed(tokens) if only_embed else plain(self, tokens)

    type(network).forward = forward
    losses = own_losses(network)
    losses.forget = lambda part: losses._scaled(network(losses.forget_rows[part], only_embed=True))
    try:
        return assert_close(train(make_opt(network.parameters()), losses, step), expected)
    finally:
        type(network).forward = plain


# -- Once, and together ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "parameter"])
@four_ranks
def test_one_small_all_reduce_a_step(scope):
    network = sharded()
    opt = make_opt(network.parameters(), scope=scope)
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **kwargs: (
        calls.append(tensor.numel()) or all_reduce(tensor, *args, **kwargs)
    )
    try:
        for step in (by_phases, by_closures):
            step(opt, own_losses(network))
    finally:
        dist.all_reduce = all_reduce
    rows = 1 if scope == "global" else len(list(network.parameters()))
    assert calls == [3 * (rows + 1)] * 2


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("where", ["in the data", "in one shard"])
@steps
@two_ranks
def test_all_ranks_skip_together(step, where, fused):
    network = sharded()
    opt, losses = make_opt(network.parameters(), base=partial(AdamW, fused=fused)), own_losses(network)
    step(opt, losses)
    before = everything(opt)
    retain = losses.retain
    losses.retain = lambda part: retain(part) * (float("nan") if dist.get_rank() == 1 else 1.0)
    if where == "in one shard":
        losses.retain = retain
        if dist.get_rank() == 1:
            network.head.weight.register_post_accumulate_grad_hook(lambda p: p.grad.to_local().fill_(float("nan")))
    step(opt, losses)
    assert int(opt.statistics.skipped) == 1
    assert all(torch.equal(a, b) for a, b in zip(everything(opt), before, strict=True))


@pytest.mark.parametrize("spoilt", [False, True])
@two_ranks
def test_grad_scaler(spoilt):
    network = sharded()
    opt, losses = make_opt(network.parameters(), max_grad_norm=0.1), own_losses(network)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(opt, losses):
        with opt.forget():
            scaler.scale(losses.forget()).backward()
        with opt.retain(grad_scale=scaler):
            scaler.scale(losses.retain()).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()

    if not spoilt:
        return assert_close(train(opt, losses, step), on_one_process(by_phases, max_grad_norm=0.1))
    before = everything(opt)
    if dist.get_rank() == 1:
        network.head.weight.register_post_accumulate_grad_hook(lambda p: p.grad.to_local().fill_(float("inf")))
    step(opt, losses)
    assert scaler.get_scale() == 512.0  # On both ranks.
    assert all(torch.equal(a, b) for a, b in zip(everything(opt), before, strict=True))
    return None


@two_ranks
def test_both_forwards_before_both_backwards():
    def step(opt, losses):
        forget, retain = losses.forget(), losses.retain()
        with opt.forget():
            forget.backward()
        with opt.retain():
            retain.backward()
        opt.step()
        opt.zero_grad()

    return check(sharded(reshard_after_forward=False), step, expected=on_one_process(by_phases))


@steps
@two_ranks
def test_a_rank_without_forget_data(step):
    """It computes the loss on other rows, times zero. The others weigh theirs by ranks / ranks with data."""
    tokens, _ = make_tokens()

    def run(network, losses, weight):
        losses.forget = lambda part: network(tokens[: 3 + losses.rank]).square().mean() * weight
        return train(make_opt(network.parameters()), losses, step)

    network = make_network()
    expected = run(network, Losses(network), 1.0)
    network = sharded()
    return assert_close(run(network, own_losses(network), 2.0 if dist.get_rank() == 0 else 0.0), expected)


@four_ranks
def test_replicas_stay_the_same_to_the_bit():
    network = sharded(torch.float32, shape=(2, 2))
    opt = make_opt(network.parameters(), max_grad_norm=1.0)
    for i in range(100):
        (by_closures if i % 2 else by_phases)(opt, own_losses(network))
    for p in network.parameters():
        local = p.to_local().contiguous()
        other = torch.empty_like(local)
        replicas = p.device_mesh["replicate"].get_group()
        copies = [torch.empty_like(other) for _ in range(2)]
        dist.all_gather(copies, local, group=replicas)
        assert torch.equal(*copies)
