"""The report: what ran, what was reached, every stage's tables. Written anew after each stage, whole or not at all."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .context import Context

DRY = (
    "**A rehearsal without a GPU, at toy size: that every stage runs is all that it shows. No number below means "
    "anything, and none was taken on a GPU.**"
)


def write_report(path: Path, results: Mapping[str, Any], machine: Mapping[str, str], context: Context) -> None:
    """Write the report on the stages that there are so far."""
    scratch = path.with_suffix(".new")
    scratch.write_text("\n".join(lines(results, machine, context)) + "\n")
    os.replace(scratch, path)


def lines(results: Mapping[str, Any], machine: Mapping[str, str], context: Context) -> Iterator[str]:
    yield "# What the GPU said" if context.device == "cuda" else "# A rehearsal of the GPU benchmark"
    yield ""
    if context.device != "cuda" or context.quick:
        yield from (DRY if context.device != "cuda" else "**Toy sizes: no number below means anything.**", "")
    yield from (f"- {name}: {value}" for name, value in machine.items())
    yield from ("", "## Stages", "")
    yield from table([_stage(name, result) for name, result in results.items()])
    limits = [{"stage": name, **limit} for name, result in results.items() for limit in result.get("limits", [])]
    if limits:
        yield from ("## What was to be reached", "")
        yield from table([limit | {"reached": "reached" if limit["reached"] else "MISSED"} for limit in limits])
    for name, result in results.items():
        yield from (f"## {name}", "", result["what"] + ".", "")
        for each in result.get("tables", []):
            yield from (f"**{each['title']}**", "")
            yield from table(each["rows"])
        for text in result.get("texts", []):
            yield from (text, "")
        yield from (f"- {note}" for note in result.get("notes", []))
        yield ""


def _stage(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    error = result.get("error", "")
    return {"stage": name, "came to": result["status"], "seconds": result["seconds"], "first error": error}


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The lines of a Markdown table, and an empty one."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not columns:
        yield from ("(no rows)", "")
        return
    yield _row(columns)
    yield _row(["---:" if _is_number(rows, name) else "---" for name in columns])
    for row in rows:
        yield _row([_cell(row.get(name)) for name in columns])
    yield ""


def _is_number(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return all(isinstance(row.get(name), int | float | None) for row in rows)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
