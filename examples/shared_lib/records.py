"""Records and rows from files and from the Hugging Face hub, with errors that name file, line and field."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import InputError, is_path
from .formats import Record, records_of
from .rows import Row

FULL = "full"
# The parts of TOFU that hold paraphrases and wrong answers for rows of its full part.
PERTURBED = ("forget01_perturbed", "forget05_perturbed", "forget10_perturbed", "retain_perturbed")


def read_rows(source: str) -> list[Row]:
    """Return all rows of a folder in the layout of TOFU, a file of rows, or a data set of the hub.

    Raises:
        InputError: a file is missing, or a row is not as it should be; names the file and the line.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.exists():
        return [parse_row(record) for record in records_of(path)]
    if is_path(source):
        raise InputError(f"--data: there is no file or folder {source}.")
    return _read_hub(source)


def _read_folder(folder: Path) -> list[Row]:
    full = folder / f"{FULL}.json"
    if not full.is_file():
        raise InputError(f"--data: the folder {folder} must hold {full.name}, which is missing.")
    perturbed = [folder / f"{part}.json" for part in PERTURBED]
    extra = [record for path in perturbed if path.is_file() for record in records_of(path)]
    return _merge(records_of(full), extra)


def _read_hub(name: str) -> list[Row]:
    full = read_hub_part(name, FULL)
    present = _hub_parts(name)
    return _merge(full, [record for part in PERTURBED if part in present for record in read_hub_part(name, part)])


def read_part(source: str, part: str) -> list[Row]:
    """Return one part of a folder or data set in the layout of TOFU, such as ``holdout01``; empty where it has none.

    Raises:
        InputError: a row is not as it should be, or the hub cannot be reached.
    """
    if Path(source).is_dir():
        path = Path(source) / f"{part}.json"
        return [parse_row(record) for record in records_of(path)] if path.is_file() else []
    if is_path(source):
        return []
    return [parse_row(record) for record in read_hub_part(source, part)] if part in _hub_parts(source) else []


def read_hub_part(name: str, part: str, split: str = "train") -> list[Record]:
    """Return the rows of one configuration of a data set of the hub.

    Raises:
        InputError: the hub, the network or the data set said no.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, part, split=split)
    except Exception as error:  # The hub, the network and the data set each have their own exceptions.
        raise _hub_error(name, error) from error
    return [(f"{name}, part {part}, row {i}", row) for i, row in enumerate(rows, start=1)]


def _hub_parts(name: str) -> list[str]:
    from datasets import get_dataset_config_names

    try:
        return get_dataset_config_names(name)
    except Exception as error:
        raise _hub_error(name, error) from error


def _hub_error(name: str, error: Exception) -> InputError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(
        f"--data: {name} is no file or folder here, and loading it from the Hugging Face hub failed: {reason}"
    )


def _merge(full: Iterable[Record], perturbed: Iterable[Record]) -> list[Row]:
    """Take each row from ``perturbed`` where the same question and answer occur there."""
    fuller = {(row.question, row.answer): row for row in map(parse_row, perturbed)}
    return [fuller.get((row.question, row.answer), row) for row in map(parse_row, full)]


def parse_row(record: Record) -> Row:
    """Return the row that a JSON object describes.

    Raises:
        InputError: a field is missing, of another type, or empty; names the place and the field.
    """
    where, fields = record
    if not isinstance(fields, dict):
        raise InputError(f"{where}: the line must be one JSON object, got {short(fields)}.")
    return Row(
        question=_text(fields, "question", where),
        answer=_text(fields, "answer", where),
        paraphrased_question=_text(fields, "paraphrased_question", where, default=""),
        paraphrased_answer=_text(fields, "paraphrased_answer", where, default=""),
        perturbed_answers=_texts(fields, "perturbed_answer", where),
    )


def _text(fields: dict[str, Any], name: str, where: str, default: str | None = None) -> str:
    if fields.get(name) is None and default is not None:
        return default
    return text_field(fields, name, where).strip()


def text_field(fields: dict[str, Any], name: str, where: str) -> str:
    """Return a field that must be a string and not blank; blanks around it stay.

    Raises:
        InputError: it is something else; names the place and the field.
    """
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        got = short(value) if name in fields else "no such field"
        raise InputError(f'{where}: field "{name}" must be a non-empty string, got {got}.')
    return value


def _texts(fields: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    values = fields.get(name)
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(v, str) and v.strip() for v in values):
        raise InputError(f'{where}: field "{name}" must be a list of non-empty strings, got {short(values)}.')
    return tuple(value.strip() for value in values)


def short(value: Any) -> str:
    """Show a value in a message, in at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
