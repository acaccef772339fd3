"""The order of things: train, judge the yardsticks, tune on one seed, sweep on the others, time, report."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import Progress
from shared_lib.errors import InputError
from shared_lib.versions import installed_versions

from .jobs import SWEEP, TUNE, Job, result_file, run_side_by_side, setting_folder, spawning, write_json, yardstick_file
from .loop import KINDS
from .methods import FORGET_ONLY, parse_method, weight_scale
from .report.compare import Point, crossings, hypervolume, lowest_at
from .settings import Settings
from .targets import RETRAINED, TARGET, is_trained
from .workshop import measure, train, unlearn

PACKAGES = ("torch", "transformers", "tokenizers", "torchjd", "rouge-score", "scipy", "scikit-learn", "blur_optim")
KEPT = 0.9  # of the target's probability: what the learning rate is chosen for
ROLES = (RETRAINED, TARGET)  # In this order: the target's scores need what the retrained model gave.

Selected = dict[str, dict[str, float]]


def run_setting(settings: Settings, cache: Path, processes: int, command: str, progress: Progress) -> Path:
    """Do what is not done yet, and return the folder with the results."""
    folder = setting_folder(cache, settings)
    check_sources(settings, folder)
    with spawning(processes) as pool:
        each = Stage(settings, cache, pool, progress)
        each.run("models", train, [pair for pair in _models(settings) if not is_trained(cache, settings, *pair)])
        for role in ROLES:
            missing = [n for n in _numbers(settings, role) if not yardstick_file(folder, role, n).is_file()]
            each.run(f"scores of the {role}", measure, [(role, n) for n in missing])
        each.run("tuning", unlearn, _missing(folder, tuning_jobs(settings)))
        selected = select(settings, folder)
        describe(settings, folder, selected, command)
        each.run("sweep", unlearn, _missing(folder, sweep_jobs(settings, selected)))
    return folder


def check_sources(settings: Settings, folder: Path) -> None:
    """See that the files on which the results in ``folder`` rest are the same; at first, note them.

    Raises:
        InputError: a file has changed since.
    """
    named = (settings.data, settings.retain_data, settings.questions, settings.utility_questions)
    sources = {name: _files(Path(name)) for name in (*named, settings.model, settings.retrained) if name}
    path = folder / "sources.json"
    if not path.is_file():
        write_json(path, sources)
    elif _read(path) != sources:
        raise InputError(
            f"--cache: {folder} holds results from other files than those at {', '.join(sources)} now. Delete it, and "
            f"the models beside it, or give another --cache."
        )


def _files(path: Path) -> list[list[str]]:
    """List the files of a local source by name and content; nothing for a name on the hub."""
    found = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path] * path.is_file()
    return [[str(file.relative_to(path if path.is_dir() else path.parent)), _digest(file)] for file in found]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Stage:
    """Runs calls side by side under a progress bar."""

    def __init__(self, settings: Settings, cache: Path, pool: ProcessPoolExecutor, progress: Progress) -> None:
        self.settings, self.cache, self.pool, self.progress = settings, cache, pool, progress

    def run(self, title: str, work: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> None:
        calls = [(self.cache, self.settings, *call) for call in calls]
        if not calls:
            return
        bar = self.progress.add_task(f"{self.settings.name}: {title}", total=len(calls), note="")
        run_side_by_side(calls, work, self.pool, lambda result: self.progress.advance(bar))


def _models(settings: Settings) -> list[tuple[str, int]]:
    return [(role, number) for role in ROLES for number in _numbers(settings, role)]


def _numbers(settings: Settings, role: str) -> list[int]:
    """Return which models of a role the seeds need; tuning compares with no retrained model."""
    seeds = settings.seeds if role == RETRAINED else (settings.tuning_seed, *settings.seeds)
    return sorted({seed % settings.targets for seed in seeds})


def tuning_jobs(settings: Settings) -> list[Job]:
    """List the runs of the tuning seed: every method with as many learning rates and weights as any other.

    A forget loss alone has nothing to weigh, and so learning rates only.
    """
    return [
        Job(TUNE, method, weight, lr, settings.tuning_seed)
        for method in settings.methods
        for lr in settings.lrs
        for weight in weights_of(method, settings.tuning_weights, settings.unit_scale)
    ]


def sweep_jobs(settings: Settings, selected: Selected) -> list[Job]:
    """List the runs of the held-out seeds: every weight, and the chosen one, at the learning rate that tuning chose."""
    return [
        Job(
            SWEEP,
            method,
            weight,
            chosen["lr"],
            seed,
            full_scores=weight == chosen["weight"] and _judged(settings, seed),
        )
        for method, chosen in selected.items()
        for seed in settings.seeds
        for weight in dict.fromkeys([*weights_of(method, settings.weights, settings.unit_scale), chosen["weight"]])
    ]


def _judged(settings: Settings, seed: int) -> bool:
    return not settings.judged_seeds or seed in settings.judged_seeds


def weights_of(method: str, weights: Iterable[float], unit_scale: float) -> list[float]:
    """Return the weights of a method: the same grid for all, down from what is largest for its losses."""
    if parse_method(method).combine == FORGET_ONLY:
        return [1.0]
    return [float(f"{weight * weight_scale(parse_method(method), unit_scale):.6g}") for weight in weights]


def select(settings: Settings, folder: Path) -> Selected:
    """Choose learning rate and weight of each method on the tuning seed.

    The learning rate by how far its runs forget while they keep ``KEPT`` of the rest, stopping early included; where
    none keeps that much, by their hypervolume. Among the runs at that rate, the weight by the area that its last point
    dominates, of which a run that diverged has none. Of equals, the one that is tried first. With
    ``settings.tuned_at`` both are chosen together, as described there.
    """
    target = _read(yardstick_file(folder, TARGET, settings.tuning_seed % settings.targets))["final"]
    selected = {}
    for method in settings.methods:
        jobs = [job for job in tuning_jobs(settings) if job.method == method]
        runs = {job: _read(result_file(folder, job)) for job in jobs}
        if settings.tuned_at:
            best = min(jobs, key=lambda job: _mean_forgotten(runs[job], target, settings.tuned_at))
            selected[method] = {"lr": best.lr, "weight": best.weight}
            continue
        by_lr = {lr: [run for job, run in runs.items() if job.lr == lr] for lr in settings.lrs}
        lr = max(settings.lrs, key=lambda lr: _merit(by_lr[lr], target))
        best = max((job for job in jobs if job.lr == lr), key=lambda job: hypervolume(_last(runs[job], target)))
        selected[method] = {"lr": lr, "weight": best.weight}
    return selected


def _mean_forgotten(run: dict[str, Any], target: dict[str, Any], taus: Iterable[float]) -> float:
    """Return the lowest log p_forget at equal retain, on average over ``taus``; the target's where nothing keeps it."""
    path = [
        Point(kept(look, target), look["forget"]["log_prob"], look["forget"]["probability"], start=look["step"] == 0)
        for look in _looks(run)
    ]
    found = [lowest_at([*path, *crossings(path, tau)], tau) for tau in taus]
    return statistics.fmean(target["forget"]["log_prob"] if point is None else point.log_prob for point in found)


