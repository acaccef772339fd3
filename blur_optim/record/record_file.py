"""The file that a :class:`blur_optim.record.recorder.Recorder` writes, and how to read it.

The first line holds what does not change, ``{"metadata": {...}}``; every other line is a step. Numbers that are not
finite are ``null``, so that every line is strict JSON. A run that goes on appends: another metadata line, and then
steps, which replace those of the same number and later that are there already.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

FORMAT = 1
_START = b'{"metadata": {"format": '


@dataclass(frozen=True)
class Record:
    """What :func:`read_record` found.

    Args:
        metadata: of the last run that wrote to the file.
        steps: the lines, by ascending step; of a step that was taken twice, as after resuming, the later one.
    """

    metadata: dict[str, Any]
    steps: list[dict[str, Any]]


def read_record(path: str | os.PathLike[str]) -> Record:
    """Read a file of :class:`Recorder`. A last line that a crash has cut short is left out.

    Raises:
        ValueError: the file is none of a Recorder, or a line is broken; the message names file and line.
    """
    metadata: dict[str, Any] | None = None
    steps: list[dict[str, Any]] = []
    for number, line in _lines(Path(path)):
        if "metadata" in line:
            metadata = line["metadata"]
        elif metadata is None:
            raise ValueError(f"{path}, line 1: must be the metadata of a Recorder, got {str(line)[:80]}.")
        elif not isinstance(line.get("step"), int):
            raise ValueError(f"{path}, line {number}: `step` must be an integer, got {line.get('step')!r}.")
        else:
            while steps and steps[-1]["step"] >= line["step"]:
                steps.pop()
            steps.append(line)
    if metadata is None:
        raise ValueError(f"{path}: must hold the metadata of a Recorder, got an empty file.")
    return Record(metadata, steps)


def line_of(values: Mapping[str, Any]) -> bytes:
    """``values`` as one line of strict JSON."""
    return json.dumps(_strict(values), allow_nan=False, ensure_ascii=False).encode() + b"\n"


def drop_torn_line(path: Path) -> None:
    """Cut off what a crash has left of a line, or the next line would be glued to it."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        start = content[: len(_START)]
        if not (start == _START or (_START.startswith(start) and b"\n" not in content)):
            raise ValueError(
                f"`path` must be a new file or one of a Recorder, got {str(path)!r}, which begins {start!r}."
            )
        file.truncate(content.rfind(b"\n") + 1)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = path.read_bytes().split(b"\n")
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(lines):  # Every whole line ends with a newline: what follows the last is empty, or torn.
                return
            raise ValueError(f"{path}, line {number}: must be JSON, got {text[:80]!r} ({error}).") from error
        if not isinstance(line, dict):
            raise ValueError(f"{path}, line {number}: must be a JSON object, got {text[:80]!r}.")
        yield number, line


def _strict(value: Any) -> Any:
    """``value`` as JSON has it: tensors as numbers, None for what is not finite."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _strict(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return value
