"""The recorder on many ranks: the alignment is that of one process, and one rank writes."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from network import (
    EXACT,
    Losses,
    assert_close,
    by_closures,
    by_phases,
    make_network,
    make_opt,
    own_losses,
    sharded,
    train,
)
from torch.nn.parallel import DistributedDataParallel

from blur_optim.record import Recorder, read_record


def shared_folder():
    """One folder for all ranks."""
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    return Path(names[0])


def record(network, losses, path, step, **options):
    opt = make_opt(network.named_parameters(), **options)
    with Recorder(path, opt, every=2, alignment=True) as recorder:
        for _ in range(4):
            step(opt, losses)
            recorder.record(rank=dist.get_rank())
    dist.barrier()
    return opt


def compare(network, losses, step, **options):
    folder = shared_folder()
    record(network, losses, folder / "ranks.jsonl", step, **options)
    actual = read_record(folder / "ranks.jsonl")
    if dist.get_rank() == 0:
        alone = make_network()
        opt = make_opt(alone.named_parameters(), **options)
        opt.record_alignment = True
        expected = []
        for _ in range(4):
            step(opt, Losses(alone))
            expected.append(opt.statistics)
        assert [line["step"] for line in actual.steps] == [1, 2, 4]
        assert actual.metadata["ranks"] == dist.get_world_size()
        assert actual.metadata["parameters"] == [name for name, _ in alone.named_parameters()]
        for line in actual.steps:
            statistics = expected[line["step"] - 1]
            assert line["rank"] == 0
            assert line["cosine"] == pytest.approx(float(statistics.cosine), rel=1e-10)
            alignment = line["alignment"]
            assert alignment["cosine"] == pytest.approx(statistics.parameter_cosines.tolist(), rel=1e-6, abs=1e-7)
            norms = statistics.parameter_dots.forget_norm_sq.sqrt()
            assert alignment["forget_norm"] == pytest.approx(norms.tolist(), rel=1e-6)
    dist.barrier()


@pytest.mark.parametrize("step", [by_phases, by_closures])
@pytest.mark.parametrize("scope", ["global", "parameter"])
@pytest.mark.ranks(2)
def test_fsdp2(scope, step):
    network = sharded()
    compare(network, own_losses(network), step, scope=scope)


@pytest.mark.ranks(4)
def test_uneven_and_empty_shards():
    network = sharded()
    compare(network, own_losses(network), by_closures)


@pytest.mark.ranks(2)
def test_recompute():
    network = sharded()
    compare(network, own_losses(network), by_closures, stash="recompute")


@pytest.mark.ranks(2)
def test_data_parallel():
    network = DistributedDataParallel(make_network())
    compare(network.module, own_losses(network), by_phases)


@pytest.mark.ranks(2)
def test_the_update_does_not_change():
    """In float64, for the sums over parameters are added in another order."""

    def run(alignment):
        network = sharded()
        opt = make_opt(network.parameters())
        opt.record_alignment = alignment
        return train(opt, own_losses(network), by_phases)

    return assert_close(run(True), run(False), EXACT)


@pytest.mark.ranks(2)
def test_one_all_reduce_also_where_the_alignment_is_recorded():
    network = sharded()
    opt = make_opt(network.parameters())
    opt.record_alignment = True
    sizes, all_reduce = [], dist.all_reduce

    def counting(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        by_phases(opt, own_losses(network))
    finally:
        dist.all_reduce = all_reduce
    assert sizes == [3 * len(list(network.parameters())) + 3]


@pytest.mark.ranks(2)
def test_all_ranks_go_on_at_the_step_that_the_file_of_rank_0_ends_with():
    folder = shared_folder()
    network = sharded()
    opt = make_opt(network.named_parameters())
    for _ in range(2):
        with Recorder(folder / "run.jsonl", opt) as recorder:
            by_phases(opt, own_losses(network))
            recorder.record(loss=torch.tensor(1.0))
    assert recorder.step == 2
    dist.barrier()
    assert len(list(folder.iterdir())) == 1
    steps = [json.loads(line).get("step") for line in (folder / "run.jsonl").read_text().splitlines()]
    assert [step for step in steps if step] == [1, 2]
