"""``python -m blur_optim.record.plot run.jsonl``: pictures of what a Recorder has written."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from blur_optim.record.plot_alignment import FORGET, RETAIN, aligned_steps, draw_alignment
from blur_optim.record.record_file import Record, read_record

FORMATS = ("png", "svg", "pdf")
_OTHER = "#333333"
#: Before the names of what is measured in the metric of the retain loss.
_IN_METRIC = "metric_"
_RUNS = (RETAIN, FORGET, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
#: Title, axis label, scale, and key, name, colour (of a single run) and style of each line.
_PANELS: tuple[tuple[str, str, str, tuple[tuple[str, str, str, str], ...]], ...] = (
    (
        "Losses",
        "loss",
        "linear",
        (("forget_loss", "forget", FORGET, "-"), ("retain_loss", "retain", RETAIN, "--")),
    ),
    (
        "Cosine of the gradients (below 0 they conflict)",
        r"$\cos(g_f, g_r)$",
        "around 0",
        (("cosine", "cosine", _OTHER, "-"), ("metric_cosine", "in the metric of the retain loss", RETAIN, "--")),
    ),
    (
        "Norms",
        "norm",
        "log",
        (
            ("forget_norm", r"forget gradient $\|g_f\|$", FORGET, "-"),
            ("retain_norm", r"retain gradient $\|g_r\|$", RETAIN, "--"),
            ("update_norm", r"update $\|u\|$", _OTHER, ":"),
        ),
    ),
    (
        r"Coefficients of the update $u = a\,g_f + b\,g_r$",
        "coefficient",
        "around 0",
        (("forget_coefficient", "a (forget)", FORGET, "-"), ("retain_coefficient", "b (retain)", RETAIN, "--")),
    ),
)


#: Those that runs in the metric of the retain loss have beside them.
_METRIC_PANELS: tuple[tuple[str, str, str, tuple[tuple[str, str, str, str], ...]], ...] = (
    (
        "Norms in the metric of the retain loss",
        "norm",
        "log",
        (
            ("metric_forget_norm", r"forget gradient $\|g_f\|_P$", FORGET, "-"),
            ("metric_retain_norm", r"retain gradient $\|g_r\|_P$", RETAIN, "--"),
        ),
    ),
    (
        r"Share of the coordinates that carries $P g_f$ (Gaussian: 1/3)",
        "effective share",
        "log",
        (("effective_share", "effective share", _OTHER, "-"),),
    ),
)


def plot(
    files: Sequence[str | Path], output: str | Path | None = None, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """Draw the steps of one run, or of several in one picture, and the alignment of each run that recorded it.

    Args:
        files: written by a Recorder.
        output: folder for the pictures; that of the first file unless given.
        formats: ``"png"``, ``"svg"``, ``"pdf"``.

    Returns:
        The files written: ``<names of the runs>-steps.<format>``, ``<name of the run>-alignment.<format>``, and
        ``<name of the run>-alignment-in-metric.<format>`` of a run with ``metric="retain"``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a file is none of a Recorder, or holds no step; the message names file and line.
    """
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"`formats` must be among {list(FORMATS)}, got {name!r}.")
    runs = _read(files)
    figure_class = _figure_class()
    figures = {f"{'-'.join(runs)}-steps": _draw_steps(figure_class, runs)}
    figures |= {
        f"{name}-alignment{suffix}": draw_alignment(figure_class, name, run, prefix)
        for name, run in runs.items()
        for prefix, suffix in (("", ""), (_IN_METRIC, "-in-metric"))
        if aligned_steps(run, prefix)
    }
    folder = Path(files[0]).parent if output is None else Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for stem, figure in figures.items():
        for extension in formats:
            written.append(folder / f"{stem}.{extension}")
            figure.savefig(written[-1], dpi=150)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m blur_optim.record.plot", description="Draw what a Recorder has written."
    )
    parser.add_argument("files", nargs="+", metavar="run.jsonl", help="several are drawn in one picture")
    parser.add_argument("--output", metavar="DIR", help="folder for the pictures; that of the first file unless given")
    parser.add_argument("--format", default="png", metavar="png,svg", help=f"of {', '.join(FORMATS)}; default png")
    options = parser.parse_args(arguments)
    try:
        written = plot(options.files, options.output, options.format.split(","))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"blur_optim.record.plot: {error}")
    for path in written:
        print(path)


def _read(files: Sequence[str | Path]) -> dict[str, Record]:
    runs: dict[str, Record] = {}
    stems = [Path(file).stem for file in files]
    for file in map(Path, files):
        run = read_record(file)
        if not run.steps:
            raise ValueError(f"{file}: must hold at least one step, got metadata alone.")
        # Files of one name, as folder/run.jsonl usually are, are told apart by their folders.
        name = file.stem if stems.count(file.stem) == 1 else f"{file.resolve().parent.name}-{file.stem}"
        while name in runs:
            name += "'"
        runs[name] = run
    return runs


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("`matplotlib` must be installed for pictures. `pip install 'blur_optim[plot]'`.") from error
    return Figure  # Not pyplot, which would look for a display and keep every figure.


def _draw_steps(figure_class: Any, runs: Mapping[str, Record]) -> Any:
    panels = _PANELS + _METRIC_PANELS * any(_series(run, "metric_cosine")[0] for run in runs.values())
    figure = figure_class(figsize=(11, 3.6 * len(panels) / 2), layout="constrained")
    axes = figure.subplots(len(panels) // 2, 2, sharex=True)
    for axis, (title, label, scale, all_lines) in zip(axes.flat, panels, strict=True):
        lines = [line for line in all_lines if any(_series(run, line[0])[0] for run in runs.values())]
        axis.set_title(title, fontsize=11)
        axis.set_ylabel(label)
        drawn = _draw_lines(axis, runs, lines)
        if not drawn:
            axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color="#777777")
        elif scale == "log" and all(value > 0 or math.isnan(value) for value in drawn):
            axis.set_yscale("log")
        if scale == "around 0":
            axis.axhline(0, color="black", linewidth=0.8, zorder=1)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8, framealpha=0.8, edgecolor="none")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.02)
    for axis in axes[-1]:
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(_headline(runs), fontsize=12)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    return figure


def _draw_lines(axis: Any, runs: Mapping[str, Record], lines: Sequence[tuple[str, str, str, str]]) -> list[float]:
    """Draw the lines of a panel. A single run has a colour for each line, of several each has one colour."""
    drawn: list[float] = []
    for number, (run_name, run) in enumerate(runs.items()):
        for position, (key, name, own_colour, style) in enumerate(lines):
            x, y = _series(run, key)
            if not x:
                continue
            colour = own_colour if len(runs) == 1 else _RUNS[number % len(_RUNS)]
            label = (name if len(lines) > 1 else None) if len(runs) == 1 else run_name if position == 0 else None
            marker = "." if len(x) <= 30 else ""
            axis.plot(x, y, color=colour, linestyle=style, marker=marker, linewidth=1.4, label=label)
            drawn += y
    for _, name, _, style in lines if drawn and len(runs) > 1 and len(lines) > 1 else ():
        axis.plot([], [], color="#777777", linestyle=style, label=name)
    return drawn


def _series(run: Record, key: str) -> tuple[list[int], list[float]]:
    """Steps and values; of several rows the mean, NaN (a gap) where a value is null."""
    pairs = [(step["step"], step[key]) for step in run.steps if key in step]
    return [step for step, _ in pairs], [_number(value) for _, value in pairs]


def _number(value: Any) -> float:
    if isinstance(value, list):
        numbers = [float(v) for v in value if isinstance(v, int | float)]
        return fmean(numbers) if numbers else math.nan
    return float(value) if isinstance(value, int | float) else math.nan


def _headline(runs: Mapping[str, Record]) -> str:
    if len(runs) > 1:
        return ", ".join(f"{name} ({run.metadata.get('rule')})" for name, run in runs.items())
    ((name, run),) = runs.items()
    weights = {
        symbol: ", ".join(f"{value:g}" for value in sorted(set(run.metadata.get(key) or [])))
        for symbol, key in (("γ", "gamma"), ("α", "retain_weight"))
    }
    settings = [f"{symbol} = {value}" for symbol, value in weights.items() if value]
    if run.metadata.get("metric", "euclidean") != "euclidean":
        settings.append(f"metric {run.metadata['metric']}")
    return f"{name}: " + ", ".join([f"rule {run.metadata.get('rule')}", *settings])


if __name__ == "__main__":
    main()
