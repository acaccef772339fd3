"""What a person reads while it runs and at the end, and what is written."""

import json
import math
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from shared_lib.method import coefficient_text
from shared_lib.models import Model, Tokenizer, save_model

PACKAGES = ("blur_optim", "torch", "transformers", "datasets", "lm_eval")
Measures = dict[str, float]


def as_line(record: dict[str, Any]) -> str:
    """Say what a step saw."""
    return (
        f"step {record['step']:>4}  {record['corpus']}  forget {record['forget_loss']:.4g}  "
        f"retain {record['retain_loss']:.4g}  cos {record['cosine']:+.3f}  |g_f| {record['forget_norm']:.3g}  "
        f"|g_r| {record['retain_norm']:.3g}  a {coefficient_text(record['forget_coefficient'])}  "
        f"b {coefficient_text(record['retain_coefficient'])}"
    )


def print_table(console: Console, before: Measures, after: Measures) -> None:
    """Print one row a measure."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("", overflow="fold")
    for heading in ("before", "after", "after/before"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, old in before.items():
        table.add_row(name, f"{old:.4g}", f"{after[name]:.4g}", f"{after[name] / old:.3f}" if old else "-")
    console.print()
    console.print(table)


def export(model: Model, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that ``from_pretrained`` loads; it has its name only when it is whole."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_model(model, tokenizer, unfinished)
    os.replace(unfinished, folder)


def write_results(path: Path, content: dict[str, Any]) -> None:
    """Write the results with the versions and the command line that made them; numbers that aren't finite are null."""
    whole = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        **content,
    }
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(_finite(whole), indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
