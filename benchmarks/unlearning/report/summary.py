"""What the runs of a setting come to, method by method: all that tables, figures and sentences are made of."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from .compare import TAUS, Paired, Point, crossings, front, hypervolume, lowest_at, paired
from .load import Measured, Run, Selected, Setting, Yardstick
from .names import FORGET_ONLY, Method

SWEEP = "sweep"


@dataclass(frozen=True)
class MethodSummary:
    """A method on the held-out seeds.

    Args:
        runs: of the sweep, one for each learning rate, weight and seed.
        expected: the weight and seed of each run that there will be.
        points: by seed, of all runs and of their paths. A seed that has not run is absent, here and below.
        tuning: the runs on the tuning seed.
        lowest: where p_forget is lowest, by tau and seed, between looks too; None where nothing keeps that much.
        lowest_on_line: the same on the straight line from the target to the end of a run; of seeds whose runs looked
            there.
    """

    method: Method
    selected: Selected | None
    runs: tuple[Run, ...]
    tuning: tuple[Run, ...]
    expected: tuple[tuple[float, int], ...]
    points: dict[int, tuple[Point, ...]]
    lowest: dict[float, dict[int, Point | None]]
    lowest_on_line: dict[float, dict[int, Point | None]]
    hypervolumes: dict[int, float]

    @property
    def at_tau(self) -> dict[float, dict[int, float | None]]:
        """Return the log p_forget of ``lowest``."""
        return _log_probs(self.lowest)

    @property
    def on_line(self) -> dict[float, dict[int, float | None]]:
        """Return the log p_forget of ``lowest_on_line``."""
        return _log_probs(self.lowest_on_line)

    @property
    def missing(self) -> tuple[tuple[float, int], ...]:
        """Return weight and seed of runs that are still to come."""
        there = {(run.weight, run.seed) for run in self.runs}
        return tuple(pair for pair in self.expected if pair not in there)

    @property
    def weights(self) -> tuple[float, ...]:
        """Return the weights of all runs, those to come too."""
        return tuple(dict.fromkeys(weight for weight, _ in self.expected))

    @property
    def diverged(self) -> int:
        return sum(run.diverged for run in self.runs)

    @property
    def selected_runs(self) -> tuple[Run, ...]:
        """Return the runs at the selected learning rate and weight, one a seed."""
        if self.selected is None:
            return ()
        chosen = (self.selected.lr, self.selected.weight)
        return tuple(run for run in self.runs if (run.lr, run.weight) == chosen)

    @property
    def front_by_seed(self) -> dict[int, tuple[Point, ...]]:
        return {seed: front(points) for seed, points in self.points.items()}

    def runs_at(self, weight: float) -> tuple[Run, ...]:
        """Return the runs of this weight; where several learning rates were swept, those of the selected one."""
        runs = [run for run in self.runs if run.weight == weight]
        if self.selected and len({run.lr for run in runs}) > 1:
            runs = [run for run in runs if run.lr == self.selected.lr]
        return tuple(runs)


@dataclass(frozen=True)
class Summary:
    """A setting's methods in its own order. ``left_out``: run files of no method, seed, weight or lr of it."""

    setting: Setting
    methods: tuple[MethodSummary, ...]
    left_out: int

    @cached_property
    def by_id(self) -> dict[str, MethodSummary]:
        return {summary.method.id: summary for summary in self.methods}

    @property
    def losses(self) -> tuple[str, ...]:
        """Return pairs of losses that are compared within; a forget loss alone belongs to each pair it is part of."""
        paired_ = [s.method.losses for s in self.methods if s.method.combine != FORGET_ONLY]
        alone = [s.method.losses for s in self.methods if s.method.combine == FORGET_ONLY]
        lonely = [name for name in alone if all(pair.partition("+")[0] != name for pair in paired_)]
        return tuple(dict.fromkeys(paired_ + lonely))

    def of_losses(self, losses: str) -> tuple[MethodSummary, ...]:
        """Return the methods with these losses, and the forget loss alone."""
        forget = losses.partition("+")[0]
        return tuple(s for s in self.methods if s.method.losses in (losses, forget))

    @property
    def sweep_runs(self) -> tuple[Run, ...]:
        return tuple(run for summary in self.methods for run in summary.runs)

    def baseline(self, summary: MethodSummary) -> MethodSummary | None:
        """Return the weighted sum of the same losses, if it is one of the methods and not this one."""
        return self.by_id.get(summary.method.baseline or "")

    def at_equal_retain(self, summary: MethodSummary, tau: float, *, on_line: bool = False) -> Paired | None:
        """Compare log p_forget with the baseline's; None without one."""
        baseline = self.baseline(summary)
        if baseline is None:
            return None
        ours, theirs = (m.on_line[tau] if on_line else m.at_tau[tau] for m in (summary, baseline))
        return paired(ours, theirs, self.setting.seeds, lower_wins=True)

    def of_hypervolume(self, summary: MethodSummary) -> Paired | None:
        """Compare hypervolumes with the baseline's; None without one."""
        baseline = self.baseline(summary)
        if baseline is None:
            return None
        return paired(summary.hypervolumes, baseline.hypervolumes, self.setting.seeds, lower_wins=False)

    def of_ends(self, summary: MethodSummary, kind: str) -> Paired | None:
        """Compare the probability of a kind of rows at the end of the selected runs; None without a baseline."""
        baseline = self.baseline(summary)
        if baseline is None:
            return None
        ours, theirs = (
            {run.seed: getattr(run.final, kind).probability if run.final else None for run in m.selected_runs}
            for m in (summary, baseline)
        )
        return paired(ours, theirs, self.setting.seeds, lower_wins=kind == "forget")

    def reached_retrained(self, values: dict[int, float | None]) -> int | None:
        """Count seeds whose log p_forget is no higher than the retrained model's: its own target's, or their mean."""
        levels = {seed: y.final.forget.log_prob for seed, y in self.setting.retrained.items()}
        if not levels:
            return None
        mean = sum(levels.values()) / len(levels)
        return sum(value is not None and value <= levels.get(seed, mean) for seed, value in values.items())


