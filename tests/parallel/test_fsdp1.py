"""BLUR under ``FullyShardedDataParallel``: flattened parameters, of which a rank may hold no part and no gradient."""

import pytest
import torch
import torch.distributed as dist
from network import Block, Losses, assert_close, by_closures, by_phases, make_network, make_opt, on_one_process, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

two_ranks = pytest.mark.ranks(2)
four_ranks = pytest.mark.ranks(4)
steps = pytest.mark.parametrize("step", [by_phases, by_closures])


def wrapped(**options):
    return FullyShardedDataParallel(
        make_network(),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        device_id=torch.device("cpu"),
        **{"use_orig_params": True, **options},
    )


def check(network, step, **options):
    opt = make_opt(network.parameters(), **options)
    losses = Losses(network, dist.get_rank(), dist.get_world_size())
    return check_training(network, opt, losses, step, **options)


def check_training(network, opt, losses, step, **options):
    seen, _ = train(opt, losses, step)
    with FullyShardedDataParallel.summon_full_params(network):
        names = [name.replace("_fsdp_wrapped_module.", "") for name, _ in network.named_parameters()]
        found = dict(zip(names, (p.detach().clone() for p in network.parameters()), strict=True))
    expected_seen, expected = on_one_process(step, **options)
    order = [name for name, _ in make_network().named_parameters()]
    return assert_close((seen, [found[name] for name in order]), (expected_seen, expected))


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
@steps
@two_ranks
def test_strategies(step, strategy):
    return check(wrapped(sharding_strategy=ShardingStrategy[strategy]), step)


@pytest.mark.parametrize("options", [{"scope": "parameter"}, {"stash": "bfloat16"}, {"max_grad_norm": 0.1}], ids=str)
@four_ranks
def test_four_ranks(options):
    network = wrapped()
    held = [p.numel() > 0 for p in network.parameters()]
    assert not all(held)  # Each rank lacks some parameters.
    return check(network, by_closures, **options)


@steps
@four_ranks
def test_hybrid(step):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return check(wrapped(sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=mesh), step)


@steps
@two_ranks
def test_flat_parameters(step):
    network = wrapped(use_orig_params=False)
    opt = make_opt(network.parameters())
    seen, _ = train(opt, Losses(network, dist.get_rank(), 2), step)
    return assert_close((seen, []), (on_one_process(step)[0], []))


@pytest.mark.parametrize("phase", ["forget", "retain"])
@pytest.mark.parametrize("use_orig_params", [True, False])
@two_ranks
def test_a_phase_under_no_sync(phase, use_orig_params):
    network = wrapped(use_orig_params=use_orig_params)
    opt = make_opt(network.parameters())
    losses = Losses(network, dist.get_rank(), 2)
    inner = getattr(losses, phase)

    def under_no_sync(part=0):
        with network.no_sync():
            inner(part).backward()

    setattr(losses, phase, under_no_sync)
    with pytest.raises(RuntimeError, match=f"{phase} phase must end with its gradients reduced"):
        opt.step(losses.forget, losses.retain)
    setattr(losses, phase, inner)
    return check_training(network, opt, losses, by_closures) if use_orig_params else None


@two_ranks
def test_unsharded():
    network = wrapped(sharding_strategy=ShardingStrategy.NO_SHARD)
    opt = make_opt(network.parameters())
    with pytest.raises(ValueError, match="must not have NO_SHARD as its strategy"):
        by_phases(opt, Losses(network, dist.get_rank(), 2))


@pytest.mark.parametrize("use_orig_params", [True, False])
@two_ranks
def test_recompute(use_orig_params):
    network = wrapped(use_orig_params=use_orig_params)
    opt = make_opt(network.parameters(), stash="recompute")
    losses = Losses(network, dist.get_rank(), 2)
    with pytest.raises(RuntimeError, match=r"must not be 'recompute' under FullySharded.*fully_shard"):
        by_closures(opt, losses)
