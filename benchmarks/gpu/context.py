"""What a stage is told, and what it says: both cross the border of its process as JSON."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Context:
    """What a stage is told.

    Args:
        device: "cuda" or "cpu".
        quick: toy sizes, on which no number means anything: a rehearsal.
        work: a folder for what is built and kept between stages; nothing in it is a result.
        deadline: ``time.time()`` at which the process is ended. A stage leaves out what would not be done by then.
        data: a folder with ``tofu/``, or None for invented authors.
    """

    device: str
    quick: bool
    work: Path
    deadline: float
    data: Path | None = None

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()

    @property
    def library(self) -> Path:
        """Where the stage ``build`` leaves the extension."""
        return self.work / "lib/blur_optim/_C.abi3.so"

    @property
    def variants(self) -> Path:
        """Where the stage ``build`` leaves the CUDA launchers compiled with other constants."""
        return self.work / "variants"

    @property
    def driver(self) -> Path:
        """Where the stage ``build`` leaves the program for compute-sanitizer."""
        return self.work / "driver"

    def to_json(self) -> str:
        fields = asdict(self) | {"work": str(self.work), "data": self.data and str(self.data)}
        return json.dumps(fields)

    @staticmethod
    def from_json(text: str) -> "Context":
        fields = json.loads(text)
        return Context(**fields | {"work": Path(fields["work"]), "data": fields["data"] and Path(fields["data"])})


@dataclass
class Sheet:
    """What a stage found, on the disk after every change: what ends the stage does not end what it had found.

    Args:
        tables: for the report: ``{"title": ..., "rows": [{column: cell}]}``.
        records: lines of the stage's CSV: every number that was taken.
        texts: Markdown that somebody else has written.
        limits: what was to be reached: ``{"what", "value", "limit", "reached"}``, the middle two as text.
        notes: what a reader has to know: what was left out, and why.
    """

    path: Path
    tables: list[dict[str, Any]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    limits: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a table, or put it in the place of the one with this title."""
        self.tables = [table for table in self.tables if table["title"] != title]
        self.tables.append({"title": title, "rows": [dict(row) for row in rows]})
        self.save()

    def record(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.records += [dict(record) for record in records]
        self.save()

    def limit(self, what: str, value: float, *, most: float | None = None, least: float | None = None) -> None:
        """Hold a number against what was to be reached; ``nan`` is missed."""
        reached = value <= most if most is not None else least is not None and value >= least
        bound = f"≤ {most:g}" if most is not None else f"≥ {least:g}"
        self.limits.append({"what": what, "value": f"{value:.3g}", "limit": bound, "reached": reached})
        self.save()

    def text(self, markdown: str) -> None:
        self.texts.append(markdown)
        self.save()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.save()

    def save(self) -> None:
        fields = {name: getattr(self, name) for name in ("tables", "records", "texts", "limits", "notes")}
        scratch = self.path.with_suffix(".new")
        scratch.write_text(json.dumps(fields))
        os.replace(scratch, self.path)
