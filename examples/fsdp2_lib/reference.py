"""What NPO compares with: log-probabilities that all processes computed together, or a second sharded model."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from shared_lib.errors import InputError
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from blur_optim.losses import ReferenceLogProbs, reference_log_probs
from blur_optim.losses.fingerprints import example_keys

from .data import Batch, Example, collate
from .losses import Reference

FILE_NAME = "reference_log_probs.safetensors"


def compute_and_store(
    path: Path,
    name: str,
    model: PreTrainedModel,
    examples: Sequence[Example],
    size: int,
    device: torch.device,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> ReferenceLogProbs:
    """Compute the log-probability of every example, each process some, and write all to one file.

    Every process takes the same number of forward passes, since each of them gathers the shards of all.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine: dict[bytes, float] = {}
    for turn in progress(range(math.ceil(len(examples) / (size * ranks)))):
        first = (turn * ranks + rank) * size
        rows = [row if row < len(examples) else 0 for row in range(first, first + size)]
        batch = collate([examples[row] for row in rows], device)
        mine.update(zip(example_keys(batch), reference_log_probs(model, batch).tolist(), strict=True))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # What stays gathered for a backward pass would stay: none follows.
    parts: list[dict[bytes, float]] = [{}] * ranks
    dist.all_gather_object(parts, mine)
    log_probs = {key: value for part in parts for key, value in part.items()}
    if not all(map(math.isfinite, log_probs.values())):
        raise InputError(f"--model: {name} must give every example to forget a finite log-probability, but does not.")
    reference = ReferenceLogProbs(name, log_probs)
    if rank == 0:
        reference.save(path)
    return reference


def read_stored(path: Path) -> ReferenceLogProbs:
    """Read what an earlier run has stored.

    Raises:
        InputError: it is not there, or damaged.
    """
    if not path.is_file():
        raise InputError(f"--resume: the reference of the run, {path}, is missing. Use --reference model.")
    try:
        return ReferenceLogProbs.load(path)
    except ValueError as error:
        raise InputError(f"--resume: {error}") from error


def of_frozen(model: PreTrainedModel) -> Reference:
    """Ask a second model each time."""
    model.requires_grad_(False)

    def reference(batch: Batch) -> torch.Tensor:
        return reference_log_probs(model, batch)

    return reference
