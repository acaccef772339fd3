"""Each operation, backend, dtype and size against one AdamW(fused=True) step on the same tensors.

python benchmarks/kernel_bench.py --device cpu --threads 1 --csv kernels.csv --plot kernels.png
"""

import argparse
from collections.abc import Collection, Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from harness import Candidate, Clock, Result, compare, header, show, write_csv
from kernel_metric_operations import METRIC_OPERATIONS
from kernel_operations import DTYPES, OPERATIONS, Problem
from rich.console import Console

from blur_optim.kernels import BACKENDS, select_backend


def gradients_of(dtype: str, stash: str) -> str:
    """How tables name the dtypes."""
    return f"{dtype} gradients" if stash == "reference" else f"{dtype} gradients, forget in {stash}"


def make_problem(size: str, dtype: str, stash: str, device: torch.device) -> Problem:
    tensors, elements = (int(part) for part in size.split("x"))
    return Problem(tensors, elements, DTYPES[dtype], device, None if stash in ("reference", dtype) else stash)


EVERY_OPERATION = OPERATIONS | METRIC_OPERATIONS


def measure(
    problem: Problem,
    names: Sequence[str],
    compiled: bool,
    clock: Clock,
    rounds: int,
    gradients: str,
    size: str,
    operations: Collection[str] = EVERY_OPERATION,
) -> Iterator[list[Result]]:
    """Check and time each of the operations that there is a candidate for; the results of one at a time."""
    backends = {name: select_backend(name, problem.device) for name in names}
    baseline = Candidate("baseline: AdamW(fused=True)", problem.adamw.step, 28 * problem.numel)
    source, target = torch.randn(2, problem.numel // 2, device=problem.device)
    copy = Candidate("copy", lambda: target.copy_(source), 8 * source.numel())
    read = Candidate("read", source.sum, 4 * source.numel())
    for operation in operations:
        if candidates := EVERY_OPERATION[operation](problem, backends, compiled):
            labels = {"dtype": gradients, "size": size}
            yield compare(operation, candidates, baseline, copy, clock, rounds, read, **labels)


def run(arguments: argparse.Namespace, console: Console) -> list[Result]:
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = Clock(device)
    console.print(header(device, clock), highlight=False)
    results: list[Result] = []
    for size, dtype, stash in product(arguments.sizes, arguments.dtype, arguments.stash):
        problem, gradients = make_problem(size, dtype, stash, device), gradients_of(dtype, stash)
        options = arguments.backends, arguments.compile, clock, arguments.rounds, gradients, size, arguments.operations
        for found in measure(problem, *options):
            show(f"{found[0].operation}, {gradients}, {size}", found, console)
            results += found
    return results


def plot(results: Sequence[Result], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys((r.operation, r.dtype, r.size) for r in results))
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(8, 1.6 * len(groups) + 0.6), layout="constrained", squeeze=False
    )
    for ax, group in zip(axes[:, 0], groups, strict=True):
        rows = [r for r in results if (r.operation, r.dtype, r.size) == group and r.candidate not in ("copy", "read")]
        bars = ax.barh([r.candidate for r in rows], [r.ratio for r in rows], color="#4477aa")
        ax.bar_label(bars, [f"{r.ratio:.2f}" for r in rows], padding=3, fontsize=8)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.invert_yaxis()
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(f"{group[0]}, {group[1]}, {group[2]}", fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("time relative to one AdamW(fused=True) step", fontsize=9)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=150)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="of the gradients")
    parser.add_argument(
        "--stash",
        nargs="+",
        choices=["reference", "bfloat16", "int8"],
        default=["reference"],
        help="in what the forget gradients wait",
    )
    parser.add_argument("--sizes", nargs="+", default=["16x8388608"], metavar="TENSORSxELEMENTS")
    fast = [name for name in BACKENDS if name != "reference"]
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help=f"default: all of {fast} that work here")
    parser.add_argument(
        "--operations",
        nargs="+",
        choices=EVERY_OPERATION,
        default=list(EVERY_OPERATION),
        metavar="OPERATION",
        help=f"default: all of {list(EVERY_OPERATION)}",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; 1 measures CPU time")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--compile", action="store_true", help="also time torch.compile (needs a C++ compiler or Triton)"
    )
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.backends is None:
        arguments.backends = [name for name in fast if works(name, arguments.device)]
    return arguments


def works(name: str, device: str) -> bool:
    try:
        select_backend(name, torch.device(device))
    except ImportError:
        return False
    return True


def main() -> None:
    arguments = parse()
    console = Console()
    results = run(arguments, console)
    title = header(torch.device(arguments.device), Clock(torch.device(arguments.device)))
    if arguments.csv:
        write_csv(arguments.csv, results, title)
    if arguments.plot:
        plot(results, arguments.plot, title)


if __name__ == "__main__":
    main()
