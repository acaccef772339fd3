"""Result files of one setting as typed objects; an error names the file and the field."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared_lib.errors import InputError

from .fields import Fields
from .names import Method

FORMAT = 1
KINDS = ("forget", "retain", "untouched")
MEMORISATION = ("verbmem", "knowmem")  # parts of the names of what the muse track measures along the path
STEP_NUMBERS = ("cosine", "forget_norm", "retain_norm", "forget_coefficient", "retain_coefficient")
METRIC_NUMBERS = ("metric_cosine", "effective_share")  # of a step in a metric
RELEARNED = ("relearned_rows", "other_forgotten_rows", "retain")


@dataclass(frozen=True)
class Probability:
    """How well answers are known: ``log_prob`` by token, ``probability`` = mean over rows of exp of it."""

    log_prob: float
    probability: float


@dataclass(frozen=True)
class Measured:
    """The three kinds of rows of one model."""

    forget: Probability
    retain: Probability
    untouched: Probability


@dataclass(frozen=True)
class PathPoint:
    """A run after ``step`` steps; ``measured`` is None where numbers were not finite."""

    step: int
    epoch: float
    measured: Measured | None
    memorisation: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What one step saw; None where there was no such gradient or the number was not finite."""

    step: int
    cosine: float | None
    forget_norm: float | None
    retain_norm: float | None
    forget_coefficient: float | None
    retain_coefficient: float | None
    metric_cosine: float | None = None
    effective_share: float | None = None

    @property
    def projection(self) -> float | None:
        """Return c = ⟨g_r, g_f⟩/‖g_f‖² = cos·‖g_r‖/‖g_f‖, what ``"blur"`` takes from the forget weight."""
        if self.cosine is None or self.retain_norm is None or not self.forget_norm:
            return None
        return self.cosine * self.retain_norm / self.forget_norm


@dataclass(frozen=True)
class Relearning:
    """Mean probabilities after ``step`` steps of training on a part of what was forgotten."""

    step: int
    relearned_rows: float | None
    other_forgotten_rows: float | None
    retain: float | None


@dataclass(frozen=True)
class Run:
    """One result file. ``line``: between the target and the end of the run, from there on; empty if not looked at."""

    stage: str
    method: Method
    weight: float
    lr: float
    planned_steps: int
    seed: int
    full_scores: bool
    path: tuple[PathPoint, ...]
    line: tuple[PathPoint, ...]
    steps: tuple[Step, ...]
    final: Measured | None
    scores: dict[str, float | None] | None
    quantized: Measured | None
    restored: Measured | None
    relearning: tuple[Relearning, ...]
    diverged: bool
    seconds: float


@dataclass(frozen=True)
class Yardstick:
    """A model that nothing was unlearned from: the target, or one that never saw the rows to forget.

    ``unseen``: how well it knows rows that nobody learned. ``quantized``: what is left of it in 4 bits.
    """

    final: Measured
    memorisation: dict[str, float]
    scores: dict[str, float | None]
    relearning: tuple[Relearning, ...]
    unseen: Probability | None = None
    quantized: Measured | None = None


@dataclass(frozen=True)
class Selected:
    """What tuning chose for a method."""

    lr: float
    weight: float


@dataclass(frozen=True)
class Cost:
    """Time of a step relative to the baseline's, and gradient sets held beside its."""

    median: float
    low: float
    high: float
    extra_gradient_sets: float | None


@dataclass(frozen=True)
class Setting:
    """All that a folder holds. Yardsticks are by seed; under None the one for every seed.

    ``tuning_target`` is what the runs of the tuning seed began from, None if not known. ``sweep_weights`` has the
    weights of each method, where they are not ``weights`` for all.
    """

    values: dict[str, Any]
    name: str
    track: str
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    weights: tuple[float, ...]
    sweep_weights: dict[str, tuple[float, ...]]
    lrs: tuple[float, ...]
    tuning_seed: int | None
    selected: dict[str, Selected]
    tuning_target: Yardstick | None
    targets: dict[int | None, Yardstick]
    retrained: dict[int | None, Yardstick]
    runs: tuple[Run, ...]
    cost_baseline: str | None
    costs: dict[str, Cost]

    def target(self, seed: int) -> Yardstick | None:
        """Return the model that runs of this seed began from."""
        return self.targets.get(seed, self.targets.get(None))

    def retrained_model(self, seed: int) -> Yardstick | None:
        """Return the model that runs of this seed should come to."""
        return self.retrained.get(seed, self.retrained.get(None))


def load(folder: Path) -> Setting:
    """Read the folder of one setting; only ``settings.json`` must be there.

    Raises:
        InputError: a file is not as it should be; names the file and the field.
    """
    fields = _read(folder / "settings.json")
    targets, tuning_target = _yardsticks(folder, "target"), folder / "tuning-target.json"
    cost = _read(folder / "cost.json") if (folder / "cost.json").is_file() else None
    return Setting(
        values=fields.values,
        name=fields.text("name"),
        track=fields.text("track"),
        methods=tuple(_method(fields, name) for name in fields.get("methods", list, "a list of method ids")),
        seeds=tuple(int(seed) for seed in fields.numbers("seeds")),
        weights=fields.numbers("weights"),
        sweep_weights=_sweep_weights(fields),
        lrs=fields.numbers("lrs"),
        tuning_seed=fields.integer("tuning_seed") if fields.values.get("tuning_seed") is not None else None,
        selected=_selected(fields),
        tuning_target=_yardstick(_read(tuning_target)) if tuning_target.is_file() else targets.get(None),
        targets=targets,
        retrained=_yardsticks(folder, "retrained"),
        runs=tuple(_run(_read(path)) for path in sorted((folder / "runs").glob("*.json"))),
        cost_baseline=cost.text("baseline") if cost else None,
        costs=_costs(cost.child("methods")) if cost else {},
    )


