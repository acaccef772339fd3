"""What a run found, and its JSON."""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from shared_lib.metrics import Scores

from .digits import Match, Outcome

PACKAGES = ("blur_optim", "torch", "transformers", "tokenizers", "datasets", "scikit-learn", "rouge-score", "numpy")


@dataclass
class Trace:
    """One method's way through the unlearning.

    steps: the statistics of each step (norms, cosine, ...); empty where the method has one gradient only.
    path: (step, probability of what is to be forgotten, of what is to be kept, of what is left untouched).
    seconds: of each step.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    path: list[tuple[int, float, float, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Time one step."""
        started = _now()
        yield
        self.seconds.append(_now() - started)

    @property
    def mean_cosine(self) -> float | None:
        """Return the mean over the steps of cos(g_f, g_r)."""
        return statistics.fmean(step["cosine"] for step in self.steps) if self.steps else None

    def forgotten_while_kept(self, share: float = 0.95) -> float:
        """Return the least probability of what is to be forgotten, where so much of both other kinds was still kept."""
        (_, _, *first), *_ = self.path
        return min(p for _, p, *now in self.path if all(k >= share * k0 for k, k0 in zip(now, first, strict=True)))

    def time_relative_to(self, other: "Trace") -> float:
        """Return the ratio of the median times per step."""
        return statistics.median(self.seconds) / statistics.median(other.seconds)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Results:
    """All that is printed, drawn and written.

    scores: by model, then by kind of rows. answers: by kind of rows, then by model, with the question and the truth.
    """

    rows: dict[str, int]
    training: dict[str, Any]
    scores: dict[str, dict[str, Scores]]
    traces: dict[str, Trace]
    answers: dict[str, dict[str, str]]
    digits: list[Outcome]
    digits_matches: list[Match]

    def to_json(self, settings: dict[str, Any], baseline: str) -> dict[str, Any]:
        """Return everything with the settings, versions and the command line that made it."""
        return {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "settings": settings,
            "versions": {"python": platform.python_version(), **_versions()},
            "rows": self.rows,
            "training": self.training,
            "scores": {model: {kind: s._asdict() for kind, s in kinds.items()} for model, kinds in self.scores.items()},
            "forget_probability_while_95_percent_is_kept": {
                name: trace.forgotten_while_kept() for name, trace in self.traces.items()
            },
            "mean_cosine": {name: trace.mean_cosine for name, trace in self.traces.items()},
            "time_per_step_relative": {
                name: trace.time_relative_to(self.traces[baseline]) for name, trace in self.traces.items()
            },
            "traces": {name: asdict(trace) for name, trace in self.traces.items()},
            "answers": self.answers,
            "digits": [outcome._asdict() for outcome in self.digits],
            "digits_at_equal_retain_loss": [
                {name: outcome._asdict() if outcome else None for name, outcome in match._asdict().items()}
                for match in self.digits_matches
            ],
        }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that appears under its name only when it is whole."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, of the same suffix, that takes ``path``'s place at the end and only then."""
    handle, name = tempfile.mkstemp(prefix=".unfinished-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
