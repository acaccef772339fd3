"""Where rows come from: a file, or a data set of the Hugging Face hub."""

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared_lib.errors import InputError, is_path
from shared_lib.formats import Record, records_of


@dataclass(frozen=True)
class Source:
    """Rows with where they stand, and what tells these rows from others.

    sha256: of the file; of the rows' JSON where they come from the hub.
    """

    option: str
    name: str
    records: list[Record]
    sha256: str
    is_hub: bool

    def facts(self) -> dict[str, Any]:
        """Return what the records of a run say of it."""
        kind = "hub" if self.is_hub else "file"
        return {"source": self.name, "from": kind, "rows": len(self.records), "sha256": self.sha256}


def check_files(options: argparse.Namespace) -> None:
    """See that what is named exists, as far as that can be told at once.

    Raises:
        InputError: a file is missing.
    """
    for option, name in named_sources(options):
        if not Path(name).is_file() and is_path(name.partition(":")[0]):
            raise InputError(f"{option}: there is no file {name}.")
    if options.gguf_file and Path(options.model).is_dir() and not (Path(options.model) / options.gguf_file).is_file():
        raise InputError(f"--gguf-file: there is no file {options.gguf_file} in {options.model}.")


def named_sources(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield the option and the name of each."""
    yield "--forget", options.forget
    yield "--retain", options.retain
    if options.stop_at is not None:
        yield "--stop-at", options.stop_at
    yield from ((f"--eval {name}", source) for name, source in options.eval)


def read_source(option: str, name: str) -> Source:
    """Read all rows.

    Raises:
        InputError: there are none, or they could not be read; names the option, and the line where there is one.
    """
    path = Path(name)
    source = _read_file(option, path) if path.is_file() else _read_hub(option, name)
    if not source.records:
        raise InputError(f"{option}: {name} must hold at least one row, got none.")
    return source


def _read_file(option: str, path: Path) -> Source:
    try:
        records = list(records_of(path))
    except InputError as error:
        raise InputError(f"{option}: {error}") from error
    with open(path, "rb") as file:
        digest = _digest(file)
    return Source(option, str(path), records, digest, is_hub=False)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    for part in iter(lambda: file.read(2**20), b""):
        digest.update(part)
    return digest.hexdigest()


def _read_hub(option: str, name: str) -> Source:
    from datasets import load_dataset

    owner_and_name, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = [dict(row) for row in load_dataset(owner_and_name, config or None, split=split or "train")]
    except Exception as error:  # The hub, the network and the data set each have their own exceptions.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{option}: {name} is no file here, and loading it from the Hugging Face hub failed: {reason}"
        ) from error
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    records = [(f"{name}, row {number}", row) for number, row in enumerate(rows, start=1)]
    return Source(option, name, records, digest.hexdigest(), is_hub=True)
