"""What the tracks of plain text share: reading parts of a benchmark, and cutting texts into passages."""

import json
import random
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from shared_lib.encoding import Example
from shared_lib.errors import InputError, is_path
from shared_lib.formats import Record, records_of
from shared_lib.models import Tokenizer
from shared_lib.records import read_hub_part, short, text_field

T = TypeVar("T")

SUFFIXES = (".json", ".jsonl", ".txt")
UNTOUCHED = 0.2  # of what is kept; at least one
SHORTEST = 2  # tokens: of a single one, nothing is predicted


def read_split(source: str, part: str, split: str) -> list[Record]:
    """Return the records of one split: of ``<source>/<part>/<split>.json`` or of a data set of the hub.

    A file ends with .json or .jsonl and holds an object a line, or one array of objects; or with .txt, which is a
    single record with the field "text".

    Raises:
        InputError: there is no such file, it has no records or is not JSON, or the hub said no.
    """
    path = Path(source)
    if not path.is_dir():
        if path.exists() or is_path(source):
            raise InputError(f"--data must be a folder or a data set of the hub, and {source} is not a folder here.")
        return read_hub_part(source, part, split)
    return read_file(path / part / split)


def has_split(source: str, part: str, split: str) -> bool:
    """Tell whether a folder has the split; a data set of the hub is taken to have all."""
    return not Path(source).is_dir() or bool(_files(Path(source) / part / split))


def read_file(stem: Path) -> list[Record]:
    """Return the records of ``stem`` with one of ``SUFFIXES``.

    Raises:
        InputError: as :func:`read_split`.
    """
    found = _files(stem)
    if not found:
        raise InputError(f"--data must hold {stem}.json (or .jsonl, .txt), which is missing.")
    records = _read(found[0])
    if not records:
        raise InputError(f"--data: {found[0]} must have at least one record, got none.")
    return records


def _files(stem: Path) -> list[Path]:
    return [path for suffix in SUFFIXES if (path := stem.with_name(stem.name + suffix)).is_file()]


def _read(path: Path) -> list[Record]:
    if path.suffix == ".txt":
        return [(str(path), {"text": read_text(path)})]
    with open(path, "rb") as file:
        is_array = file.read(64).lstrip().startswith(b"[")
    if not is_array:
        return list(records_of(path))
    try:
        items = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: the file must be one JSON array. {error.msg}.") from error
    return [(f"{path}, item {number}", item) for number, item in enumerate(items, start=1)]


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the file must be UTF-8 text, but byte {error.start} is not.") from error


def record_text(record: Record, name: str = "text") -> str:
    """Return a field of a record that must be a string and not blank; blanks around it stay.

    Raises:
        InputError: it is something else; names place and field.
    """
    where, fields = record
    if not isinstance(fields, dict):
        raise InputError(f"{where}: the record must be one JSON object, got {short(fields)}.")
    return text_field(fields, name, where)


def cut(tokenizer: Tokenizer, texts: Iterable[str], max_length: int) -> list[Example]:
    """Cut each text into passages of at most so many tokens, all of about the same length, none of them lost.

    A passage is ``Example([], ids)``; where the tokenizer begins every text with a token of its own, that is the
    prompt. A text of a single token is left out.
    """
    head = beginning(tokenizer)
    room = max_length - len(head)
    return [
        Example(list(head), ids)
        for text in texts
        for ids in _cut_evenly(tokenizer(text, add_special_tokens=False)["input_ids"], room)
    ]


def beginning(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the tokenizer puts before every text, mostly none or one."""
    return [i for i in tokenizer("")["input_ids"] if i != tokenizer.eos_token_id]


def _cut_evenly(ids: Sequence[int], room: int) -> list[list[int]]:
    if len(ids) < SHORTEST:
        return []
    count = -(-len(ids) // room)
    bounds = [len(ids) * i // count for i in range(count + 1)]
    return [list(ids[start:stop]) for start, stop in pairwise(bounds)]


def last(items: Sequence[T], count: int) -> list[T]:
    """Return so many items from the end; all for 0."""
    return list(items[-count:]) if count else list(items)


def set_aside(items: Sequence[T]) -> tuple[list[T], list[T]]:
    """Split off a fifth, the same one in every run: what is rehearsed, and what is left untouched."""
    chosen = set(random.Random(0).sample(range(len(items)), max(1, round(UNTOUCHED * len(items)))))
    return [item for i, item in enumerate(items) if i not in chosen], [items[i] for i in sorted(chosen)]


def refuse_dpo(methods: Iterable[str], track: str) -> None:
    """See that no method needs answers of refusal.

    Raises:
        InputError: one does.
    """
    for method in methods:
        if method.startswith("dpo"):
            raise InputError(f"--methods: {method} needs questions to refuse; the {track} track forgets plain text.")