def summarize(setting: Setting) -> Summary:
    """Sort the runs by method and compute what does not need a baseline."""
    ids = {method.id for method in setting.methods}
    runs = [run for run in setting.runs if run.method.id in ids]
    sweep = [run for run in runs if run.stage == SWEEP and run.seed in setting.seeds and _is_planned(setting, run)]
    tuning = [run for run in runs if run.stage != SWEEP]
    return Summary(
        setting=setting,
        methods=tuple(
            _summarize(setting, m, *([run for run in some if run.method == m] for some in (sweep, tuning)))
            for m in setting.methods
        ),
        left_out=len(setting.runs) - len(sweep) - len(tuning),
    )


def _is_planned(setting: Setting, run: Run) -> bool:
    """Tell whether the sweep has this run: the folder may hold those of an earlier grid, or of an earlier choice."""
    weights, selected = setting.sweep_weights.get(run.method.id), setting.selected.get(run.method.id)
    return weights is None or (run.weight in weights and (selected is None or run.lr == selected.lr))


def _summarize(setting: Setting, method: Method, runs: list[Run], tuning: list[Run]) -> MethodSummary:
    runs = _without_doubles(runs)
    selected = setting.selected.get(method.id)
    have_run = {run.seed for run in runs if setting.target(run.seed)}
    paths = {
        seed: [_path(setting, run) for run in runs if run.seed == seed] for seed in setting.seeds if seed in have_run
    }
    lines = {seed: [_line(setting, run) for run in runs if run.seed == seed and run.line] for seed in setting.seeds}
    # A run that diverged has no end to draw a line from: nothing there keeps anything, which is not "has not run".
    without_end = {run.seed for run in runs if run.diverged} if any(run.line for run in setting.runs) else set()
    lines = {seed: found for seed, found in lines.items() if (found or seed in without_end) and seed in have_run}
    points = {seed: tuple(chain.from_iterable(found)) for seed, found in paths.items()}
    return MethodSummary(
        method=method,
        selected=selected,
        runs=tuple(runs),
        tuning=tuple(_without_doubles(tuning)),
        expected=tuple((weight, seed) for weight in _weights(setting, method, runs) for seed in setting.seeds),
        points=points,
        lowest={tau: {seed: _lowest_along(found, tau) for seed, found in paths.items()} for tau in TAUS},
        lowest_on_line={tau: {seed: _lowest_along(found, tau) for seed, found in lines.items()} for tau in TAUS},
        hypervolumes={s: hypervolume((1 - p.probability, p.kept) for p in found) for s, found in points.items()},
    )


