"""The picture by parameter and step: where in the model the two gradients conflict, and where they are large."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from blur_optim.record.plot_rows import Row, rows_of
from blur_optim.record.record_file import Record

#: Of all pictures. Okabe and Ito's colours, told apart by the colour-blind too.
FORGET, RETAIN = "#d55e00", "#0072b2"
_ALIGNMENT = ("cosine", "forget_norm", "retain_norm")


def aligned_steps(run: Record, prefix: str = "") -> list[tuple[int, dict[str, list[float | None]]]]:
    """Number and alignment, plain or in the metric, of the steps with one value for each name of the metadata.

    At least one cosine is a number.
    """
    size = len(run.metadata.get("parameters", ()))
    found = []
    for step in run.steps:
        alignment = {name: step.get("alignment", {}).get(prefix + name, []) for name in _ALIGNMENT}
        is_whole = all(len(values) == size for values in alignment.values())
        if is_whole and any(cosine is not None for cosine in alignment["cosine"]):
            found.append((step["step"], alignment))
    return found


def draw_alignment(figure_class: Any, name: str, run: Record, prefix: str = "") -> Any:
    """Draw the cosine of the two gradients within each row by step; the bar on the right: where the gradients are."""
    steps, rows = aligned_steps(run, prefix), rows_of(run.metadata["parameters"])
    table = [[_cosine(alignment, row) for _, alignment in steps] for row in rows]
    few = len(rows) <= 64
    figure = figure_class(figsize=(11, 1.5 + (0.17 if few else 0.13) * max(len(rows), 10)), layout="constrained")
    axis, bars = figure.subplots(1, 2, sharey=True, width_ratios=[8, 1])
    limit = max([0.05, *(abs(value) for line in table for value in line if not math.isnan(value))])
    image = axis.imshow(table, aspect="auto", interpolation="nearest", cmap="RdBu", vmin=-limit, vmax=limit)
    axis.set_facecolor("#dddddd")  # Where there is no value.
    axis.set_yticks(range(len(rows)), _labels(rows), fontsize=7 if few else 6)
    axis.set_xlabel("step")
    where = ", in the metric of the retain loss" if prefix else ""
    axis.set_title(f"{name}: cosine of forget and retain gradient, within the parameters{where}", fontsize=11)
    every = max(1, math.ceil(len(steps) / 12))
    axis.set_xticks(range(0, len(steps), every), [str(number) for number, _ in steps[::every]])
    for y, (row, before) in enumerate(zip(rows[1:], rows[:-1], strict=True)):
        if row.layer != before.layer and row.label != "all":
            axis.axhline(y + 0.5, color="white", linewidth=1.5)
    _draw_shares(bars, [alignment for _, alignment in steps], rows, "P" if prefix else "")
    for each in (axis, bars):
        each.tick_params(length=0, axis="y")
        each.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=bars, location="right", aspect=30)
    bar.set_label(rf"$\cos{'_P' if prefix else ''}(g_f, g_r)$:  red opposes, blue agrees")
    bar.outline.set_visible(False)
    return figure


def _draw_shares(
    axis: Any, alignments: Sequence[Mapping[str, Sequence[float | None]]], rows: Sequence[Row], metric: str
) -> None:
    """Draw each row's share of the squared norm of the gradients, the mean over steps: a cosine may matter little."""
    for offset, key, colour in ((-0.2, "forget_norm", FORGET), (0.2, "retain_norm", RETAIN)):
        squares = [[_square(alignment, key, row) for row in rows] for alignment in alignments]
        shares = [fmean(values) for values in zip(*([v / (sum(s) or 1.0) for v in s] for s in squares), strict=True)]
        label = key.removesuffix("_norm")
        axis.barh([y + offset for y in range(len(rows))], shares, height=0.38, color=colour, label=label)
    axis.set_title(rf"share of $\|g\|{f'_{metric}' if metric else ''}^2$", fontsize=9)
    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axis.tick_params(axis="x", labelsize=7)
    axis.tick_params(axis="y", labelleft=False)
    axis.locator_params(axis="x", nbins=2)
    axis.legend(fontsize=7, framealpha=0.8, edgecolor="none", handlelength=1)


def _cosine(alignment: Mapping[str, Sequence[float | None]], row: Row) -> float:
    """The cosine over all parameters of a row, from theirs and their norms; NaN where none had gradients."""
    found = [
        (c, f, r)
        for c, f, r in ([alignment[key][i] for key in ("cosine", "forget_norm", "retain_norm")] for i in row.members)
        if c is not None and f is not None and r is not None
    ]
    norms = math.sqrt(sum(f * f for _, f, _ in found) * sum(r * r for _, _, r in found))
    return sum(c * f * r for c, f, r in found) / norms if norms else (0.0 if found else math.nan)


def _square(alignment: Mapping[str, Sequence[float | None]], key: str, row: Row) -> float:
    return sum((alignment[key][i] or 0.0) ** 2 for i in row.members)


def _labels(rows: Sequence[Row]) -> list[str]:
    """The layer beside its first row alone."""
    labels, previous = [], None
    for row in rows:
        new = row.layer is not None and row.layer != previous
        text = "" if row.label == "all" else row.label
        labels.append(f"layer {row.layer}   {text}".rstrip() if new else text)
        previous = row.layer
    return labels
