"""What a worker process does: train a model, judge one, or unlearn."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from shared_lib.errors import InputError
from shared_lib.metrics import thin_out
from shared_lib.models import Model, load_model, load_tokenizer, quiet_transformers

from . import targets
from .jobs import FORMAT, Job, result_file, setting_folder, write_json, yardstick_file
from .loop import (
    KINDS,
    Look,
    Unlearning,
    look_at,
    look_quantized,
    look_restored,
    looks_on_the_line,
    probabilities,
    relearn,
)
from .losses import Before
from .methods import parse_method
from .settings import Settings
from .targets import RETRAINED, TARGET, model_folder
from .tracks import load_data
from .tracks.task import Task


class Workshop:
    """The task and its models, built once in each process."""

    def __init__(self, cache: Path, settings: Settings) -> None:
        quiet_transformers()
        torch.set_num_threads(settings.threads)
        self.cache, self.settings, self.folder = cache, settings, setting_folder(cache, settings)
        self.tasks: dict[int, Task] = {}
        self.befores: dict[int, Before] = {}

    def task(self, number: int) -> Task:
        """Return the task of the target with this number; one for all, unless each has its own authors."""
        key = number if self.settings.blocks else 0
        if key not in self.tasks:
            tokenizer = load_tokenizer(model_folder(self.cache, self.settings, TARGET, key))
            self.tasks[key] = load_data(self.settings, key).task(tokenizer, self.settings)
        return self.tasks[key]

    def before(self, number: int) -> Before:
        """Return the target with this number."""
        if number not in self.befores:
            self.befores[number] = Before(self._load(TARGET, number), self.task(number))
        return self.befores[number]

    def _load(self, role: str, number: int) -> Model:
        model = load_model(model_folder(self.cache, self.settings, role, number), self.settings.device)
        return model.to(getattr(torch, self.settings.dtype))

    def measure_yardstick(self, role: str, number: int) -> None:
        """Look at a model that was trained and score it; the retrained one first, for others are compared with it."""
        home = model_folder(self.cache, self.settings, role, number)
        model, task = self._load(role, number).eval(), self.task(number)
        # The retrained model is compared with nothing, whatever an interrupted run has left.
        scores, reference = task.judge(model, None if role == RETRAINED else self._reference(number))
        training = home / "training.json"
        result = {
            "final": look_at(model, task, self.settings),
            "scores": scores,
            "training": json.loads(training.read_text()) if training.is_file() else None,
            "parameters": model.num_parameters(),
            "rows": {kind: len(getattr(task, kind)) for kind in KINDS},
            "relearning": None,
            "unseen": probabilities(model, thin_out(task.unseen, self.settings.look_rows)) if task.unseen else None,
            "quantized": look_quantized(model, task, self.settings),
        }
        if role == RETRAINED:
            if self.settings.relearning_steps:  # What comes back in a model that never knew it was not relearned.
                result["relearning"] = relearn(model, task, self.settings, number)
            write_json(self.folder / "yardsticks" / f"reference-{number}.json", reference)
        write_json(yardstick_file(self.folder, role, number), result)

    def _reference(self, number: int) -> Any:
        path = self.folder / "yardsticks" / f"reference-{number}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def unlearn(self, job: Job) -> None:
        """Do a job and write its result."""
        start = time.perf_counter()
        number = job.seed % self.settings.targets
        torch.manual_seed(job.seed)
        task = self.task(number)
        run = Unlearning(job, self.before(number), task, self.settings)
        if self.settings.stop:
            run.stop_at = self._unseen(number)
        run.run(self._first_look(number))
        result: dict[str, Any] = {"format": FORMAT, "job": self._describe(job), "path": run.path, "steps": run.steps}
        result |= {"diverged": run.diverged, "scores": None, "relearning": None}
        result["final"] = None if run.diverged else run.path[-1]
        if self.settings.line and not run.diverged:
            result["line"] = looks_on_the_line(run, run.path[0])
        if job.full_scores and not run.diverged:
            result["scores"] = task.judge(run.model, self._reference(number))[0]
            result["quantized"] = look_quantized(run.model, task, self.settings)
            result["restored"] = look_restored(run.model, run.before.model, task, self.settings)
            if self.settings.relearning_steps:
                result["relearning"] = relearn(run.model, task, self.settings, job.seed)
        result |= {"seconds": time.perf_counter() - start, "threads": self.settings.threads}
        result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        write_json(result_file(self.folder, job), result)

    def _first_look(self, number: int) -> Look | None:
        path = yardstick_file(self.folder, TARGET, number)
        return json.loads(path.read_text())["final"] if path.is_file() else None

    def _unseen(self, number: int) -> float:
        unseen = json.loads(yardstick_file(self.folder, TARGET, number).read_text())["unseen"]
        if unseen is None:
            raise InputError(f"--stop: {self.settings.track} has no rows that nobody learned, to say where to stop.")
        return float(unseen["log_prob"])

    def _describe(self, job: Job) -> dict[str, Any]:
        same = {name: getattr(self.settings, name) for name in ("steps", "batch_size", "accumulation")}
        return asdict(job) | parse_method(job.method)._asdict() | same


@lru_cache(maxsize=1)
def workshop(cache: Path, settings: Settings) -> Workshop:
    """Return this process's workshop."""
    return Workshop(cache, settings)


def train(cache: Path, settings: Settings, role: str, number: int) -> tuple[str, int]:
    """Train one model, in a worker process."""
    targets.train(cache, settings, role, number)
    return role, number


def measure(cache: Path, settings: Settings, role: str, number: int) -> tuple[str, int]:
    """Judge one trained model, in a worker process."""
    workshop(cache, settings).measure_yardstick(role, number)
    return role, number


def unlearn(cache: Path, settings: Settings, job: Job) -> Job:
    """Do one job, in a worker process."""
    workshop(cache, settings).unlearn(job)
    return job
