"""Jobs and their result files: a job is done when its file is there, so a run goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from .settings import Settings

FORMAT = 1
TUNE, SWEEP = "tune", "sweep"
# What may differ between two runs into the same folder: which jobs there are, not what a job does.
CHOICES = ("methods", "lrs", "tuning_weights", "weights", "tuned_at", "tuning_seed", "seeds", "judged_seeds", "threads")


@dataclass(frozen=True)
class Job:
    """One unlearning run."""

    stage: str
    method: str
    weight: float
    lr: float
    seed: int
    full_scores: bool = False

    @property
    def key(self) -> str:
        """Name the result file; the same job in the same folder has the same."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def setting_folder(cache: Path, settings: Settings) -> Path:
    """Return the folder of all results of these settings; others have another."""
    fixed = {name: value for name, value in settings.to_json().items() if name not in CHOICES}
    digest = hashlib.sha256(json.dumps([FORMAT, fixed], sort_keys=True).encode()).hexdigest()[:8]
    return cache / settings.track / f"{settings.name}-{digest}"


def result_file(folder: Path, job: Job) -> Path:
    return folder / "runs" / f"{job.key}.json"


def yardstick_file(folder: Path, role: str, number: int) -> Path:
    """Return the file with the looks and scores of a target or a retrained model."""
    return folder / "yardsticks" / f"{role}-{number}.json"


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all. What is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(_finite(value), indent=1, allow_nan=False))
    os.replace(scratch, path)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None  # Also for NaN, of which no comparison is true.
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def spawning(processes: int) -> ProcessPoolExecutor:
    """Return a pool whose processes begin with its first call, and import what they need once for all calls."""
    # A forked process would inherit torch's thread pool in an unusable state.
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"))


def run_side_by_side(
    calls: Iterable[tuple[Any, ...]], work: Callable[..., Any], pool: ProcessPoolExecutor, done: Callable[[Any], None]
) -> None:
    """Call ``work(*call)`` for each call in the processes of ``pool``, and ``done(result)`` as they come.

    Raises:
        Exception: the first one in a process; what had been begun is finished, the rest is left, the pool is shut.
    """
    futures: list[Future[Any]] = [pool.submit(work, *call) for call in calls]
    try:
        for future in as_completed(futures):
            done(future.result())
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, KeyboardInterrupt):
            for process in active_children():  # Who interrupts does not want to wait; files are written whole.
                process.terminate()
        raise