def _merit(runs: list[dict[str, Any]], target: dict[str, Any]) -> tuple[float, float]:
    looks = [look for run in runs for look in _looks(run)]
    enough = [-look["forget"]["log_prob"] for look in looks if look["step"] and kept(look, target) >= KEPT]
    return max(enough, default=-math.inf), hypervolume([p for run in runs for p in _points(run, target)])


def _looks(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the looks that saw finite values."""
    return [look for look in run["path"] if all(look[kind]["probability"] is not None for kind in KINDS)]


def _points(run: dict[str, Any], target: dict[str, Any]) -> list[tuple[float, float]]:
    """Return (1 - p_forget, kept) at every look that saw finite values."""
    return [(1 - look["forget"]["probability"], kept(look, target)) for look in _looks(run)]


def _last(run: dict[str, Any], target: dict[str, Any]) -> list[tuple[float, float]]:
    return [] if run["diverged"] else _points(run, target)[-1:]


def kept(look: dict[str, Any], target: dict[str, Any]) -> float:
    """Return what is left of the probability of retain or untouched rows, of the two the lower."""
    return min(look[kind]["probability"] / target[kind]["probability"] for kind in ("retain", "untouched"))


def describe(settings: Settings, folder: Path, selected: Selected, command: str) -> None:
    """Write settings.json and the yardsticks of each seed, from which the report is made."""
    tuned_on = _read(yardstick_file(folder, TARGET, settings.tuning_seed % settings.targets))
    if settings.targets > 1:  # Else it is the one of all seeds.
        write_json(folder / "tuning-target.json", tuned_on)
    for role in ROLES:
        for seed in settings.seeds:
            name = f"{role}-{seed}" if settings.targets > 1 else role
            write_json(folder / f"{name}.json", _read(yardstick_file(folder, role, seed % settings.targets)))
    source = Path(settings.data).name if settings.data else "invented authors"
    about = {
        "model": {"name": settings.model, "parameters": tuned_on["parameters"]},
        "data": f"{source}, {settings.subset}",
    }
    if settings.blocks:
        first, *others = settings.blocks
        compared = ", ".join(map(str, others))
        about["data"] += f" of {settings.authors} authors each, from number {first} on to tune, {compared} to compare"
    sweep = {job.method: [] for job in sweep_jobs(settings, selected)}
    for job in sweep_jobs(settings, selected):
        if job.weight not in sweep[job.method]:
            sweep[job.method].append(job.weight)
    about |= {"sweep_weights": sweep, "rows": tuned_on["rows"]}
    made_by = {"selected": selected, "command": command, "commit": _commit(), "versions": installed_versions(PACKAGES)}
    write_json(folder / "settings.json", settings.to_json() | about | made_by)


def _missing(folder: Path, jobs: list[Job]) -> list[tuple[Job]]:
    return [(job,) for job in jobs if not result_file(folder, job).is_file()]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _commit() -> str:
    if not shutil.which("git"):
        return "unknown"

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit}, with changes" if git("status", "--porcelain", "--untracked-files=no") else commit or "unknown"
