"""Printing and progress bars."""

import io
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def make_console() -> Console:
    """Return the console; where its encoding lacks a letter, a question mark stands for it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False)


def make_progress(console: Console) -> Progress:
    """Return progress bars with a title, a bar that takes what room is left, a note and the time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
        expand=True,
    )
