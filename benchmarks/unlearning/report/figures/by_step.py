"""Curves along a run at the selected weight: gradients, memorisation, relearning."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..load import KINDS, RELEARNED, Run
from ..names import WEIGHTED_SUM, score_label
from ..summary import MethodSummary, Summary
from .style import add_legend, draw_mean_and_seeds, panels, show_quantiles, use_logarithmic_axis
from .trade_off import RETRAINED_LINE

Curve = tuple[Sequence[float], Sequence[float]]
TELLING = (WEIGHTED_SUM, "blur", "normalized", "bloop")  # Noisy curves of more methods hide each other.
SMOOTHED = 12  # bold lines are running means of this fraction of all steps
UNIT_GRADIENTS = "normalized"  # in the name of a combination: its coefficients contain 1/‖g‖


def draw_gradients(summary: Summary) -> Figure | None:
    """Draw cosine, forget coefficient and ‖g_f‖ by step; a row for each pair of losses."""
    shown = {name: _most_telling(summary, name) for name in summary.losses}
    shown = {name: methods for name, methods in shown.items() if methods}
    columns: list[tuple[str, Callable[[Run], Curve]]] = [
        ("cos(g_f, g_r)", lambda run: _trace(run, "cosine")),
        ("forget coefficient (BLUR: ξ)", lambda run: _trace(run, "forget_coefficient")),
        ("‖g_f‖", lambda run: _trace(run, "forget_norm")),
    ]
    steps = max((len(run.steps) for methods in shown.values() for m in methods for run in m.selected_runs), default=0)
    figure = _draw_rows(shown, columns, "step", 1, window=max(1, steps // SMOOTHED), skip=_is_scaled_otherwise)
    for i, axis in enumerate(figure.axes if figure else ()):
        if i % len(columns) == 2 and _is_positive(axis):
            use_logarithmic_axis(axis)
            continue
        show_quantiles(axis)
        if i % len(columns) == 0:
            axis.axhline(0, color="black", linewidth=0.7)
    return figure


def _is_scaled_otherwise(method: MethodSummary, column: int) -> bool:
    return column == 1 and UNIT_GRADIENTS in method.method.combine


def _most_telling(summary: Summary, losses: str) -> list[MethodSummary]:
    methods = [m for m in summary.of_losses(losses) if m.method.retain_loss and any(r.steps for r in m.selected_runs)]
    return [m for m in methods if m.method.combine in TELLING] or methods[: len(TELLING)]


def _is_positive(axis: Axes) -> bool:
    values = [value for line in axis.lines for value in line.get_ydata()]
    return bool(values) and min(values) > 0


def _trace(run: Run, name: str) -> Curve:
    found = [(step.step, value) for step in run.steps if (value := getattr(step, name)) is not None]
    return [step for step, _ in found], [value for _, value in found]


def draw_memorisation(summary: Summary) -> Figure | None:
    """Draw what is still known by epoch: verbatim and knowledge memorisation, or else the probabilities."""
    shown = {name: [m for m in summary.of_losses(name) if m.selected_runs] for name in summary.losses}
    shown = {name: methods for name, methods in shown.items() if methods}
    runs = [run for methods in shown.values() for m in methods for run in m.selected_runs]
    names = list(dict.fromkeys(name for run in runs for point in run.path for name in point.memorisation))
    columns: list[tuple[str, Callable[[Run], Curve]]]
    if names:
        columns = [(score_label(name), _memorisation(name)) for name in names]
        levels = [[y.memorisation.get(name) for y in summary.setting.retrained.values()] for name in names]
    else:
        columns = [(f"p_{kind}", _probability(kind)) for kind in KINDS]
        levels = [[getattr(y.final, k).probability for y in summary.setting.retrained.values()] for k in KINDS]
    return _draw_rows(shown, columns, "epoch of the rows to forget", 2, levels, retrained=any(map(any, levels)))


def _memorisation(name: str) -> Callable[[Run], Curve]:
    def curve(run: Run) -> Curve:
        found = [(point.epoch, point.memorisation[name]) for point in run.path if name in point.memorisation]
        return [x for x, _ in found], [y for _, y in found]

    return curve


def _probability(kind: str) -> Callable[[Run], Curve]:
    def curve(run: Run) -> Curve:
        found = [(p.epoch, getattr(p.measured, kind).probability) for p in run.path if p.measured]
        return [x for x, _ in found], [y for _, y in found]

    return curve


def draw_relearning(summary: Summary) -> Figure | None:
    """Draw how fast what was forgotten comes back."""
    shown = {n: [m for m in summary.of_losses(n) if any(r.relearning for r in m.selected_runs)] for n in summary.losses}
    shown = {name: methods for name, methods in shown.items() if methods}
    columns = [(name.replace("_", " "), _relearning(name)) for name in RELEARNED]
    retrained = [y.relearning for y in summary.setting.retrained.values() if y.relearning]
    figure = _draw_rows(shown, columns, "step of relearning", 1, retrained=bool(retrained))
    if figure and retrained:
        for i, axis in enumerate(figure.axes):
            for curve in retrained:
                values = [getattr(entry, RELEARNED[i % 3]) for entry in curve]
                axis.plot([entry.step for entry in curve], values, **RETRAINED_LINE)
    return figure


def _relearning(name: str) -> Callable[[Run], Curve]:
    def curve(run: Run) -> Curve:
        found = [(entry.step, value) for entry in run.relearning if (value := getattr(entry, name)) is not None]
        return [x for x, _ in found], [y for _, y in found]

    return curve


def _draw_rows(
    shown: dict[str, list[MethodSummary]],
    columns: Sequence[tuple[str, Callable[[Run], Curve]]],
    xlabel: str,
    least: int,
    levels: Sequence[Sequence[float | None]] = (),
    *,
    retrained: bool = False,
    window: int = 1,
    skip: Callable[[MethodSummary, int], bool] = lambda method, column: False,
) -> Figure | None:
    """Draw rows of losses and columns of measures if a curve has ``least`` points; horizontal lines at ``levels``."""
    runs = [run for methods in shown.values() for method in methods for run in method.selected_runs]
    if not any(len(curve(run)[0]) >= least for run in runs for _, curve in columns):
        return None
    figure, axes = panels(len(shown), len(columns), sharex=True, height=2.1)
    for row, (name, methods) in enumerate(shown.items()):
        for column, (title, curve) in enumerate(columns):
            axis: Any = axes[row, column]
            for method in methods:
                if not skip(method, column):
                    draw_mean_and_seeds(axis, method, [curve(run) for run in method.selected_runs], window)
            for level in levels[column] if levels else ():
                if level is not None:
                    axis.axhline(level, **RETRAINED_LINE)
            if row == 0:
                axis.set_title(title)
            if row == len(shown) - 1:
                axis.set_xlabel(xlabel)
        axes[row, 0].set_ylabel(next(m.method.losses_label for m in methods if m.method.losses == name))
    others = [Line2D([], [], **RETRAINED_LINE, label="retrained")] if retrained else []
    add_legend(figure, [m for methods in shown.values() for m in methods], *others)
    return figure
