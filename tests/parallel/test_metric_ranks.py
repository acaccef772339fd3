"""``metric="retain"`` on many ranks: the numbers of one process, whatever wraps the parameters."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from network import (
    Losses,
    assert_close,
    by_closures,
    by_phases,
    make_network,
    make_opt,
    on_one_process,
    own_losses,
    sharded,
    train,
)
from test_fsdp1 import check as check_fsdp1
from test_fsdp1 import wrapped
from test_tensor_parallel import check as check_tensor_parallel
from test_tensor_parallel import parallelized
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

two_ranks = pytest.mark.ranks(2)
four_ranks = pytest.mark.ranks(4)
steps = pytest.mark.parametrize("step", [by_phases, by_closures])
METRIC = {"metric": "retain", "damping": 0.05}


@steps
@two_ranks
def test_fsdp2(step):
    opt = make_opt((network := sharded()).parameters(), **METRIC)
    return assert_close(train(opt, own_losses(network), step), on_one_process(step, **METRIC))


@four_ranks
def test_hsdp_with_empty_shards_and_a_row_for_each_parameter():
    options = {**METRIC, "scope": "parameter", "max_grad_norm": 0.5, "base": partial(SGD, momentum=0.9)}
    opt = make_opt((network := sharded(shape=(2, 2))).parameters(), **options)
    return assert_close(train(opt, own_losses(network), by_closures), on_one_process(by_closures, **options))


@two_ranks
def test_tensor_parallel_with_plain_parameters_beside():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    return check_tensor_parallel(parallelized(make_network(), mesh, False), by_closures, **METRIC)


@two_ranks
def test_fsdp1():
    return check_fsdp1(wrapped(), by_phases, **METRIC)


@two_ranks
def test_data_parallel():
    network = DistributedDataParallel(make_network())
    opt = make_opt(network.parameters(), **METRIC)
    losses = Losses(network, dist.get_rank(), dist.get_world_size())
    return assert_close(train(opt, losses, by_phases), on_one_process(by_phases, **METRIC))


@two_ranks
def test_one_all_reduce_a_step():
    """Two in the first step, which has to sum the second moments before it can damp."""
    calls, reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), reduce(*args, **kwargs))[1]
    try:
        opt = make_opt((network := sharded()).parameters(), **METRIC)
        losses, counts = own_losses(network), []
        for _ in range(3):
            opt.step(losses.forget, losses.retain)
            counts.append(len(calls))
            calls.clear()
    finally:
        dist.all_reduce = reduce
    assert counts == [2, 1, 1]
    mean = opt.param_groups[0]["retain_mean_sq"]
    means = [torch.zeros_like(mean) for _ in range(2)]
    dist.all_gather(means, mean)
    assert torch.equal(*means)
