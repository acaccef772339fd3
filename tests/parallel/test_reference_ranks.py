"""Reference log-probabilities that ranks compute together: all that one process computes, on every rank."""

import itertools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from blur_optim.losses import ReferenceLogProbs, reference_log_probs
from blur_optim.losses.reference_ranks import input_device

pytest.importorskip("safetensors", reason="safetensors is not installed")

VOCABULARY, WIDTH = 11, 5


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.calls = 0

    def forward(self, input_ids, attention_mask=None):
        self.calls += 1
        return SimpleNamespace(logits=self.head(self.dropout(self.inner(self.embedding(input_ids)).tanh())))


def make_batch(rows, length=6):
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(VOCABULARY, (20, length), generator=generator)[list(rows)]
    return {"input_ids": ids, "labels": ids.clone()}


def shard(model, way="fsdp2"):
    if way == "fsdp2":
        fully_shard(model.inner)
        return fully_shard(model)
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def shared_path():
    """One file's name for all ranks."""
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    return Path(names[0]) / "made" / "reference.safetensors"


def compute(path, model, rows, size=2, **options):
    batches = [make_batch(rows[i : i + size]) for i in range(0, len(rows), size)]
    return ReferenceLogProbs.load_or_compute(path, model, batches, **{"progress": False, **options})


def assert_complete(stored, rows):
    batch = make_batch(rows)
    torch.testing.assert_close(stored(batch), reference_log_probs(Model(), batch), rtol=1e-5, atol=1e-5)


