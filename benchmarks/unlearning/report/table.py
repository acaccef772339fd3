"""What a table of the report is: raw values in cells, so that Markdown and JSON are made of the same."""

from dataclasses import dataclass
from typing import Any

Cell = Any  # None, str, int, float, Spread, Paired or (least, largest)


@dataclass(frozen=True)
class Column:
    """A heading, and how its cells are written: one of ``markdown.FORMATS``."""

    name: str
    form: str = "text"


@dataclass(frozen=True)
class Table:
    """Rows of cells. ``folded``: long, and of interest to few."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False


METHOD = Column("method")
LOG, PROBABILITY = "log", "probability"
