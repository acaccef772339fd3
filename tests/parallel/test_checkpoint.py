"""torch.distributed.checkpoint through BLUR under FSDP2: resumed training is uninterrupted training."""

import random
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from forking import spawn
from helpers import Problem
from launch import join_group, leave_group, stop
from network import Losses, by_closures, by_phases, make_network, make_opt, whole
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from blur_optim import BLUR

STEPS = 12
SECONDS = 90  # For a job that takes 5 on an idle machine.


class Job:
    """Training that saves everything after each step, and begins with the last complete checkpoint, if there is one."""

    def __init__(self, folder, gamma=1.0, metric="euclidean"):
        self.folder = folder
        self.network = make_network(torch.float32)
        for block in self.network.blocks:
            fully_shard(block)
        fully_shard(self.network)
        options = {"gamma": gamma, "scope": "parameter", "max_grad_norm": 1.0, "metric": metric}
        self.opt = make_opt(self.network.parameters(), **options)
        self.losses = Losses(self.network, dist.get_rank(), dist.get_world_size())
        self.step = 0

    def train_until(self, last, save=True):
        while self.step < last:
            (by_closures if self.step % 2 else by_phases)(self.opt, self.losses)
            self.step += 1
            if save:
                self.save()
        return self

    def save(self):
        model, opt = get_state_dict(self.network, self.opt)
        dcp.save({"model": model, "opt": opt, "step": self.step}, checkpoint_id=self.folder / f"step-{self.step}")

    def resume(self):
        # The metadata comes last, when every rank has written its part.
        complete = [int(file.parent.name.split("-")[1]) for file in self.folder.glob("step-*/.metadata")]
        dist.barrier()  # Before a rank saves anew what another looks for.
        if complete:
            model, opt = get_state_dict(self.network, self.opt)
            state = {"model": model, "opt": opt, "step": 0}
            dcp.load(state, checkpoint_id=self.folder / f"step-{max(complete)}")
            set_state_dict(self.network, self.opt, model_state_dict=state["model"], optim_state_dict=state["opt"])
            self.step = state["step"]
        return self

    def everything(self):
        """Parameters and optimizer state, whole, and the hyperparameters."""
        state = [[p, *(v for _, v in sorted(self.opt.state[p].items()))] for p in self.network.parameters()]
        hyper = [{k: v for k, v in g.items() if k != "params"} for g in self.opt.param_groups]
        return [whole(t) for tensors in state for t in tensors], hyper


def run_job(rank, world_size, folder, last, metric):
    (folder / "ranks").mkdir(parents=True, exist_ok=True)
    join_group(rank, world_size, folder / "ranks")
    job = Job(folder, metric=metric).resume().train_until(last)
    result = job.everything()
    if rank == 0:
        torch.save(result, folder / "result.pt")
    leave_group()


def start(world_size, folder, last, metric="euclidean"):
    shutil.rmtree(folder / "ranks", ignore_errors=True)  # A store of processes that are gone.
    return spawn(world_size, run_job, world_size, folder, last, metric)


def run(world_size, folder, last, metric="euclidean"):
    processes = start(world_size, folder, last, metric)
    for process in processes:
        process.join(SECONDS)
    codes = [process.exitcode for process in processes]
    stop(processes)
    output = "".join(file.read_text()[-2000:] for file in sorted((folder / "ranks").glob("output-*")))
    assert codes == [0] * world_size, output
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("metric", ["euclidean", "retain"])
def test_a_fresh_optimizer_goes_on_to_the_bit(metric):
    folder = [Path(tempfile.mkdtemp())]
    dist.broadcast_object_list(folder)
    job = Job(folder[0], 0.5, metric).train_until(2, save=False)
    job.save()
    other = Job(folder[0], metric=metric).resume()
    (params, hyper), (other_params, other_hyper) = job.everything(), other.everything()
    assert hyper == other_hyper  # gamma too: the checkpoint's counts.
    assert all(torch.equal(p, q) for p, q in zip(params, other_params, strict=True))
    for j in (job, other):
        j.train_until(5, save=False)
    for p, q in zip(job.everything()[0], other.everything()[0], strict=True):
        assert torch.equal(p, q)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


def test_four_ranks_then_two_then_four(tmp_path):
    """In the metric of the retain loss, whose groups have a mean in them beside what the Euclidean ones have."""
    for world_size, last in ((4, 2), (2, 4)):
        run(world_size, tmp_path, last, "retain")
    resharded, hyper = run(4, tmp_path, 6, "retain")
    straight, same_hyper = run(4, tmp_path / "straight", 6, "retain")
    for group, same in zip(hyper, same_hyper, strict=True):
        torch.testing.assert_close(group.pop("retain_mean_sq"), same.pop("retain_mean_sq"), rtol=1e-4, atol=0)
    assert hyper == same_hyper
    for p, q in zip(resharded, straight, strict=True):
        # float32: other numbers of ranks add up in another order, and AdamW magnifies that.
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_killed_at_any_moment_it_resumes_from_the_last_complete_checkpoint(tmp_path):
    straight = run(2, tmp_path / "straight", STEPS)
    folder = tmp_path / "killed"
    chance = random.Random(0)

    def steps(complete):
        return {f.name for f in folder.glob("step-*") if (f / ".metadata").exists() == complete}

    killed_while_saving = 0
    for after in (2, 5, 8):
        processes = start(2, folder, STEPS)
        deadline = time.monotonic() + SECONDS
        # The first two times while a checkpoint is being written, then at any moment.
        while time.monotonic() < deadline and all(p.is_alive() for p in processes):
            if len(steps(True)) >= after and (after == 8 or steps(False)):
                break
            time.sleep(0.0005)
        if after == 8:
            time.sleep(chance.random() * 0.05)
        stop(processes)
        killed_while_saving += bool(steps(False))
    assert killed_while_saving
    resumed = run(2, folder, STEPS)
    assert resumed[1] == straight[1]
    for p, q in zip(resumed[0], straight[0], strict=True):
        assert torch.equal(p, q)


def test_a_flattened_state_dict_of_the_bare_base_has_no_gamma():
    """Should this fail, torch no longer asks for every hyperparameter, and docs/distributed.md can say less."""
    problem = Problem()
    bare = AdamW(problem.params, lr=0.1)
    opt = BLUR(problem.params, AdamW, lr=0.1)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(problem.model, bare, options=options)
    with pytest.raises(KeyError, match="gamma"):
        set_optimizer_state_dict(problem.model, opt, state, options=options)
    set_optimizer_state_dict(problem.model, opt, get_optimizer_state_dict(problem.model, bare))
