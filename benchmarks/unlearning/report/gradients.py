"""What the two gradients did to each other along a run: angle, size, and what was projected away."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .compare import Spread, spread
from .load import Run, Step


@dataclass(frozen=True)
class Alignment:
    """Runs of one method, one a seed.

    Args:
        cosine: mean over the steps of a run, over seeds.
        cosine_range, projection_range: least and largest of any step; projection is c = ⟨g_r, g_f⟩/‖g_f‖².
        opposed: share of a run's steps with a negative dot, over seeds.
        first_norm, last_norm: ‖g_f‖ of the first and the last step, over seeds.
        metric_cosine: as ``cosine``, in the metric that the step is taken in; None where there is none.
        effective_share: median over the steps of a run, over seeds, of the share of the coordinates that carry P g_f.
    """

    cosine: Spread | None
    cosine_range: tuple[float, float] | None
    opposed: Spread | None
    first_norm: Spread | None
    last_norm: Spread | None
    projection_range: tuple[float, float] | None
    metric_cosine: Spread | None
    effective_share: Spread | None


def alignment(runs: Sequence[Run]) -> Alignment:
    """Summarise the traces; what was never measured is None."""
    cosines = [found for run in runs if (found := _numbers(run.steps, "cosine"))]
    norms = [found for run in runs if (found := _numbers(run.steps, "forget_norm"))]
    in_metric = [found for run in runs if (found := _numbers(run.steps, "metric_cosine"))]
    shares = [found for run in runs if (found := _numbers(run.steps, "effective_share"))]
    projections = [value for run in runs for value in _numbers(run.steps, "projection")]
    return Alignment(
        cosine=spread([statistics.fmean(values) for values in cosines]),
        cosine_range=_range([value for values in cosines for value in values]),
        opposed=spread([sum(value < 0 for value in values) / len(values) for values in cosines]),
        first_norm=spread([values[0] for values in norms]),
        last_norm=spread([values[-1] for values in norms]),
        projection_range=_range(projections),
        metric_cosine=spread([statistics.fmean(values) for values in in_metric]),
        effective_share=spread([statistics.median(values) for values in shares]),
    )


def _numbers(steps: Sequence[Step], name: str) -> list[float]:
    return [value for step in steps if (value := getattr(step, name)) is not None]


def _range(values: Sequence[float]) -> tuple[float, float] | None:
    return (min(values), max(values)) if values else None
