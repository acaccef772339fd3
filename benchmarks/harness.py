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
    read_share: float | None = None
    seconds: float | None = None
    host_seconds: float | None = None


class Clock:
    """Time on the device: CPU time for one thread, wall time for several, events on CUDA.

    On CUDA the host runs ahead: the device is kept busy until everything that is timed has been launched, so that no
    gap between two launches counts. What :meth:`host_seconds` returns is the rest of the story: how long the host needs
    to launch it, which is what a small model waits for. Where a candidate reads a value on the host, both say so.
    """

    #: Cycles in a second, at least: more than any GPU has, so that the device is busy for long enough.
    CYCLES = 2.2e9

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host_clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self._launching: dict[Callable[[], object], float] = {}

    @property
    def description(self) -> str:
        if self.device.type == "cuda":
            return "CUDA events"
        return "CPU time, one thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"

    def seconds(self, run: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if run not in self._launching:
                self._launching[run] = self.host_seconds(run)
            torch.cuda.synchronize()
            # A fifth of a second would be a candidate that waits for the device, and then for this.
            torch.cuda._sleep(int(self.CYCLES * min(1.5 * self._launching[run] + 1e-4, 0.2)))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3
        begin = self.host_clock()
        run()
        return self.host_clock() - begin

    def host_seconds(self, run: Callable[[], object]) -> float:
        """Time until ``run`` returns, on a device that has nothing else to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return seconds


def compare(
    operation: str,
    candidates: Sequence[Candidate],
    baseline: Candidate,
    copy: Candidate,
    clock: Clock,
    rounds: int,
    read: Candidate | None = None,
    **labels: str,
) -> list[Result]:
    """Time the candidates, the baseline and a copy in turn, ``rounds`` times; ratios are to the baseline's median.

    Args:
        read: a pass that only reads, timed with the others for their share of it.
    """
    everything = [*candidates, baseline, copy, *([read] if read else [])]
    for candidate in everything:  # Warm-up: allocations, compilation, first-touch page faults.
        candidate.run()
    times: dict[str, list[float]] = {candidate.name: [] for candidate in everything}
    hosts: dict[str, list[float]] = {candidate.name: [] for candidate in everything}
    for _ in tqdm(range(rounds), desc=operation, leave=False, disable=None):
        for candidate in everything:
            times[candidate.name].append(clock.seconds(candidate.run))
            if clock.device.type == "cuda":
                hosts[candidate.name].append(clock.host_seconds(candidate.run))
    unit = statistics.median(times[baseline.name])
    copy_speed = (copy.bytes_moved or 0) / statistics.median(times[copy.name])
    read_speed = (read.bytes_moved or 0) / statistics.median(times[read.name]) if read else None
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
                speed / read_speed if speed and read_speed else None,
                median,
                statistics.median(hosts[candidate.name]) if hosts[candidate.name] else None,
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
        "of read": lambda r: f"{r.read_share:.0%}" if r.read_share else "",
        "host us": lambda r: f"{1e6 * r.host_seconds:.0f}" if r.host_seconds else "",
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
