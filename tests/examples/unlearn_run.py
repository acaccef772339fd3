"""A run of examples/unlearn.py on a small Llama, here or in a process of its own."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import unlearn
from quickstart_lib.data import load_rows
from shared_lib.models import save_small_llama

SMALL = ["--lr", "1e-2", "--batch-size", "4", "--generate-rows", "2", "--cpu"]


def make_home(folder: Path) -> Path:
    """Write a small Llama to the folder, and lines to forget and to retain."""
    rows = load_rows(None, 4, 0)
    save_small_llama(folder / "llama", rows, 0)
    for name, part in (("forget", rows[-8:]), ("retain", rows[:12]), ("others", rows[20:24])):
        lines = (json.dumps({"question": row.question, "answer": row.answer}) for row in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def arguments(home: Path, out: Path, *more: str) -> list[str]:
    files = ["--forget", str(home / "forget.jsonl"), "--retain", str(home / "retain.jsonl")]
    return ["--model", str(home / "llama"), *files, "--out", str(out), *SMALL, *more]


def run_here(monkeypatch: pytest.MonkeyPatch, home: Path, out: Path, *more: str) -> None:
    monkeypatch.setattr(sys, "argv", ["unlearn.py", *arguments(home, out, *more)])
    unlearn.main()


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