def _weights(setting: Setting, method: Method, runs: list[Run]) -> tuple[float, ...]:
    """Return the weights that there will be: those that are said to be; or else the grid, if runs are on it."""
    if method.id in setting.sweep_weights:
        return setting.sweep_weights[method.id]
    selected = setting.selected.get(method.id)
    there = {run.weight for run in runs} | ({selected.weight} if selected else set())
    if method.combine == FORGET_ONLY:  # There is nothing to weigh.
        return tuple(sorted(there, reverse=True)) or (1.0,)
    if there <= set(setting.weights) or not runs:
        return setting.weights
    return tuple(sorted(there, reverse=True))


def _without_doubles(runs: Iterable[Run]) -> list[Run]:
    """Keep one run of each job, with full scores if one has them, ordered by weight and seed."""
    best: dict[tuple[float, float, int], Run] = {}
    for run in sorted(runs, key=lambda run: run.scores is not None):
        best[run.weight, run.lr, run.seed] = run
    return [best[key] for key in sorted(best, key=lambda key: (-key[0], key[1], key[2]))]


def _log_probs(lowest: dict[float, dict[int, Point | None]]) -> dict[float, dict[int, float | None]]:
    return {
        tau: {seed: None if point is None else point.log_prob for seed, point in found.items()}
        for tau, found in lowest.items()
    }


def _path(setting: Setting, run: Run) -> list[Point]:
    target = setting.target(run.seed)
    assert target is not None
    return path_of(run, target)


def path_of(run: Run, target: Yardstick) -> list[Point]:
    """Return the points of a run that began at ``target``, of what was finite."""
    path = [_point(entry.measured, target, start=entry.step == 0) for entry in run.path if entry.measured]
    return [*path, _point(run.final, target, start=False)] if run.final else path


def _line(setting: Setting, run: Run) -> list[Point]:
    """Return the points between the end of a run and the target, those two included."""
    target = setting.target(run.seed)
    assert target is not None
    looks = [(run.final, False), *((look.measured, False) for look in run.line), (target.final, True)]
    return [_point(measured, target, start=start) for measured, start in looks if measured]


def stop_at_unseen(setting: Setting, run: Run) -> tuple[int, float] | tuple[None, None] | None:
    """Find the first look at which the rows to forget are as improbable as rows that nobody learned.

    Returns:
        Its step, and what is kept there; (None, None) of a run that has none; None where the level is not known.
    """
    target = setting.target(run.seed)
    if target is None or target.unseen is None:
        return None
    for entry in run.path:
        if entry.measured and entry.measured.forget.log_prob <= target.unseen.log_prob:
            return entry.step, _point(entry.measured, target, start=False).kept
    return None, None


def share_kept(setting: Setting, run: Run) -> float:
    """Return what is kept at the end of a run that did not diverge."""
    target = setting.target(run.seed)
    assert target is not None
    assert run.final is not None
    return _point(run.final, target, start=False).kept


def _lowest_along(paths: list[list[Point]], tau: float) -> Point | None:
    """Return where log p_forget is lowest, at any look or between two looks of a run, of what keeps at least tau."""
    return lowest_at([point for path in paths for point in (*path, *crossings(path, tau))], tau)


def _point(measured: Measured, target: Yardstick, *, start: bool) -> Point:
    return Point(
        kept=min(
            measured.retain.probability / target.final.retain.probability,
            measured.untouched.probability / target.final.untouched.probability,
        ),
        log_prob=measured.forget.log_prob,
        probability=measured.forget.probability,
        start=start,
    )
