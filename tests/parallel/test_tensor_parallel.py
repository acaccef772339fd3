"""BLUR under tensor parallelism, alone and under FSDP2; parameters on several meshes, and plain ones beside them."""

import pytest
import torch
import torch.distributed as dist
from network import Losses, assert_close, by_closures, by_phases, make_network, make_opt, on_one_process, train, whole
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

two_ranks = pytest.mark.ranks(2)
four_ranks = pytest.mark.ranks(4)
steps = pytest.mark.parametrize("step", [by_phases, by_closures])


def parallelized(network, mesh, sequence_parallel):
    """Cut the inner linear layers; with ``sequence_parallel`` also the sequence: gradients of norms are then partial.

    The head and ``gain`` stay plain tensors.
    """
    if not sequence_parallel:
        plan = {f"blocks.{i}.{name}": style() for i in range(2) for name, style in LAYERS.items()}
        return parallelize_module(network, mesh, plan)
    plan = {"embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))}
    for i in range(2):
        plan |= {
            f"blocks.{i}.norm": SequenceParallel(),
            f"blocks.{i}.up": ColwiseParallel(input_layouts=Shard(1)),
            f"blocks.{i}.down": RowwiseParallel(output_layouts=Shard(1)),
        }
    plan["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    return parallelize_module(network, mesh, plan)


LAYERS = {"up": ColwiseParallel, "down": RowwiseParallel}
sequence = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])


def check(network, step, losses=None, expected=None, **options):
    opt = make_opt(network.parameters(), **options)
    actual = train(opt, losses or Losses(network), step)
    return assert_close(actual, expected or on_one_process(step, **options))


@sequence
@steps
@two_ranks
def test_tensor_parallel(step, sequence_parallel):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    network = parallelized(make_network(), mesh, sequence_parallel)
    placements = []
    network.blocks[0].norm.weight.register_post_accumulate_grad_hook(
        lambda p: placements.extend(getattr(p.grad, "placements", ()))
    )
    error = check(network, step, max_grad_norm=0.1)
    assert any(isinstance(p, Partial) for p in placements) == sequence_parallel
    return error


@sequence
@two_ranks
def test_recompute(sequence_parallel):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    network = parallelized(make_network(), mesh, sequence_parallel)
    return check(network, by_closures, expected=on_one_process(by_closures), stash="recompute")


@sequence
@steps
@four_ranks
def test_tensor_parallel_under_fsdp2(step, sequence_parallel):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    network = parallelized(make_network(), mesh["tensor"], sequence_parallel)
    for block in network.blocks:
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(network, mesh=mesh["shard"])
    # Some lie on both dimensions, the others on one.
    assert {p.device_mesh.ndim for p in network.parameters()} == {1, 2}
    losses = Losses(network, mesh.get_local_rank("shard"), 2)
    return check(network, step, losses, scope="parameter")


@four_ranks
def test_one_all_reduce_a_step_on_several_meshes():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    network = parallelized(make_network(), mesh["tensor"], False)
    fully_shard(network, mesh=mesh["shard"])
    opt = make_opt(network.parameters())
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **kwargs: (
        calls.append(tensor.numel()) or all_reduce(tensor, *args, **kwargs)
    )
    try:
        by_phases(opt, Losses(network, mesh.get_local_rank("shard"), 2))
    finally:
        dist.all_reduce = all_reduce
    assert calls == [6]


def distributed_problem(make):
    """Four parameters with the gradients of a fixed linear loss; ``make`` says how each is distributed."""
    torch.manual_seed(3)
    values = [torch.randn(6, 5, dtype=torch.float64) for _ in range(4)]
    forget, retain = ([torch.randn_like(v) for v in values] for _ in range(2))
    return [nn.Parameter(make(i, v)) for i, v in enumerate(values)], forget, retain


def step_on_given_gradients(make):
    params, forget, retain = distributed_problem(make)
    opt = make_opt(params)
    for _ in range(3):
        for phase, grads in ((opt.forget, forget), (opt.retain, retain)):
            with phase():
                for i, (p, g) in enumerate(zip(params, grads, strict=True)):
                    p.grad = make(i, g)
        opt.step()
        opt.zero_grad()
    return opt.statistics.forget_coefficient, [whole(p) for p in params]


@four_ranks
def test_parameters_on_slices_of_one_mesh_and_plain_ones():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    ways = [(mesh, [Shard(0), Shard(1)]), (mesh["a"], [Shard(0)]), (mesh, [Replicate(), Shard(1)]), None]

    def make(i, value):
        return distribute_tensor(value.clone(), *ways[i]) if ways[i] else value.clone()

    return assert_close(step_on_given_gradients(make), step_on_given_gradients(lambda i, value: value.clone()))


@pytest.mark.parametrize("dims", [1, 2])
@four_ranks
def test_a_mesh_of_some_of_the_ranks(dims):
    """Two pairs of ranks that train on their own: nothing of one pair gets into the sums of the other."""
    first = dist.get_rank() < 2
    meshes = [DeviceMesh("cpu", ranks if dims == 1 else [ranks]) for ranks in ([0, 1], [2, 3])]
    mesh = meshes[0 if first else 1]
    placements = [Replicate(), Shard(0)][-dims:]

    def make(i, value):
        value = value * (1 if first else 3)
        return distribute_tensor(value, mesh, placements)

    return assert_close(
        step_on_given_gradients(make), step_on_given_gradients(lambda i, value: value * (1 if first else 3))
    )


@pytest.mark.parametrize("backend", ["foreach", None], ids=["plain path", "default"])
@two_ranks
def test_a_gradient_that_is_still_on_its_way(backend):
    mesh = init_device_mesh("cpu", (2,))
    finals = []
    for late in (False, True):
        p = nn.Parameter(distribute_tensor(torch.ones(5), mesh, [Replicate()]))
        opt = make_opt([p], backend=backend)
        opt_grads = [DTensor.from_local(torch.arange(5.0) - i, mesh, [Partial()]) for i in range(2)]
        for phase, grad in zip((opt.forget, opt.retain), opt_grads, strict=True):
            with phase():
                p.grad = grad.redistribute(placements=[Replicate()], async_op=late)
        opt.step()
        finals.append(whole(p))
    assert torch.equal(*finals)


@four_ranks
def test_meshes_of_different_ranks():
    pairs = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    everywhere, pair = init_device_mesh("cpu", (4,)), pairs[dist.get_rank() // 2]
    with pytest.raises(ValueError, match=r"must lie on slices of one DeviceMesh, got meshes of ranks \[\(0, 1"):
        step_on_given_gradients(lambda i, value: distribute_tensor(value, pair if i else everywhere, [Shard(0)]))


@two_ranks
def test_a_gradient_that_is_distributed_otherwise():
    mesh, other = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    opt = make_opt([p])
    with (
        pytest.raises(TypeError, match=r"gradient of .*\[0\] must be a DTensor on the mesh of its parameter"),
        opt.forget(),
    ):
        p.grad = distribute_tensor(torch.ones(4, 4), other, [Shard(0), Replicate()])
    assert p.grad is None


@two_ranks
def test_a_partial_parameter():
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    opt = make_opt([p])
    with opt.forget():
        p.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    with pytest.raises(ValueError, match="must be sharded or replicated, got"), opt.retain():
        p.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
