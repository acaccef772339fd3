"""Checkpoints of torch.distributed.checkpoint: model, optimizer, random states, and the step that comes next."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from shared_lib.errors import InputError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from blur_optim import BLUR

from .weights import unique_tensors

FOLDER = "checkpoints"
PROGRESS = "progress.json"


def latest(out: Path) -> Path | None:
    """Return the newest checkpoint that is complete."""
    finished = [path.parent for path in (out / FOLDER).glob(f"step-*/{PROGRESS}")]
    return max((path for path in finished if not path.suffix), default=None, key=lambda path: path.name)


def save(out: Path, model: nn.Module, optimizer: BLUR, step: int, run: dict[str, Any], keep: int) -> None:
    """Write a checkpoint beside the others, and put it in place when it is complete.

    Args:
        step: the number of steps taken.
        run: what :func:`load` compares, so that the order of the data goes on as it began.
        keep: how many checkpoints remain, this one included.
    """
    folder = out / FOLDER / f"step-{step:08d}"
    unfinished = folder.with_suffix(".unfinished")
    device = next(model.parameters()).device
    dcp.save(_state(model, optimizer) | _random_state(device), checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        (unfinished / PROGRESS).write_text(json.dumps({"step": step, **run}))
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.replace(folder)
        _remove_old(folder.parent, keep)
    dist.barrier()


def _remove_old(folder: Path, keep: int) -> None:
    """Remove what interrupted runs left half-written, and all finished checkpoints but the newest ``keep``."""
    found = sorted(folder.glob("step-*"))
    finished = [path for path in found if not path.suffix]
    for path in [path for path in found if path.suffix] + finished[:-keep]:
        shutil.rmtree(path)


def load(folder: Path, model: nn.Module, optimizer: BLUR, run: dict[str, Any]) -> int:
    """Bring everything back to where it was. Return the number of steps taken.

    Raises:
        InputError: an option or a file that decides the order of the data is not what it was.
    """
    progress = json.loads((folder / PROGRESS).read_text())
    for name, value in run.items():
        if progress[name] != value:
            raise InputError(f"--resume: {name} must be as in {folder}, {progress[name]}, got {value}.")
    state = _state(model, optimizer)
    random = _random_state(next(model.parameters()).device)
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    # With more processes than before, the new ones have no random state to take up; theirs is of their seed.
    state |= {name: tensor for name, tensor in random.items() if name in stored}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    _set_random_state(state)
    return progress["step"]


def _state(model: nn.Module, optimizer: BLUR) -> dict[str, Any]:
    return {"model": unique_tensors(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {f"random.cpu.{dist.get_rank()}": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"random.cuda.{dist.get_rank()}"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(state: dict[str, Any]) -> None:
    if f"random.cpu.{dist.get_rank()}" in state:
        torch.set_rng_state(state[f"random.cpu.{dist.get_rank()}"])
    if f"random.cuda.{dist.get_rank()}" in state:
        torch.cuda.set_rng_state(state[f"random.cuda.{dist.get_rank()}"])
