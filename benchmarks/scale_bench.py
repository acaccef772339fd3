"""How much memory a rank needs to unlearn with FSDP2, for models and numbers of ranks that are not here.

This is a simulation: the steps run as they would, through the wrapping of examples/fsdp2.py and BLUR's own step, on
tensors without memory and collectives without peers, and what would be allocated is counted. First, it is held against
steps that really run on two processes.

    python benchmarks/scale_bench.py --plot scale.png                    # Llama 7B on 8 ranks: minutes
    python benchmarks/scale_bench.py --models 1b 7b 13b 70b --ranks 1 8 64 512 --lora both --csv scale.csv       # hours
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from harness import write_csv
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scale_check import Check, check
from scale_methods import METHODS
from scale_models import CONFIGS, LORA_RANK, Case
from scale_simulation import Peak, simulate
from tqdm import tqdm

BASELINE = "weighted_sum"
#: GiB of memory: RTX 4090 or L4, A100, H100 or A100, H200.
CARDS = (24, 40, 80, 141)
#: What of a card the tensors may take. The rest is for the CUDA context, NCCL's buffers and fragments.
USABLE = 0.9
GIB = 2**30

NOTE = (
    "Simulated, not measured: bytes of the tensors of one rank at the peak of the second step. The CUDA context, "
    "NCCL's buffers and fragments are not in it; a tenth of a card is left for them. AdamW; what is trained, its "
    "gradients and state are float32; activations are checkpointed layer by layer; attention is counted as the "
    "CPU's flash kernel computes it. The weighted sum takes one loss after the other."
)


@dataclass(frozen=True)
class Row:
    """One line of the CSV; GiB of one rank.

    Args:
        above_sum: peak above that of the weighted sum; None where that was not asked for.
        card: the smallest of :data:`CARDS` that holds the peak; None where none does.
        seconds: of the simulation, not of a step.
    """

    model: str
    lora: bool
    ranks: int
    method: str
    batch: int
    length: int
    parameters: float
    state: float
    peak: float
    above_sum: float | None
    card: int | None
    seconds: float


def card_for(peak_gib: float) -> int | None:
    """Return the smallest card that holds so much."""
    return next((card for card in CARDS if peak_gib <= USABLE * card), None)


def rows_of(peaks: dict[Case, Peak]) -> list[Row]:
    """Make lines, in the order of the cases."""
    sums = {_place(case): peak.peak for case, peak in peaks.items() if case.method == BASELINE}
    return [
        Row(
            case.model,
            case.lora,
            case.ranks,
            case.method,
            case.batch,
            case.length,
            peak.parameters / GIB,
            peak.state / GIB,
            peak.peak / GIB,
            (peak.peak - sums[_place(case)]) / GIB if _place(case) in sums else None,
            card_for(peak.peak / GIB),
            peak.seconds,
        )
        for case, peak in peaks.items()
    ]


def _place(case: Case) -> tuple[str, bool, int]:
    return case.model, case.lora, case.ranks


def simulate_all(cases: Sequence[Case], jobs: int, done: Callable[[dict[Case, Peak]], None]) -> dict[Case, Peak]:
    """Simulate every case, ``jobs`` at a time.

    Args:
        done: is shown the results so far after each case.
    """
    found: dict[Case, Peak] = {}
    with ThreadPoolExecutor(jobs) as threads:
        futures = {threads.submit(_in_new_process, case): case for case in cases}
        for future in tqdm(as_completed(futures), total=len(cases), desc="simulation", leave=False, disable=None):
            found[futures[future]] = future.result()
            done({case: found[case] for case in cases if case in found})
    return {case: found[case] for case in cases}


def _in_new_process(case: Case) -> Peak:
    # A case each: a process that FSDP and the tracker have worked in does not forget everything.
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(simulate, case).result()


def show_checks(checks: Sequence[Check], console: Console) -> None:
    console.print("MiB at the peak of rank 0 of two, predicted, and of two real processes on the CPU", style="italic")
    table = Table("check", box=SIMPLE_HEAD)
    for name in ("predicted", "counted", "process", "predicted / counted"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in checks:
        process = "" if found.process is None else f"{(found.counted.before + found.process) / 2**20:.1f}"
        table.add_row(
            METHODS[found.case.method][0],
            f"{found.predicted.peak / 2**20:.1f}",
            f"{found.counted.peak / 2**20:.1f}",
            process,
            f"{found.error:+.2%}",
        )
    console.print(table)


def show(rows: Sequence[Row], console: Console) -> None:
    """Print a table for each model: methods by ranks."""
    for place in dict.fromkeys((row.model, row.lora) for row in rows):
        mine = [row for row in rows if (row.model, row.lora) == place]
        ranks = list(dict.fromkeys(row.ranks for row in mine))
        title = f"{_title(*place)}: GiB a rank at the peak, and the smallest card that holds it"
        console.print(title, style="italic")
        table = Table("method", box=SIMPLE_HEAD)
        for count in ranks:
            table.add_column(f"{count} ranks" if count > 1 else "1 rank", justify="right", no_wrap=True)
        for method in dict.fromkeys(row.method for row in mine):
            cells = {row.ranks: f"{row.peak:.2f} ({row.card or 'none'})" for row in mine if row.method == method}
            table.add_row(METHODS[method][0], *(cells.get(count, "") for count in ranks))
        console.print(table)
    console.print(NOTE, style="dim")


def _title(model: str, lora: bool) -> str:
    return f"Llama {model.upper()}" + (f", LoRA of rank {LORA_RANK}" if lora else "")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel for each model, with the cards as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = list(dict.fromkeys((row.model, row.lora) for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    figure, axes = plt.subplots(
        1, len(places), figsize=(max(7, 1 + 3.6 * len(places)), 4), layout="constrained", squeeze=False
    )
    for ax, place in zip(axes[0], places, strict=True):
        mine = {(row.ranks, row.method): row.peak for row in rows if (row.model, row.lora) == place}
        ranks = sorted({count for count, _ in mine})
        for i, method in enumerate(methods):
            places_x = [x + (i - (len(methods) - 1) / 2) * 0.8 / len(methods) for x in range(len(ranks))]
            heights = [mine.get((count, method), 0) for count in ranks]
            ax.bar(places_x, heights, 0.8 / len(methods), label=METHODS[method][0] if ax is axes[0, 0] else None)
        top = max(mine.values())
        if top > 5 * min(mine.values()):
            ax.set_yscale("log")
        for card in (card for card in CARDS if card <= (card_for(top) or CARDS[-1])):
            ax.axhline(USABLE * card, color="black", linewidth=0.6, linestyle="--")
            ax.annotate(
                f"{card} GB card", (1, USABLE * card), xycoords=("axes fraction", "data"), ha="right", fontsize=7
            )
        ax.set_xticks(range(len(ranks)), [str(count) for count in ranks])
        ax.set_title(_title(*place), fontsize=9)
        ax.set_xlabel("ranks", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("GiB a rank at the peak, simulated", fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=["7b"], help="(default: 7b)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8], help="(default: 8)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    parser.add_argument(
        "--lora", choices=("off", "on", "both"), default="off", help="train adapters on a frozen model (default: off)"
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences of each kind on a rank (default: 1)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence (default: 2048)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="simulations at a time (default: one a core)")
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison with real steps")
    parser.add_argument("--csv", type=Path, help="written after every case, so that an interrupted run is not lost")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    for name in ("batch", "length", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: must be at least 1, got {getattr(options, name)}")
    if min(options.ranks) < 1:
        parser.error(f"argument --ranks: must be at least 1, got {min(options.ranks)}")
    return options


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    adapters = {"off": [False], "on": [True], "both": [False, True]}[options.lora]
    for model, lora, ranks, method in product(options.models, adapters, options.ranks, options.methods):
        yield Case(model, ranks, method, lora, options.batch, options.length)


def main() -> None:
    options, console = parse(), Console()
    console.print("A simulation: none of these models and ranks exist here.", style="bold")
    if not options.no_check:
        show_checks(check(), console)

    def write(peaks: dict[Case, Peak]) -> None:
        if options.csv:
            write_csv(options.csv, rows_of(peaks), NOTE)

    cases = list(dict.fromkeys(cases_of(options)))
    rows = rows_of(simulate_all(cases, options.jobs, write))
    show(rows, console)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
