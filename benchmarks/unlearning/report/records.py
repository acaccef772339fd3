"""The report's numbers as JSON: tables, sentences, and the points and curves of the figures."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from .compare import Paired
from .load import METRIC_NUMBERS, RELEARNED, STEP_NUMBERS, Run, Step
from .reading import reading
from .summary import MethodSummary, Summary
from .table import Table

FORMAT = 1
DIGITS = 5
LONGEST_TRACE = 60  # steps of a run that are kept, evenly spaced
LINE = 118
_ABSOLUTE = re.compile(r"(?<![\w./~])(?:/|[A-Za-z]:\\|~/)[^\s'\",;:]*[\\/]([^\s'\",;:\\/]*)")


def portable(value: Any) -> Any:
    """Replace absolute paths in all strings: what lies where on one machine is nothing to others."""
    if isinstance(value, str):
        return _ABSOLUTE.sub(lambda match: f"path/to/{match[1]}", value)
    if isinstance(value, dict):
        return {name: portable(part) for name, part in value.items()}
    return [portable(part) for part in value] if isinstance(value, list) else value


def record(summary: Summary, tables: Mapping[str, tuple[Table, ...]]) -> dict[str, Any]:
    """Return what the JSON file holds."""
    return {
        "format": FORMAT,
        "settings": summary.setting.values,
        "runs": {
            "expected": sum(len(m.expected) for m in summary.methods),
            "missing": {m.method.id: m.missing for m in summary.methods if m.missing},
            "diverged": {m.method.id: m.diverged for m in summary.methods if m.diverged},
            "left_out": summary.left_out,
        },
        "reading": reading(summary),
        "tables": {table.key: _table(table) for section in tables.values() for table in section},
        "fronts": {m.method.id: _fronts(m) for m in summary.methods if m.points},
        "runs_at_selected_weight": {m.method.id: _runs(m) for m in summary.methods if m.selected_runs},
    }


def _table(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "columns": [column.name for column in table.columns],
        "rows": [[_cell(cell) for cell in _without_repeats(row)] for row in table.rows],
    }


def _without_repeats(row: Sequence[Any]) -> Sequence[Any]:
    """Keep a comparison once: several columns show parts of it."""
    return [cell for i, cell in enumerate(row) if not (isinstance(cell, Paired) and cell is row[i - 1])]


def _cell(cell: Any) -> Any:
    if isinstance(cell, Paired):
        return {**asdict(cell), "verdict": cell.verdict}
    return asdict(cell) if is_dataclass(cell) else cell


def _fronts(method: MethodSummary) -> dict[str, Any]:
    return {
        str(seed): {name: [getattr(p, name) for p in points] for name in ("kept", "log_prob", "probability")}
        for seed, points in method.front_by_seed.items()
    }


def _runs(method: MethodSummary) -> dict[str, Any]:
    return {str(run.seed): _run(run) for run in method.selected_runs}


def _run(run: Run) -> dict[str, Any]:
    every = max(1, math.ceil(len(run.steps) / LONGEST_TRACE))
    steps = run.steps[::every]
    path = [point for point in run.path if point.measured]
    return {
        "steps": {
            name: [getattr(step, name) for step in steps] for name in ("step", *STEP_NUMBERS, *_in_metric(steps))
        },
        "path": {
            "epoch": [point.epoch for point in path],
            **{f"p_{k}": [getattr(p.measured, k).probability for p in path] for k in ("forget", "retain", "untouched")},
            "memorisation": [point.memorisation for point in path if point.memorisation],
        },
        "relearning": {name: [getattr(e, name) for e in run.relearning] for name in ("step", *RELEARNED)},
    }


def _in_metric(steps: Sequence[Step]) -> tuple[str, ...]:
    return tuple(name for name in METRIC_NUMBERS if any(getattr(step, name) is not None for step in steps))


def to_text(value: Any, indent: int = 0) -> str:
    """Return JSON in which what fits stands on one line, and lists of numbers always do."""
    value = _rounded(value)
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list)) or len(flat) + indent <= LINE or _is_numbers(value):
        return flat
    space = "\n" + " " * (indent + 1)
    if isinstance(value, list):
        parts = [to_text(part, indent + 1) for part in value]
        return f"[{space}{f',{space}'.join(parts)}\n{' ' * indent}]"
    parts = [
        f"{json.dumps(str(name), ensure_ascii=False)}: {to_text(part, indent + 1)}" for name, part in value.items()
    ]
    return f"{{{space}{f',{space}'.join(parts)}\n{' ' * indent}}}"


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(part, (dict, list, str)) for part in value)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, (list, tuple)) else value