# Rank 0 has three batches where rank 1 has one: it must not wait for ever in the forward of the second.
MINE = [[0, 1, 2, 3, 4], [4, 5]]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", ["fsdp2", "fsdp1"])
def test_sharded(way):
    path, model = shared_path(), shard(Model(), way)
    model.train()
    stored = compute(path, model, MINE[dist.get_rank()])
    assert len(stored) == stored.computed == 6
    assert_complete(stored, range(6))
    assert_complete(ReferenceLogProbs.load(path), range(6))
    assert model.training
    # Nothing stays gathered: an optimizer made now would have whole parameters that are dropped later.
    assert way == "fsdp1" or all(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.ranks(2)
def test_what_is_in_the_file_is_not_computed_again():
    path, model = shared_path(), Model()
    compute(path, shard(model), MINE[dist.get_rank()])
    calls = model.calls
    again = compute(path, model, [0, 1, 2, 3], size=4)
    assert (again.computed, model.calls) == (0, calls)
    more = compute(path, model, [0, 6] if dist.get_rank() else [0, 1], size=4)
    assert (more.computed, len(more), model.calls) == (1, 7, calls + 1)
    assert_complete(more, [*range(7)])
    # The unsharded model has the same fingerprint, so one process may have made the file, or may read it.
    alone = compute(path, Model(), [*range(7)])
    assert alone.computed == 0


@pytest.mark.ranks(2)
def test_a_replicated_model():
    path, model = shared_path(), Model()
    stored = compute(path, model, MINE[dist.get_rank()], across_ranks=True)
    assert_complete(stored, range(6))
    assert_complete(ReferenceLogProbs.load(path), range(6))
    assert model.calls == (3, 1)[dist.get_rank()]  # Nobody waits for it, so it runs nothing twice.


@pytest.mark.ranks(2)
def test_an_example_in_several_batches_is_computed_once():
    path, model = shared_path(), Model()
    rows = [0, 1, 2, 0, 1, 0]
    compute(path, model, rows, across_ranks=True)
    assert model.calls == 2


@pytest.mark.ranks(2)
def test_a_tensor_parallel_group_passes_the_same_batches():
    path, model = shared_path(), Model()
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"inner": RowwiseParallel(input_layouts=Replicate())})
    rows = [0, 1, 2]
    expected = reference_log_probs(Model(), make_batch(rows))
    for options in ({}, {"across_ranks": True}):
        stored = compute(path.with_name(f"{len(options)}-{dist.get_rank()}"), model, rows, **options)
        torch.testing.assert_close(stored(make_batch(rows)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.ranks(2)
def test_the_file_is_written_every_so_often():
    path, model, sizes = shared_path(), shard(Model()), []

    def watched(batches):
        for batch in batches:
            sizes.append(len(ReferenceLogProbs.load(path)) if path.exists() else 0)
            yield batch

    compute(path, model, MINE[dist.get_rank()], save_every=0.0, progress=watched)
    # Each turn begins by looking for a batch, then the last one's results are written.
    expected = [0, 0, 4] if dist.get_rank() == 0 else [0]
    assert sizes == expected


@pytest.mark.ranks(2)
def test_the_time_between_two_files():
    """A clock that goes a second forward each time that it is read."""
    path, model, written = shared_path(), shard(Model()), []
    ticks = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blur_optim.losses.reference_ranks.time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
        patch.setattr(ReferenceLogProbs, "save", lambda self, path: written.append(len(self)))
        compute(path, model, range(8), size=1, save_every=3.0)
    # It is read at the beginning, after each forward but the last, and after each writing: 3 s are 3 forwards.
    assert written == ([3, 6, 8] if dist.get_rank() == 0 else [])


def assert_raises_everywhere(own, others, call):
    """The rank ``own[0]`` raises what it met; each other one says so, by the same class if it is a usual one."""
    rank, expected, text = own
    theirs = expected if expected in (ValueError, OSError) else RuntimeError
    error = (expected, text) if dist.get_rank() == rank else (theirs, f"Rank {rank} could not go on: {others}")
    with pytest.raises(error[0], match=error[1]):
        call()
    dist.barrier()  # Nobody is left behind in another collective.


@pytest.mark.ranks(2)
def test_a_rank_without_batches():
    path, model = shared_path(), shard(Model())
    text = "`batches` must yield at least one batch"
    mine = MINE[0] if dist.get_rank() == 0 else []
    assert_raises_everywhere((1, ValueError, text), f"ValueError: {text}", lambda: compute(path, model, mine))


class Failing:
    """Batches of which one fails: ``at`` 0 before there is any."""

    def __init__(self, batches, at, error):
        self.batches, self.at, self.error = batches, at, error

    def __iter__(self):
        if self.at == 0:
            raise self.error
        return self._batches()

    def _batches(self):
        yield from list(self.batches)[: self.at]
        raise self.error


@pytest.mark.ranks(2)
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyError("text")], ids=["OSError", "KeyError"])
def test_batches_that_fail_on_one_rank(at, error):
    path, model = shared_path(), shard(Model())
    progress = (lambda batches: Failing(batches, at, error)) if dist.get_rank() == 0 else False
    call = lambda: compute(path, model, [0, 1, 2, 3] if dist.get_rank() else [4, 5, 6, 7], progress=progress)  # noqa: E731
    text = str(error)
    assert_raises_everywhere((0, type(error), text), f"{type(error).__name__}: {text}", call)
    # What had been computed is kept, and the model is as it was.
    assert path.exists() is (at == 1)
    assert at == 0 or len(ReferenceLogProbs.load(path)) == 4
    assert all(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.ranks(2)
def test_a_file_that_cannot_be_read():
    path = shared_path()
    path.parent.mkdir(exist_ok=True)
    dist.barrier()
    path.write_bytes(b"something else")
    text = "`path` must name a file that ReferenceLogProbs can read"
    model = shard(Model())
    call = lambda: compute(path, model, MINE[dist.get_rank()])  # noqa: E731
    assert_raises_everywhere((0, ValueError, text), f"ValueError: {text}", call)


@pytest.mark.ranks(2)
def test_a_file_that_cannot_be_written():
    path, model = shared_path(), shard(Model())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blur_optim.losses.stored_log_probs.write_log_probs", raise_disk_full)
        call = lambda: compute(path, model, MINE[dist.get_rank()])  # noqa: E731
        assert_raises_everywhere((0, OSError, "disk full"), "OSError: disk full", call)


def raise_disk_full(*args):
    raise OSError("disk full")


@pytest.mark.ranks(2)
def test_a_log_probability_that_is_not_finite():
    path, model, rank = shared_path(), Model(), dist.get_rank()
    with torch.no_grad():
        model.embedding.weight[2] = float("nan")
    ids = torch.full((1, 6), 1 + rank)  # Rank 1 alone reads it.
    batches = [{"input_ids": ids, "labels": ids}]
    shard(model)
    call = lambda: ReferenceLogProbs.load_or_compute(path, model, batches, progress=False)  # noqa: E731
    text = "`model` must give every example a finite log-probability"
    assert_raises_everywhere((1, ValueError, text), f"ValueError: {text}", call)


def test_where_an_offloaded_shard_is_computed():
    shard = SimpleNamespace(device_mesh=SimpleNamespace(device_type="meta"), device=torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blur_optim.losses.reference_ranks.is_dtensor", lambda t: t is shard)
        assert input_device(shard) == torch.device("meta")
        assert input_device(torch.ones(1)) == torch.device("cpu")


def test_without_ranks(tmp_path):
    with pytest.raises(ValueError, match=r"`across_ranks` must be False without a process group"):
        compute(tmp_path / "file", Model(), [0], across_ranks=True)
