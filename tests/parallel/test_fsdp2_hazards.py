"""What FSDP2 would let pass without a sign is an error of BLUR, and the step after it is right."""

import pytest
import torch
import torch.distributed as dist
from network import assert_close, by_closures, by_phases, make_opt, on_one_process, own_losses, sharded, train, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from blur_optim.parallel.fsdp2 import holds_back

two_ranks = pytest.mark.ranks(2)
four_ranks = pytest.mark.ranks(4)
steps = pytest.mark.parametrize("step", [by_phases, by_closures])


def assert_refused(opt, step, match):
    """``step`` raises on every rank, nothing has changed, nothing is kept, and the next step is right."""
    before = [whole(p) for group in opt.param_groups for p in group["params"]]
    with pytest.raises(RuntimeError, match=match):
        step()
    params = [p for group in opt.param_groups for p in group["params"]]
    assert all(torch.equal(whole(p), b) for p, b in zip(params, before, strict=True))
    assert all(p.grad is None for p in params)
    assert not holds_back(params)


@pytest.mark.parametrize("own_dtype", [False, True])
@pytest.mark.parametrize("phase", ["forget", "retain"])
@steps
@two_ranks
def test_a_phase_that_ends_unreduced(step, phase, own_dtype):
    # With a dtype of its own for the reduction, FSDP2 holds the gradients in another place.
    network = sharded(mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float64 if own_dtype else None))
    opt, losses = make_opt(network.parameters()), own_losses(network)
    inner = getattr(losses, phase)

    def unreduced(part=0):
        network.set_requires_gradient_sync(False)
        return inner(part)

    setattr(losses, phase, unreduced)
    assert_refused(
        opt, lambda: step(opt, losses), f"{phase} phase must end with its gradients reduced.*set_requires_gr"
    )
    network.set_requires_gradient_sync(True)
    setattr(losses, phase, inner)
    return assert_close(train(opt, losses, step), on_one_process(step))


@pytest.mark.parametrize("phase", ["forget", "retain"])
@steps
@four_ranks
def test_a_phase_that_ends_unreduced_over_replicas(step, phase):
    network = sharded(shape=(2, 2))
    opt, losses = make_opt(network.parameters()), own_losses(network)
    inner = getattr(losses, phase)

    def unreduced(part=0):
        network.set_requires_all_reduce(False)
        return inner(part)

    setattr(losses, phase, unreduced)
    assert_refused(
        opt, lambda: step(opt, losses), f"{phase} phase must end with its gradients reduced.*requires_all_re"
    )
    network.set_requires_all_reduce(True)
    setattr(losses, phase, inner)
    return assert_close(train(opt, losses, step), on_one_process(step))


@two_ranks
def test_recompute_whose_retain_closure_ends_unreduced():
    network = sharded()
    opt, losses = make_opt(network.parameters(), stash="recompute"), own_losses(network)
    inner = losses.retain

    def unreduced(part=0):
        network.set_requires_gradient_sync(False)
        return inner(part)

    losses.retain = unreduced
    assert_refused(opt, lambda: by_closures(opt, losses), "retain phase must end with its gradients reduced")
    network.set_requires_gradient_sync(True)
    losses.retain = inner
    return assert_close(train(opt, losses, by_closures), on_one_process(by_closures))


@two_ranks
def test_a_step_that_fails_between_micro_batches_leaves_nothing_behind():
    network = sharded()
    opt, losses = make_opt(network.parameters()), own_losses(network, parts=2)

    def fail_before_the_last(last):
        network.set_requires_gradient_sync(last)
        if last:
            raise RuntimeError("the second micro-batch is broken")

    assert_refused(opt, lambda: by_phases(opt, losses, fail_before_the_last), "second micro-batch is broken")
    options = {"synced": network.set_requires_gradient_sync}
    return assert_close(train(opt, losses, by_phases, **options), on_one_process(by_phases))


@two_ranks
def test_interleaved_phases():
    network = sharded()
    opt, losses = make_opt(network.parameters()), own_losses(network, parts=2)

    def interleaved():
        for part in range(2):
            with opt.forget():
                losses.forget(part).backward()
            with opt.forget():
                losses.retain(part).backward()

    assert_refused(opt, interleaved, r"opt\.forget\(\) cannot run now: the forget gradients wait")


@pytest.mark.parametrize("phase", ["forget", "retain"])
@two_ranks
def test_ranks_with_different_gradients(phase):
    network = sharded()
    opt, losses = make_opt(network.parameters()), own_losses(network)
    with opt.forget():
        losses.forget().backward()
        if phase == "forget" and dist.get_rank() == 1:
            network.gain.grad = None

    def end():
        with opt.retain():
            losses.retain().backward()
            if phase == "retain" and dist.get_rank() == 1:
                network.gain.grad = None

    assert_refused(opt, end, "All ranks must take the same step")
    return assert_close(train(opt, losses, by_phases), on_one_process(by_phases))


@two_ranks
def test_ranks_with_different_settings():
    network = sharded()
    opt, losses = make_opt(network.parameters(), gamma=1.0 + dist.get_rank()), own_losses(network)
    assert_refused(opt, lambda: by_closures(opt, losses), r"same step, got different ones.*gamma \[[12]\.0\]")


@four_ranks
def test_ranks_with_different_parameters():
    """As in the stages of a pipeline, if they differ in size."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "shard"))
    opt, step = one_layer(mesh, 4 + mesh.get_local_rank("other"))
    assert_refused(opt, step, r"All ranks must take the same step.*2 parameters of (20|25) elements")


@four_ranks
def test_pipeline_stages_of_equal_size():
    # Not 4: for shapes that it has seen DTensor hands out a mesh that is equal, but may be a slice of another.
    _, step = one_layer(init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "shard")), 6)
    with pytest.raises(ValueError, match="Pipeline stages, which hold other parameters each"):
        step()


def one_layer(mesh, width):
    layer = fully_shard(torch.nn.Linear(4, width, dtype=torch.float64), mesh=mesh["shard"])
    opt = make_opt(layer.parameters())
    x = torch.ones(2, 4, dtype=torch.float64)
    return opt, lambda: opt.step(lambda: layer(x).sum(), lambda: layer(x).sin().sum())
