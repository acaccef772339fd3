"""The figure: trade-off, cosine and norms by step, and the digits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from shared_lib.metrics import Scores

from .results import Results, Trace, replacing

COLOURS = {
    "gradient ascent": "#999999",
    "weighted sum": "#0072b2",
    "BLUR": "#d55e00",
    "normalized": "#009e73",
    "BLUR, retain metric": "#cc79a7",
}  # Okabe and Ito's, told apart by the colour-blind too


def draw(results: Results, before: str, yardstick: str, path: Path) -> None:
    """Write the figure as PNG."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    _draw_trade_off(axes[0, 0], results, before, yardstick)
    _draw_cosines(axes[0, 1], results.traces)
    _draw_norms(axes[1, 0], results.traces)
    _draw_digits(axes[1, 1], results)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    try:
        with replacing(path) as unfinished:
            figure.savefig(unfinished, dpi=130)
    finally:
        plt.close(figure)


def _draw_trade_off(axis: Axes, results: Results, before: str, yardstick: str) -> None:
    left, right = _retain_limits(results)
    for name, trace in results.traces.items():
        forget, retain = zip(*((p, min(kept)) for _, p, *kept in trace.path), strict=True)
        label = name if retain[-1] > left else f"{name} (goes to {retain[-1]:.2f})"
        axis.plot(retain, forget, ".-", label=label, **_style(name))
        axis.plot(retain[-1:], forget[-1:], "o", color=COLOURS[name], markersize=9, markerfacecolor="none")
    for name, marker in ((before, "s"), (yardstick, "*")):
        scores = results.scores[name]
        axis.plot(_kept(scores), scores["forget"].probability, marker, color="black", label=name, markersize=11)
    axis.set(
        title="Forget against keep, by step\n(circle: the end; better: right, and down to the star)",
        xlabel="probability of what is kept: the lesser of retained and untouched",
        ylabel="probability of answers to forget",
        yscale="log",
        ylim=(_least_forget_probability(results) / 2, 1.5),
        xlim=(left, right),
    )
    axis.legend(fontsize=8)


def _retain_limits(results: Results) -> tuple[float, float]:
    """Show the methods that retain; gradient ascent may leave the frame."""
    retained = [min(kept) for trace in _with_two_gradients(results.traces).values() for _, _, *kept in trace.path]
    retained += [_kept(kinds) for name, kinds in results.scores.items() if name not in results.traces]
    margin = 0.08 * (max(retained) - min(retained)) + 0.005
    return min(retained) - 3 * margin, max(retained) + margin


def _kept(scores: Mapping[str, Scores]) -> float:
    return min(scores[kind].probability for kind in ("retain", "untouched"))


def _least_forget_probability(results: Results) -> float:
    """Return the least of the methods that retain and of the yardstick, but nothing that no one can tell from 0."""
    reached = [kinds["forget"].probability for kinds in results.scores.values() if kinds["retain"].probability > 0.5]
    return max(1e-6, min(reached, default=1e-3))


def _style(name: str) -> dict[str, Any]:
    """Draw the weighted sum broad and first: BLUR's line often lies upon it."""
    broad = name == "weighted sum"
    return {"color": COLOURS[name], "linewidth": 4 if broad else 1.2, "alpha": 0.45 if broad else 0.9}


def _draw_cosines(axis: Axes, traces: Mapping[str, Trace]) -> None:
    for name, trace in _with_two_gradients(traces).items():
        axis.plot([step["cosine"] for step in trace.steps], label=name, **_style(name))
        if "metric_cosine" in trace.steps[0]:
            cosines = [step["metric_cosine"] for step in trace.steps]
            axis.plot(cosines, label=f"{name}: in it", **{**_style(name), "linestyle": ":"})
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(title="Cosine of forget and retain gradient", xlabel="step", ylabel="cos(g_f, g_r)")
    axis.legend(fontsize=8)


def _draw_norms(axis: Axes, traces: Mapping[str, Trace]) -> None:
    for name, trace in _with_two_gradients(traces).items():
        for norm, style in (("forget_norm", "-"), ("retain_norm", "--")):
            axis.plot([step[norm] for step in trace.steps], style, **_style(name))
        axis.plot([], [], "-", color=COLOURS[name], label=name)
    axis.plot([], [], "-", color="black", label="forget gradient")
    axis.plot([], [], "--", color="black", label="retain gradient")
    axis.set(title="Norms of the gradients", xlabel="step", ylabel="norm", yscale="log")
    axis.set_ylim(top=30 * axis.get_ylim()[1])  # room for the legend
    axis.legend(fontsize=8, ncols=2, loc="upper center")


def _with_two_gradients(traces: Mapping[str, Trace]) -> dict[str, Trace]:
    return {name: trace for name, trace in traces.items() if trace.steps}


def _draw_digits(axis: Axes, results: Results) -> None:
    for method, name, symbol in (("weighted_sum", "weighted sum", "λ"), ("blur", "BLUR", "γ")):
        outcomes = sorted((o for o in results.digits if o.method == method), key=lambda o: o.weight)
        loss, kl = [o.retain_loss for o in outcomes], [o.forget_kl for o in outcomes]
        axis.plot(loss, kl, "o-", color=COLOURS[name], label=f"{name}, by {symbol}", linewidth=1)
        for outcome in outcomes:
            axis.annotate(
                f"{outcome.weight:g}",
                (outcome.retain_loss, outcome.forget_kl),
                textcoords="offset points",
                xytext=(4, 5),
                fontsize=7,
            )
    axis.set(
        title="Digits: 40 images forgotten, their class kept\n(better: down and left)",
        xlabel="retain loss",
        ylabel="forget KL to uniform",
        xscale="log",
        yscale="log",
    )
    axis.legend(fontsize=8)
