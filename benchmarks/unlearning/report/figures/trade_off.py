"""The trade-off: how much is forgotten for how much is kept."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MultipleLocator

from ..compare import TAUS, Point
from ..load import Measured
from ..summary import MethodSummary, Summary
from .style import add_legend, draw_mean_and_seeds, line_style, panels

COLUMNS, PANELS_ABREAST = 3, 4
FORGOTTEN, KEPT = "log p_forget", "kept: the lesser share of p_retain\nand p_untouched of the target's"
YARDSTICKS = {"target": "s", "retrained": "*"}
RETRAINED_LINE = {"color": "black", "linewidth": 0.9, "linestyle": "--"}


def draw_trade_off(summary: Summary) -> Figure | None:
    """Draw a panel for each pair of losses: fronts by method, seeds pale, their mean bold."""
    if not any(m.points for m in summary.methods):
        return None
    losses = summary.losses
    columns = 2 if len(losses) in (2, 4) else min(COLUMNS, len(losses))
    figure, axes = panels(-(-len(losses) // columns), columns, width=3.7, height=3.0)
    left = _least_kept(summary)
    for i, (axis, name) in enumerate(zip(axes.flat, losses, strict=False)):
        methods = summary.of_losses(name)
        lowest = _draw_panel(axis, methods, left)
        _draw_yardsticks(axis, summary)
        axis.set_title(next(m.method.losses_label for m in methods if m.method.losses == name))
        axis.set(xlim=(left, 1.03), ylim=(1.1 * min(lowest, _level(summary)), 0.05 * -lowest + 0.05))
        axis.xaxis.set_major_locator(MultipleLocator(0.05 if left > 0.75 else 0.1))
        axis.set_ylabel(FORGOTTEN if i % columns == 0 else "")
        axis.set_xlabel(KEPT if i + columns >= len(losses) else "")
    for axis in axes.flat[len(losses) :]:
        axis.set_axis_off()
    marks = [Line2D([], [], color="black", marker=m, linestyle="", label=n) for n, m in YARDSTICKS.items()]
    add_legend(figure, summary.methods, *marks)
    return figure


def _level(summary: Summary) -> float:
    """Return the retrained model's log p_forget, 0 without one."""
    levels = [yardstick.final.forget.log_prob for yardstick in summary.setting.retrained.values()]
    return sum(levels) / len(levels) if levels else 0.0


def _least_kept(summary: Summary) -> float:
    """Return where the frame begins: a little left of where all that retain have reached the retrained level."""
    fronts = [points for m in summary.methods if m.method.retain_loss for points in m.front_by_seed.values()]
    level = _level(summary)
    reached = [max(kept) for points in fronts if (kept := [p.kept for p in points if p.log_prob <= level])]
    return max(0.3, min([0.87, *reached]) - 0.05)


def _draw_panel(axis: Axes, methods: tuple[MethodSummary, ...], left: float) -> float:
    """Draw the fronts from ``left`` on; return the lowest mean of a method that retains."""
    for tau in TAUS:
        axis.axvline(tau, color="black", linewidth=0.6, linestyle=":")
    lowest = -0.1
    for method in methods:
        fronts = list(method.front_by_seed.values())
        if len(fronts) > 1:
            for points in fronts:
                _draw_steps(axis, *_curve([points], left), style=line_style(method, bold=False))
        kept, forgotten = _curve(fronts, left)
        _draw_steps(axis, kept, forgotten, style=line_style(method, bold=True))
        if method.method.retain_loss:
            lowest = min([lowest, *forgotten])
    return lowest


def _draw_steps(axis: Axes, kept: list[float], forgotten: list[float], style: dict) -> None:
    axis.plot(kept, forgotten, drawstyle="steps-pre", **style)


