"""Peak memory by category, and time, of one training step of a real transformer: what each way of unlearning costs.

The unit G is one gradient set in the model's dtype. Peaks are above parameters and optimizer state, of a step after the
first, each method's in a process of its own. The baseline is the weighted sum: one backward pass through the sum of
both losses, then AdamW(fused=True).

    python benchmarks/memory_bench.py --csv memory.csv --plot memory.png
    python benchmarks/memory_bench.py --methods reference int8 --rounds 0        # memory alone
"""

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from harness import Candidate, Clock, Result, compare, header, write_csv
from memory_methods import (
    BASELINE,
    DEFAULT_MODEL,
    DTYPE_TOLERANCES,
    METHODS,
    MODELS,
    Limit,
    Problem,
    Settings,
    settings_of,
)
from memory_tracker import (
    ALLOCATOR,
    GRADIENTS,
    PARAMETERS,
    REST,
    STASH,
    STATE,
    MemoryTracker,
    cuda_peak,
    process_peak,
    tensors_in,
)
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm


@dataclass
class Peak:
    """Bytes at the peak of one step.

    Args:
        process: from the process's resident memory, or from CUDA's allocator; None where the system does not tell.
    """

    unit: int
    at_peak: dict[str, int]
    process: int | None

    @property
    def above_state(self) -> float:
        """In G, without parameters and optimizer state."""
        return sum(self.at_peak[name] for name in (GRADIENTS, STASH, REST)) / self.unit


def measure(settings: Settings, name: str) -> Peak:
    """Take the peak of a method's second step (process) and third (tracker). For a process of its own."""
    problem = Problem(settings)
    step = METHODS[name].make(problem)
    step()
    device = problem.params[0].device.type
    process = cuda_peak(step) if device == "cuda" else process_peak(step)
    tracker = MemoryTracker(problem.params, device)
    tracker.label(PARAMETERS, [*problem.params, *problem.model.buffers()])
    tracker.label(STATE, tensors_in(problem.adamw.state))
    problem.hold = partial(tracker.label, STASH)
    tracker.reset_peak()
    with tracker:
        step()
    return Peak(problem.unit, tracker.at_peak, process)


def check(settings: Settings, names: Iterable[str]) -> dict[str, float]:
    """Return how far the update of each way to take BLUR's step is from that of ``reference``, relative to its norm.

    With eps far above the gradients, the first step of AdamW is proportional to the update; with the usual one it is
    its sign, which the smallest roundings turn. The learning rate lifts the step above the roundings of parameters.

    Raises:
        AssertionError: beyond the tolerance.
    """
    problem = Problem(settings)
    start = [p.detach().clone() for p in problem.params]

    def change(name: str) -> list[Tensor]:
        with torch.no_grad():
            torch._foreach_copy_(problem.params, start)
        problem.use_adamw(lr=100.0, eps=1.0, weight_decay=0.0)
        METHODS[name].make(problem)()
        return [p.detach() - s for p, s in zip(problem.params, start, strict=True)]

    expected = change("reference")
    errors = {}
    for name in names:
        tolerance = METHODS[name].tolerance
        if tolerance is None or name == "reference":
            continue
        errors[name] = _distance(change(name), expected)
        allowed = tolerance + DTYPE_TOLERANCES[settings.dtype]
        if not errors[name] <= allowed:
            raise AssertionError(f"The step of {name} is wrong: {errors[name]:.1e} from BLUR's, not {allowed:.0e}.")
    return errors


def _distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    difference = sum((a - e).double().square().sum() for a, e in zip(actual, expected, strict=True))
    return float((difference / sum(e.double().square().sum() for e in expected)).sqrt())


def in_new_process(run: Callable[..., Any], *arguments: object) -> Any:
    # The fork server has imported what takes long, and run nothing: its children start soon, and clean.
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(run, *arguments).result()


