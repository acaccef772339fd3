"""The report's figures."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ..summary import Summary
from .by_step import draw_gradients, draw_memorisation, draw_relearning
from .style import save
from .trade_off import draw_trade_off, draw_weights


@dataclass(frozen=True)
class Drawing:
    """A figure of the report. ``caption`` says what to look for."""

    key: str
    draw: Callable[[Summary], Figure | None]
    alternative: str
    caption: str


DRAWINGS = {
    drawing.key: drawing
    for drawing in (
        Drawing(
            "trade-off",
            draw_trade_off,
            "Fronts of forgetting against keeping",
            "Down is forgotten, right is kept; a line is the best that a method reaches while it keeps at least so "
            "much, with any of its weights and stopped at any time: bold the mean over seeds, pale each seed. Dotted: "
            "90, 95 and 99 % kept, where the tables compare. Look for a line below the broad blue one, the weighted "
            "sum, by more than the seeds differ. Below the star more is forgotten than by never having learned it.",
        ),
        Drawing(
            "gradients",
            draw_gradients,
            "Cosine, forget coefficient and norm of the forget gradient by step",
            "At the selected weight. Where the cosine stays near 0 there is nothing to project away and BLUR is the "
            "weighted sum; below 0 BLUR raises ξ above γ, above 0 it lowers it. A falling ‖g_f‖ is a forget loss that "
            "saturates. Bold: mean over seeds, smoothed; pale: each seed. The largest and the least 2 % may leave the "
            "frame.",
        ),
        Drawing(
            "memorisation",
            draw_memorisation,
            "What is still known by epoch",
            "At the selected weight. What is to be forgotten should fall to the dashed line, the retrained model; what "
            "is kept should stay where it began.",
        ),
        Drawing(
            "weights",
            draw_weights,
            "What is forgotten and kept by weight",
            "At the end of the run. More weight forgets more and keeps less. Look for methods that keep the lower "
            "panel high where the upper one has come down to the dashed retrained model, and for how wide the range of "
            "such weights is.",
        ),
        Drawing(
            "relearning",
            draw_relearning,
            "How fast what was forgotten comes back",
            "Some forgotten rows are trained again. If the others come back with them, faster than in the retrained "
            "model, they were hidden and not forgotten.",
        ),
    )
}


def draw_all(summary: Summary, folder: Path) -> dict[str, str]:
    """Write PNG and SVG of every figure there is data for; return the PNG's name by key."""
    names = {}
    for key, drawing in DRAWINGS.items():
        name = f"{summary.setting.name}-{key}"
        if save(lambda drawing=drawing: drawing.draw(summary), folder / name):
            names[key] = f"{name}.png"
    return names