def _read(path: Path) -> Fields:
    try:
        return Fields(str(path), json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing. A folder of results must hold it.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: the file must hold one JSON object. {error}") from error


def _method(fields: Fields, name: Any) -> Method:
    try:
        return Method.parse(name)
    except ValueError as error:
        raise InputError(f"{fields.where}: {error}") from error


def _sweep_weights(fields: Fields) -> dict[str, tuple[float, ...]]:
    if fields.values.get("sweep_weights") is None:
        return {}
    weights = fields.child("sweep_weights")
    return {name: weights.numbers(name) for name in weights.values}


def _selected(fields: Fields) -> dict[str, Selected]:
    if fields.values.get("selected") is None:
        return {}
    chosen = fields.child("selected")
    children = {name: chosen.child(name) for name in chosen.values}
    return {name: Selected(child.number("lr"), child.number("weight")) for name, child in children.items()}


def _yardsticks(folder: Path, name: str) -> dict[int | None, Yardstick]:
    found: dict[int | None, Yardstick] = {}
    for path in sorted(folder.glob(f"{name}*.json")):
        seed = path.stem.removeprefix(name).removeprefix("-")
        if seed and not seed.isdecimal():
            raise InputError(f"{path} must be named {name}.json or {name}-<seed>.json.")
        found[int(seed) if seed else None] = _yardstick(_read(path))
    return found


def _yardstick(fields: Fields) -> Yardstick:
    return Yardstick(
        _measured(fields.child("final")),
        _memorisation(fields.child("final")),
        _scores(fields) or {},
        _relearning(fields),
        _probability(fields.child("unseen")) if fields.values.get("unseen") else None,
        _measured_if_there(fields, "quantized"),
    )


def _measured(fields: Fields) -> Measured:
    return Measured(**{kind: _probability(fields.child(kind)) for kind in KINDS})


def _probability(fields: Fields) -> Probability:
    return Probability(fields.number("log_prob"), fields.number("probability"))


def _measured_or_none(fields: Fields) -> Measured | None:
    """Return None where a number is null or not finite, as after a divergence."""
    for kind in KINDS:
        values = fields.values.get(kind, {})
        if values is None or (isinstance(values, dict) and _has_nothing(values)):
            return None
    return _measured(fields)


def _measured_if_there(fields: Fields, name: str) -> Measured | None:
    return _measured_or_none(fields.child(name)) if fields.values.get(name) else None


def _has_nothing(values: dict[str, Any]) -> bool:
    names = [name for name in ("log_prob", "probability") if name in values]
    return any(values[n] is None or (isinstance(values[n], float) and not math.isfinite(values[n])) for n in names)


def _scores(fields: Fields) -> dict[str, float | None] | None:
    if fields.values.get("scores") is None:
        return None
    scores = fields.child("scores")
    return {name: scores.number_or_none(name) for name in scores.values}


def _relearning(fields: Fields) -> tuple[Relearning, ...]:
    if fields.values.get("relearning") is None:
        return ()
    return tuple(
        Relearning(entry.integer("step"), *(entry.number_or_none(name) for name in RELEARNED))
        for entry in fields.children("relearning")
    )


def _run(fields: Fields) -> Run:
    if fields.get("format", int, f"the integer {FORMAT}") != FORMAT:
        raise InputError(f"{fields.where}: field `format` must be {FORMAT}, got {fields.values['format']}.")
    job, diverged = fields.child("job"), fields.flag("diverged")
    return Run(
        stage=job.text("stage"),
        method=_method(fields, job.text("method")),
        weight=job.number("weight"),
        lr=job.number("lr"),
        planned_steps=job.integer("steps"),
        seed=job.integer("seed"),
        full_scores=job.values.get("full_scores") is True,
        path=tuple(_path_point(entry) for entry in fields.children("path")) if fields.values.get("path") else (),
        line=tuple(_path_point(entry) for entry in fields.children("line")) if fields.values.get("line") else (),
        steps=tuple(_step(entry) for entry in fields.children("steps")) if fields.values.get("steps") else (),
        final=None if diverged else _measured(fields.child("final")),
        scores=_scores(fields),
        quantized=_measured_if_there(fields, "quantized"),
        restored=_measured_if_there(fields, "restored"),
        relearning=_relearning(fields),
        diverged=diverged,
        seconds=fields.number_or_none("seconds") or 0.0,
    )


def _memorisation(fields: Fields) -> dict[str, float]:
    names = [name for name in fields.values if any(part in name for part in MEMORISATION)]
    numbers = {name: fields.number_or_none(name) for name in names}
    return {name: number for name, number in numbers.items() if number is not None}


def _path_point(fields: Fields) -> PathPoint:
    return PathPoint(
        step=fields.integer("step"),
        epoch=fields.number("epoch"),
        measured=_measured_or_none(fields),
        memorisation=_memorisation(fields),
    )


def _step(fields: Fields) -> Step:
    return Step(fields.integer("step"), *(fields.number_or_none(name) for name in (*STEP_NUMBERS, *METRIC_NUMBERS)))


def _costs(methods: Fields) -> dict[str, Cost]:
    costs = {}
    for name in methods.values:
        method = methods.child(name)
        ratio = method.child("time_ratio")
        numbers = (ratio.number(part) for part in ("median", "low", "high"))
        costs[name] = Cost(*numbers, method.number_or_none("extra_gradient_sets"))
    return costs