def time_steps(settings: Settings, names: Sequence[str], rounds: int) -> dict[str, Result]:
    """Time all methods in this process, in turn."""
    problem = Problem(settings)
    device = problem.params[0].device
    candidates = {name: Candidate(name, METHODS[name].make(problem)) for name in names}
    baseline = candidates.pop(BASELINE)
    source, target = torch.randn(2, 1 << 24, device=device)
    copy = Candidate("copy", lambda: target.copy_(source), 2 * source.nbytes)
    labels = {"dtype": settings.dtype, "size": settings.model}
    found = compare("step", list(candidates.values()), baseline, copy, Clock(device), rounds, **labels)
    return {result.candidate: result for result in found[:-1]}


@dataclass
class Row:
    """One line of the CSV. Peaks without a unit in the name are in G, above parameters and optimizer state."""

    method: str
    unit_bytes: int
    parameters_bytes: int
    optimizer_state_bytes: int
    gradients_bytes: int
    stash_bytes: int
    activations_and_temporaries_bytes: int
    peak: float
    over_sum: float
    peak_low: float | None
    peak_high: float | None
    process: float | None
    time: float | None
    time_20: float | None
    time_80: float | None
    time_low: float | None
    time_high: float | None
    error: float | None


def rows_of(
    settings: Settings, peaks: dict[str, Peak], times: dict[str, Result], errors: dict[str, float]
) -> list[Row]:
    rows = []
    has_limits = settings == replace(settings_of(DEFAULT_MODEL), device=settings.device, threads=settings.threads)
    baseline = peaks[BASELINE].above_state
    for name, peak in peaks.items():
        limit, time = METHODS[name].limit if has_limits else Limit(), times.get(name)
        low, high = limit.peak_bounds(baseline) or (None, None)
        time_low, time_high = limit.time or (None, None)
        rows.append(
            Row(
                name,
                peak.unit,
                *(peak.at_peak[category] for category in (PARAMETERS, STATE, GRADIENTS, STASH, REST)),
                peak.above_state,
                peak.above_state - baseline,
                low,
                high,
                None if peak.process is None else peak.process / peak.unit,
                *((time.ratio, time.ratio_20, time.ratio_80) if time else (None, None, None)),
                time_low,
                time_high,
                errors.get(name),
            )
        )
    return rows


def verdict(value: float, low: float | None, high: float | None) -> str:
    """A limit as the tables show it."""
    if low is None or high is None:
        return ""
    text = f"≤ {high:.2f}" if low == 0 else f"≥ {low:.2f}" if high == float("inf") else f"{low:.2f}-{high:.2f}"
    return f"{text} {'ok' if low <= value <= high else 'MISSED'}"


def show_memory(rows: Sequence[Row], console: Console) -> None:
    first = rows[0]
    title = f"Peak above parameters and optimizer state, in gradient sets of {first.unit_bytes / 1e6:.0f} MB"
    memory = Table("method", title=title, title_justify="left", box=SIMPLE_HEAD)
    memory.columns[0].no_wrap = True
    for name in ("peak", "limit", "process", "grads", "stash", "rest"):
        memory.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        parts = row.gradients_bytes, row.stash_bytes, row.activations_and_temporaries_bytes
        memory.add_row(
            METHODS[row.method].title,
            f"{row.peak:.2f}",
            verdict(row.peak, row.peak_low, row.peak_high),
            "" if row.process is None else f"{row.process:.2f}",
            *(f"{part / row.unit_bytes:.2f}" for part in parts),
        )
    console.print(memory)


