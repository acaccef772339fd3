"""What NPO compares with: log-probabilities that all processes computed together, or a second sharded model."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from shared_lib.errors import InputError
from transformers import PreTrainedModel

from blur_optim.losses import ReferenceLogProbs, reference_log_probs

from .data import Batch, Example, collate
from .losses import Reference

FILE_NAME = "reference_log_probs.safetensors"


def compute_and_store(
    path: Path,
    model: PreTrainedModel,
    examples: Sequence[Example],
    size: int,
    device: torch.device,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> ReferenceLogProbs:
    """Compute the log-probability of every example, each process some, and write all to one file.

    Raises:
        InputError: the file is another model's, or damaged, or the model gives an example no finite log-probability.
    """
    mine = examples[dist.get_rank() :: dist.get_world_size()] or examples[:1]  # Each process needs at least one.
    batches = (collate(mine[i : i + size], device) for i in progress(range(0, len(mine), size)))
    try:
        return ReferenceLogProbs.load_or_compute(path, model, batches, progress=False)
    except ValueError as error:
        raise InputError(f"--model or --out: {error}") from error


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
