"""Reference log-probabilities that ranks compute together: all that one process computes, on every rank."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from blur_optim.losses import ReferenceLogProbs, reference_log_probs

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
    path = shared_path()
    stored = compute(path, Model(), MINE[dist.get_rank()], across_ranks=True)
    assert_complete(stored, range(6))
    assert_complete(ReferenceLogProbs.load(path), range(6))


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


def assert_raises_everywhere(own, others, call):
    """The rank ``own[0]`` raises what it met, each other one says so, with a ValueError for a ValueError."""
    rank, expected, text = own
    theirs = expected if expected is ValueError else RuntimeError
    error = (expected, text) if dist.get_rank() == rank else (theirs, others)
    with pytest.raises(error[0], match=error[1]):
        call()
    dist.barrier()  # Nobody is left behind in another collective.


@pytest.mark.ranks(2)
def test_errors_of_one_rank_are_everybodys():
    path, model, rank = shared_path(), shard(Model()), dist.get_rank()
    text = "`batches` must yield at least one batch"
    assert_raises_everywhere(
        (1, ValueError, text),
        f"Rank 1 could not go on: {text}",
        lambda: compute(path, model, MINE[0] if rank == 0 else []),
    )

    def failing(batches):
        yield from list(batches)[:1]
        if rank == 0:
            raise OSError("the disk is gone")

    call = lambda: compute(path, model, MINE[rank], progress=failing)  # noqa: E731
    assert_raises_everywhere((0, OSError, "the disk is gone"), "Rank 0 could not go on: the disk is gone", call)

    path.parent.mkdir(exist_ok=True)
    dist.barrier()
    path.write_bytes(b"something else")
    text = "`path` must name a file that ReferenceLogProbs can read"
    call = lambda: compute(path, model, MINE[rank])  # noqa: E731
    assert_raises_everywhere((0, ValueError, text), f"Rank 0 could not go on: {text}", call)


@pytest.mark.ranks(2)
def test_log_probabilities_that_are_not_finite():
    path, model = shared_path(), Model()
    with torch.no_grad():
        model.embedding.weight[make_batch([5])["input_ids"][0, 0]] = float("nan")
    mine = MINE[dist.get_rank()]
    clean = [row for row in mine if torch.isfinite(reference_log_probs(model, make_batch([row]))).item()]
    with pytest.raises(ValueError, match="finite log-probability, got nan"):
        compute(path, shard(model), mine)
    dist.barrier()
    assert len(clean) < len(mine) or dist.get_rank() == 0
    assert not path.exists()


def test_without_ranks(tmp_path):
    with pytest.raises(ValueError, match=r"`across_ranks` must be False without a process group"):
        compute(tmp_path / "file", Model(), [0], across_ranks=True)
