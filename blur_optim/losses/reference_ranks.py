"""What ranks need that compute the reference's log-probabilities together, each for batches of its own.

Under FSDP the model runs on every rank or on none, for each forward gathers the shards of all. So the ranks agree
before each batch, and one that has no more of its own runs an old one again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blur_optim.losses.fingerprints import missing_keys
from blur_optim.parallel.engines import is_zero3
from blur_optim.parallel.fsdp1 import fsdp1_ids
from blur_optim.parallel.ranks import is_dtensor

NO_BATCHES = "`batches` must yield at least one batch, got none. Is it an exhausted iterator?"

Batch = Mapping[str, Tensor]
T = TypeVar("T")


class Turn(NamedTuple):
    """What a rank tells the others before the next forward.

    Attributes:
        busy: it has a batch to compute.
        due: it is time to write the file.
        error: what has gone wrong on it, in a form for others.
    """

    busy: bool
    due: bool
    error: Exception | None


def is_fsdp(model: nn.Module) -> bool:
    """Whether a forward gathers the shards of all ranks, each of which may have a batch of its own: FSDP, ZeRO-3.

    Not under tensor parallelism alone, where ranks compute parts of the same batch.
    """
    params = list(model.parameters())
    return bool(_fsdp2_modules(model) or fsdp1_ids(params) or is_zero3(params))


def _fsdp2_modules(model: nn.Module) -> list[Any]:
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def check_ranks() -> None:
    """Raises ValueError where there are no ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "`across_ranks` must be False without a process group, got True. Call "
            "torch.distributed.init_process_group() first, or leave it out."
        )


def complete_across_ranks(
    known: dict[bytes, float],
    batches: Iterable[Batch],
    compute: Callable[[Batch, Mapping[int, bytes], int], dict[bytes, float]],
    save: Callable[[], None],
    save_every: float,
    in_step: bool,
) -> int:
    """Add to ``known``, which is the same on all ranks, what the batches of all of them hold.

    Args:
        known: log-probabilities by example key; on return again the same on all ranks.
        batches: those of this rank.
        compute: the log-probabilities of some rows of a batch, from the keys by row and the batch's number.
        save: writes what is known; called on rank 0.
        save_every: seconds.
        in_step: whether ``compute`` involves all ranks.
    Returns:
        How many were added.
    Raises:
        Exception: see :meth:`blur_optim.losses.ReferenceLogProbs.load_or_compute`. What was computed is saved first.
    """
    before = saved = len(known)
    saved_at = time.monotonic()
    work = _Work(batches)
    new: dict[bytes, float] = {}  # Not given to the others yet.
    while True:
        batch, keys, position = work.next(known)
        due = bool(new) and time.monotonic() - saved_at >= save_every
        turns = exchange(Turn(bool(keys), due, _for_others(work.error)))
        errors = [turn.error for turn in turns if turn.error is not None]
        goes_on = any(turn.busy for turn in turns) and not errors
        if not goes_on or any(turn.due for turn in turns):
            for part in exchange(new):
                known |= part
            if len(known) > saved:
                on_the_first(save)
            new, saved, saved_at = {}, len(known), time.monotonic()
        raise_together(work.error, errors)
        if not goes_on:
            return len(known) - before
        try:
            if keys:
                new |= compute(batch, keys, position)
                known |= new
            elif in_step:
                compute(batch, {0: b""}, position)
        except ValueError as error:  # Of the values: the forward itself has run on all ranks.
            work.error = error


class _Work:
    """The batches of a rank one by one, as far as something of them is missing; then the first one again."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = _numbered(batches)
        self.first: Batch | None = None
        self.error: Exception | None = None

    def next(self, known: Container[bytes]) -> tuple[Batch, dict[int, bytes], int]:
        """A batch, the keys that are missing, and its number; no keys where nothing is left, or after an error."""
        try:
            for position, batch in () if self.error else self.batches:
                self.first = batch if self.first is None else self.first
                if keys := missing_keys(batch, known):
                    return batch, keys, position
            if self.first is None:
                raise ValueError(NO_BATCHES)
        except Exception as error:
            self.error = error
        return self.first or {}, {}, 0


def _numbered(batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
    yield from enumerate(batches)  # Also what fails before the first batch fails in next().


def exchange(mine: T) -> list[T]:
    """Give every rank what each has, by rank: any object that can be pickled."""
    all_of_them: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_of_them, mine)
    return all_of_them


def raise_together(mine: Exception | None, everyones: Iterable[Exception | None]) -> None:
    """Raise on every rank where one has failed: its own error there, and elsewhere the first one's for others."""
    for error in (mine, *everyones):
        if error is not None:
            raise error


def _for_others(error: Exception | None) -> Exception | None:
    # Not the error itself, which may be of a class that pickle does not bring back.
    kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
    text = f"Rank {dist.get_rank()} could not go on: {type(error).__name__}: {error}"
    return None if error is None else kind(text)


def on_the_first(read: Callable[[], T]) -> T:
    """Call ``read`` on rank 0, and return what it gives, or raise what it raises, on every rank."""
    result, error = None, None
    if dist.get_rank() == 0:
        try:
            result = read()
        except Exception as problem:
            error = problem
    result, problem_there = exchange((result, _for_others(error)))[0]
    raise_together(error, [problem_there])
    return result  # type: ignore[return-value]


def input_device(param: Tensor) -> torch.device:
    """Where a model with this parameter computes; of an offloaded shard it is not where the shard lies."""
    return torch.device(param.device_mesh.device_type) if is_dtensor(param) else param.device


def reshard(model: nn.Module) -> None:
    """Let FSDP2 drop what it has gathered for a backward pass that will not come."""
    for module in _fsdp2_modules(model):
        module.reshard()
