"""Interleaved timing, tables, CSV: what the benchmarks share.

All candidates of one comparison are timed in turn, round after round, and reported as the median with its 20 and 80 %
quantiles; only ratios taken within one run mean anything.
"""

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm


@dataclass
class Candidate:
    """One way to do the operation.

    Args:
        bytes_moved: what it has to read and write at least; None where that is not the question.
        error: against the float64 reference, measured before it is timed.
    """

    name: str
    run: Callable[[], object]
    bytes_moved: int | None = None
    error: float | None = None


@dataclass
class Result:
    operation: str
    candidate: str
    dtype: str
    size: str
    ratio: float
    ratio_20: float
    ratio_80: float
    gb_per_s: float | None
    copy_share: float | None
    error: float | None


class Clock:
    """Time on the device: CPU time for one thread, wall time for several, events on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host_clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    @property
    def description(self) -> str:
        if self.device.type == "cuda":
            return "CUDA events"
        return "CPU time, one thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"

    def seconds(self, run: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3
        begin = self.host_clock()
        run()
        return self.host_clock() - begin


def compare(
    operation: str,
    candidates: Sequence[Candidate],
    baseline: Candidate,
    copy: Candidate,
    clock: Clock,
    rounds: int,
    **labels: str,
) -> list[Result]:
    """Time the candidates, the baseline and a copy in turn, ``rounds`` times; ratios are to the baseline's median."""
    everything = [*candidates, baseline, copy]
    for candidate in everything:  # Warm-up: allocations, compilation, first-touch page faults.
        candidate.run()
    times: dict[str, list[float]] = {candidate.name: [] for candidate in everything}
    for _ in tqdm(range(rounds), desc=operation, leave=False, disable=None):
        for candidate in everything:
            times[candidate.name].append(clock.seconds(candidate.run))
    unit = statistics.median(times[baseline.name])
    copy_speed = (copy.bytes_moved or 0) / statistics.median(times[copy.name])
    results = []
    for candidate in everything:
        low, median, high = quantiles(times[candidate.name])
        speed = candidate.bytes_moved / median if candidate.bytes_moved else None
        results.append(
            Result(
                operation,
                candidate.name,
                labels["dtype"],
                labels["size"],
                median / unit,
                low / unit,
                high / unit,
                speed / 1e9 if speed else None,
                speed / copy_speed if speed else None,
                candidate.error,
            )
        )
    return results


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20 %, 50 % and 80 % quantiles."""
    low, high = statistics.quantiles(values, n=5)[0::3]
    return low, statistics.median(values), high


def header(device: torch.device, clock: Clock) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return f"{device.type} ({name}), {clock.description}, torch {torch.__version__}, commit {commit.stdout.strip()}"


def show(title: str, results: Sequence[Result], console: Console) -> None:
    columns = {
        "ratio": lambda r: f"{r.ratio:.2f}",
        "20-80 %": lambda r: f"{r.ratio_20:.2f}-{r.ratio_80:.2f}",
        "GB/s": lambda r: f"{r.gb_per_s:.1f}" if r.gb_per_s else "",
        "of copy": lambda r: f"{r.copy_share:.0%}" if r.copy_share else "",
        "error": lambda r: f"{r.error:.0e}" if r.error is not None else "",
    }
    shown = {name: write for name, write in columns.items() if any(write(r) for r in results)}
    table = Table(title=title, title_justify="left")
    table.add_column("candidate", no_wrap=True)
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for r in results:
        table.add_row(r.candidate, *(write(r) for write in shown.values()))
    console.print(table)


def write_csv(path: Path, results: Sequence[Any], description: str) -> None:
    """Write dataclass instances of one type, a line each, under a comment."""
    with path.open("w", newline="") as file:
        file.write(f"# {description}\n")
        writer = csv.DictWriter(file, fieldnames=list(asdict(results[0])))
        writer.writeheader()
        writer.writerows(asdict(r) for r in results)