def _curve(fronts: list[tuple[Point, ...]], left: float) -> tuple[list[float], list[float]]:
    """Return the mean of the lowest log p by what is kept, from ``left`` as far as every front reaches."""
    if not fronts or not all(fronts):
        return [], []
    reach = min(points[0].kept for points in fronts)
    levels = sorted({left, *(point.kept for points in fronts for point in points if left < point.kept <= reach)})
    levels = [level for level in levels if level <= reach]
    return levels, [sum(_lowest(points, level) for points in fronts) / len(fronts) for level in levels]


def _lowest(points: tuple[Point, ...], level: float) -> float:
    return min(point.log_prob for point in points if point.kept >= level)


def _draw_yardsticks(axis: Axes, summary: Summary) -> None:
    """Mark target and retrained model; each share is of the target of its own seed, or of the only one."""
    targets, retrained = summary.setting.targets, summary.setting.retrained
    fallback = targets.get(None, next(iter(targets.values())))
    for name, yardsticks in (("target", targets), ("retrained", retrained)):
        for seed, yardstick in yardsticks.items():
            target = targets.get(seed, fallback)
            x, y = _kept(yardstick.final, target.final), yardstick.final.forget.log_prob
            axis.plot(x, y, YARDSTICKS[name], color="black", markersize=5 if name == "target" else 9, zorder=4)


def _kept(measured: Measured, target: Measured) -> float:
    return min(
        measured.retain.probability / target.retain.probability,
        measured.untouched.probability / target.untouched.probability,
    )


def draw_weights(summary: Summary) -> Figure | None:
    """Draw what the end of the run has forgotten and kept, by weight; a column for each pair of losses."""
    if not any(run.final for run in summary.sweep_runs):
        return None
    by_losses: dict[str, list[MethodSummary]] = {}
    for method in summary.methods:
        if method.method.retain_loss and method.runs:
            by_losses.setdefault(method.method.losses_label, []).append(method)
    if not by_losses:
        return None
    columns = min(PANELS_ABREAST, len(by_losses))
    figure, axes = panels(2 * -(-len(by_losses) // columns), columns, width=2.7, height=2.3)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (name, methods) in enumerate(by_losses.items()):
        row, column = 2 * (i // columns), i % columns
        _draw_by_weight(summary, methods, axes[row, column], axes[row + 1, column])
        axes[row, column].set_title(name)
        if column == 0:
            axes[row, 0].set_ylabel(FORGOTTEN)
            axes[row + 1, 0].set_ylabel(KEPT)
    label = [Line2D([], [], **RETRAINED_LINE, label="retrained")] if summary.setting.retrained else []
    add_legend(figure, [m for methods in by_losses.values() for m in methods], *label)
    return figure


def _draw_by_weight(summary: Summary, methods: list[MethodSummary], forgotten: Axes, kept: Axes) -> None:
    for method in methods:
        for axis, curves in zip((forgotten, kept), _by_weight(summary, method), strict=True):
            draw_mean_and_seeds(axis, method, curves)
    for yardstick in summary.setting.retrained.values():
        forgotten.axhline(yardstick.final.forget.log_prob, **RETRAINED_LINE)
    for axis in (forgotten, kept):
        axis.set_axis_on()
        axis.set_xscale("log")
    forgotten.set_yscale("symlog", linthresh=1)
    forgotten.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    forgotten.set_ylim(top=0.1)
    forgotten.tick_params(labelbottom=False)
    kept.set_xlabel("weight w = γ")


def _by_weight(summary: Summary, method: MethodSummary) -> tuple[list, list]:
    """Return curves over the weight for each seed: of what is forgotten, and of what is kept."""
    forgotten, kept = [], []
    for seed in summary.setting.seeds:
        target = summary.setting.target(seed)
        runs = [run for run in method.runs if run.seed == seed and run.final and run in method.runs_at(run.weight)]
        runs.sort(key=lambda run: run.weight)
        weights = [run.weight for run in runs]
        forgotten.append((weights, [run.final.forget.log_prob for run in runs]))
        if target:
            kept.append((weights, [_kept(run.final, target.final) for run in runs]))
    return forgotten, kept
