"""From the result files of one setting to its report: tables, figures, Markdown and JSON.

``python -m unlearning.report FOLDER OUT`` in ``benchmarks/`` does what ``write_report(folder, out)`` does.
"""

import os
from dataclasses import replace
from pathlib import Path

from .figures import draw_all
from .load import load
from .markdown import FIGURES, write
from .records import portable, record, to_text
from .summary import summarize
from .tables import all_tables

__all__ = ["write_report"]


def write_report(folder: Path, out: Path) -> Path:
    """Write the report of the setting whose result files are in ``folder``, of as many as there are.

    Args:
        folder: with ``settings.json``, ``target*.json``, ``retrained*.json``, ``runs/*.json`` and ``cost.json``, of
            which only the first must be there.
        out: gets ``<name>.md``, ``<name>.json`` and ``figures/<name>-*.png`` and ``.svg``. The same files in give the
            same bytes out.
    Returns:
        The path of the Markdown file.
    Raises:
        InputError: a file is not as it should be; names the file and the field.
    """
    setting = load(folder)
    summary = summarize(replace(setting, values=portable(setting.values)))
    tables = all_tables(summary)
    (out / FIGURES).mkdir(parents=True, exist_ok=True)
    figures = draw_all(summary, out / FIGURES)
    _write(out / f"{setting.name}.json", to_text(record(summary, tables)) + "\n")
    return _write(out / f"{setting.name}.md", write(summary, tables, figures))


def _write(path: Path, text: str) -> Path:
    """Write a file that appears under its name only when it is whole."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
    return path