def show_times(rows: Sequence[Row], console: Console) -> None:
    time = Table("method", title="Time of a step relative to the weighted sum's", title_justify="left", box=SIMPLE_HEAD)
    time.columns[0].no_wrap = True
    for name in ("ratio", "20-80 %", "limit", "error of u"):
        time.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        time.add_row(
            METHODS[row.method].title,
            f"{row.time:.2f}",
            f"{row.time_20:.2f}-{row.time_80:.2f}",
            verdict(row.time, row.time_low, row.time_high),
            "" if row.error is None else f"{row.error:.0e}",
        )
    console.print(time)


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = rows[0].time is not None
    figure, axes = plt.subplots(
        1, 1 + timed, figsize=(6 + 3 * timed, 0.4 * len(rows) + 1.4), layout="constrained", sharey=True, squeeze=False
    )
    memory = axes[0, 0]
    names = [METHODS[row.method].title for row in rows]
    left = [0.0] * len(rows)
    parts = [(GRADIENTS, "gradients_bytes", "#4477aa"), (STASH, "stash_bytes", "#ee6677")]
    parts.append((REST, "activations_and_temporaries_bytes", "#bbbbbb"))
    for label, column, color in parts:
        widths = [getattr(row, column) / row.unit_bytes for row in rows]
        memory.barh(names, widths, left=left, label=label, color=color)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    ends = [max(row.peak, row.process or 0) for row in rows]
    for y, (row, end) in enumerate(zip(rows, ends, strict=True)):
        memory.annotate(f"{row.peak:.2f}", (end, y), (5, 0), textcoords="offset points", va="center", fontsize=8)
    seen = [(row.process, y) for y, row in enumerate(rows) if row.process is not None]
    if seen:
        memory.scatter(*zip(*seen, strict=True), marker="|", color="black", zorder=3, label="peak of the process")
    memory.set_xlim(right=1.12 * max(ends))
    memory.invert_yaxis()
    memory.set_xlabel("gradient sets above parameters and optimizer state", fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    if timed:
        bars = axes[0, 1].barh(names, [row.time for row in rows], color="#228833")
        axes[0, 1].bar_label(bars, [f"{row.time:.2f}" for row in rows], padding=3, fontsize=8)
        axes[0, 1].axvline(1, color="black", linewidth=0.8)
        axes[0, 1].set_xlim(right=1.15 * max(row.time for row in rows))
        axes[0, 1].set_xlabel("time of a step / weighted sum", fontsize=9)
    for ax in axes[0]:
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=150)


def run(settings: Settings, names: Sequence[str], rounds: int, console: Console) -> list[Row]:
    errors = in_new_process(check, settings, names)
    progress = tqdm(names, desc="memory", leave=False, disable=None)
    peaks = {name: in_new_process(measure, settings, name) for name in progress}
    rows = rows_of(settings, peaks, {}, errors)
    show_memory(rows, console)
    if rounds:
        rows = rows_of(settings, peaks, time_steps(settings, names, rounds), errors)
        show_times(rows, console)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=MODELS, default=DEFAULT_MODEL)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", type=int, help="sequences of each loss")
    parser.add_argument("--length", type=int, help="tokens of a sequence")
    parser.add_argument("--dtype", choices=DTYPE_TOLERANCES, default="float32", help="of model, gradients and state")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations layer by layer")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing; 0 leaves it out")
    parser.add_argument("--threads", type=int, help="CPU threads; 1 measures CPU time")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.rounds == 1 or arguments.rounds < 0:
        parser.error(f"`--rounds` must be 0 or at least 2, for the quantiles, got {arguments.rounds}.")
    return arguments


def main() -> None:
    arguments = parse()
    os.environ.update(ALLOCATOR)  # For the processes that are started from here on; this one has its settings already.
    options = ("batch", "length", "dtype", "device", "checkpointing", "threads")
    settings = settings_of(arguments.model, **{name: getattr(arguments, name) for name in options})
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console = Console()
    description = (
        f"{header(device, Clock(device))}, {settings.model}, {settings.dtype}, batch {settings.batch} x "
        f"{settings.length} tokens{', checkpointing' if settings.checkpointing else ''}"
    )
    console.print(description, highlight=False)
    names = list(dict.fromkeys([BASELINE, *arguments.methods]))
    rows = run(settings, names, arguments.rounds, console)
    if arguments.csv:
        write_csv(arguments.csv, rows, description)
    if arguments.plot:
        plot(rows, arguments.plot, description)


if __name__ == "__main__":
    main()
