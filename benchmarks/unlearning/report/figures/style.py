"""What all figures share: colours, axes, legend, files that are the same bytes for the same numbers."""

import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from ..names import FORGET_ONLY, WEIGHTED_SUM
from ..summary import MethodSummary

DPI = 110
COLOURS = 255  # in a PNG: less than half the bytes, and no difference that can be seen

# Okabe and Ito's colours, told apart by the colour-blind too; relatives of BLUR share its colour and differ in dashes.
BLUR_RED, DASHED, DOTTED, DASH_DOT = "#d55e00", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5))
STYLES: dict[str, tuple[str, Any]] = {
    WEIGHTED_SUM: ("#0072b2", "-"),
    "blur": (BLUR_RED, "-"),
    "blur-per-parameter": (BLUR_RED, DASHED),
    "averaged-dots": (BLUR_RED, DOTTED),
    "averaged-cosine": (BLUR_RED, DASH_DOT),
    "normalized": ("#009e73", "-"),
    "blur-normalized": ("#009e73", DASHED),
    "conflict": ("#e69f00", "-"),
    "conflict-normalized": ("#e69f00", DOTTED),
    "barrier": ("#e69f00", DASHED),
    "retain_first": ("#56b4e9", "-"),
    "bloop": ("#cc79a7", "-"),
    "upgrad": ("#cc79a7", DASHED),
    "pcgrad": ("#56b4e9", DASHED),
    "blur-metric": ("#000000", "-"),
    "sum-metric": ("#000000", DASHED),
    "dual-moments": ("#009e73", DASHED),
    "retain-normal": ("#e69f00", DASHED),
    "forget-gain": ("#56b4e9", "-"),
    "primal-dual": ("#cc79a7", DASH_DOT),
    "dampening": ("#888888", DASHED),
    FORGET_ONLY: ("#888888", DASH_DOT),
}
UNKNOWN = ("#444444", DOTTED)
SETTINGS = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "blur_optim",
}


def line_style(method: MethodSummary, *, bold: bool) -> dict[str, Any]:
    """Return how a method's line looks: its mean over seeds bold, a single seed pale."""
    colour, dashes = STYLES.get(method.method.combine, UNKNOWN)
    if not bold:
        return {"color": colour, "linewidth": 0.6, "alpha": 0.25}
    baseline = method.method.combine == WEIGHTED_SUM  # Broad and below the others, since lines often coincide.
    wide = (
        {"linewidth": 3.5, "alpha": 0.45, "zorder": 2} if baseline else {"linewidth": 1.5, "alpha": 0.95, "zorder": 3}
    )
    return {"color": colour, "linestyle": dashes, **wide}


def panels(rows: int, columns: int, *, width: float = 3.1, height: float = 2.5, **shared: Any) -> tuple[Figure, Any]:
    """Return a figure and its axes as an array of rows and columns."""
    size = (width * columns + 0.4, height * rows + 0.6)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **shared)


def draw_mean_and_seeds(
    axis: Axes, method: MethodSummary, curves: Sequence[tuple[Sequence[float], Sequence[float]]], window: int = 1
) -> None:
    """Draw each seed's curve pale, and bold the mean where every seed has a value, as a running mean of ``window``."""
    curves = [curve for curve in curves if curve[0]]
    if len(curves) > 1:
        for x, y in curves:
            axis.plot(x, y, **line_style(method, bold=False))
    by_x: dict[float, list[float]] = {}
    for x, y in curves:
        for place, value in zip(x, y, strict=True):
            by_x.setdefault(place, []).append(value)
    mean = [(place, sum(found) / len(found)) for place, found in sorted(by_x.items()) if len(found) == len(curves)]
    if mean:
        x, y = zip(*mean, strict=True)
        marker = "o" if len(mean) == 1 else None
        axis.plot(x, _smoothed(y, window), **line_style(method, bold=True), marker=marker)


def _smoothed(values: Sequence[float], window: int) -> list[float]:
    around = window // 2
    parts = [values[max(0, i - around) : i + around + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def add_legend(figure: Figure, methods: Iterable[MethodSummary], *others: Line2D) -> None:
    """Put one legend under all panels; a way of combining occurs once."""
    first = {method.method.combine: method for method in methods}
    handles = [Line2D([], [], **line_style(m, bold=True), label=m.method.combine_label) for m in first.values()]
    handles += others
    most = max(2, int(figure.get_size_inches()[0] / 1.45))
    columns = -(-len(handles) // -(-len(handles) // most))  # as many as fit, in full rows
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.6)


def show_quantiles(axis: Axes, share: float = 0.02) -> None:
    """Set the limits so that all but the largest and the least values are seen: one spike must not flatten a curve."""
    values = sorted(value for line in axis.lines for value in line.get_ydata())
    if values:
        cut = int(share * len(values))
        low, high = values[cut], values[-1 - cut]
        margin = 0.08 * (high - low) or 0.1
        axis.set_ylim(low - margin, high + margin)


def use_logarithmic_axis(axis: Axes) -> None:
    """Label with plain numbers: 0.2, 0.5, 1, 2; only decades if there are many."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def save(draw: Callable[[], Figure | None], path: Path) -> bool:
    """Write ``path`` with .png and .svg; return whether there was something to draw."""
    with plt.rc_context(SETTINGS):
        figure = draw()
        if figure is None:
            return False
        try:
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # It is laid out now, and the same in both files.
            _replace(path.with_name(f"{path.name}.png"), _png(figure))
            _replace(path.with_name(f"{path.name}.svg"), _svg(figure))
        finally:
            plt.close(figure)
    return True


def _png(figure: Figure) -> bytes:
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            small, "png", optimize=True
        )
    return small.getvalue()


def _svg(figure: Figure) -> bytes:
    """Return SVG without a date; of coordinates, what is far below a pixel is cut."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    cut = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), drawn.getvalue())
    return cut.encode()


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".unfinished-{path.name}")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
