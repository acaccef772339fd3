"""What a step of each method costs beside the weighted sum, in turn with it: time, and gradient sets at the peak."""

from __future__ import annotations

import gc
import json
import statistics
import time
from pathlib import Path

from rich.progress import Progress

from .jobs import TUNE, Job, setting_folder, write_json
from .loop import Unlearning
from .methods import BASELINE, parse_method
from .settings import Settings
from .stages import weights_of
from .workshop import Workshop

ROUNDS = 15
WARM_UP = 2


def measure_costs(settings: Settings, cache: Path, progress: Progress) -> None:
    """Write cost.json: every method takes a step in turn, so that whatever disturbs one disturbs all.

    On a CPU alone: the time is this process's, and each method has a model of its own.
    """
    if settings.device != "cpu":
        return
    path = setting_folder(cache, settings) / "cost.json"
    if path.is_file() and set(settings.methods) <= set(json.loads(path.read_text())["measured"]):
        return
    shop = Workshop(cache, settings)
    before = shop.before(0)
    runs = {
        method: Unlearning(
            Job(TUNE, method, weights_of(method, [1.0], settings.unit_scale)[0], settings.lrs[0], 0),
            before,
            shop.task(0),
            settings,
        )
        for method in settings.methods
    }
    batches = {method: run.batches() for method, run in runs.items()}
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    bar = progress.add_task(f"{settings.name}: cost of a step", total=ROUNDS + WARM_UP, note="")
    for number in range(ROUNDS + WARM_UP):
        for method, run in runs.items():
            start = time.process_time()
            run.step(number, batches[method])
            seconds[method].append(time.process_time() - start)
        progress.advance(bar)
    peaks = {method: _peak(run, batches[method]) for method, run in runs.items()}
    baselines = {method: parse_method(method).baseline.id for method in runs}
    write_json(
        path, {"baseline": f"*/{BASELINE}", "measured": list(runs), "methods": _costs(seconds, peaks, baselines)}
    )


def _costs(
    seconds: dict[str, list[float]], peaks: dict[str, float], baselines: dict[str, str]
) -> dict[str, dict[str, object]]:
    """Compare each method with the weighted sum of the same losses, where that ran."""
    costs = {}
    for method, baseline in baselines.items():
        if baseline not in seconds:
            continue
        pairs = zip(seconds[method][WARM_UP:], seconds[baseline][WARM_UP:], strict=True)
        ratios = [own / other for own, other in pairs]
        low, *_, high = statistics.quantiles(ratios, n=5)
        costs[method] = {
            "time_ratio": {"median": statistics.median(ratios), "low": low, "high": high},
            "extra_gradient_sets": peaks[method] - peaks[baseline],
        }
    return costs


def _peak(run: Unlearning, batches: object) -> float:
    """Return the most memory that a step holds beyond what is there before, in gradient sets.

    ``memory_bench`` measures this at the sizes that matter; here it is on the record beside the quality.
    """
    from memory_tracker import MemoryTracker

    params = run.losses.parameters()
    gc.collect()
    with MemoryTracker(params) as tracker:
        run.step(0, batches)
    kept = sum(tensor.nbytes for tensor in getattr(run.optimizer, "mean", []))  # Bloop's average is there before.
    return (tracker.peak + kept) / sum(p.numel() * p.element_size() for p in params)
