"""Files of rows: JSON lines, a JSON array, CSV, Parquet, also compressed; every other kind is named as what it is."""

import bz2
import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

from .errors import InputError

Record = tuple[str, Any]  # where it stands, for messages, and what stands there

#: How a file begins that is compressed, and what opens it.
OPENERS: dict[bytes, Callable[..., IO[bytes]]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz")
ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
PARQUET = b"PAR1"
#: How other files begin, what they are, and what to do.
OTHERS = {
    b"PK\x03\x04": "a zip archive or a spreadsheet. Unpack it, or save it as CSV",
    b"\x28\xb5\x2f\xfd": "compressed with zstd. Unpack it: zstd -d",
    b"ARROW1": "an Arrow file. Write it with datasets' to_parquet() or to_json()",
    b"\xff\xfe": "UTF-16 text. Save it as UTF-8",
    b"\xfe\xff": "UTF-16 text. Save it as UTF-8",
    b"SQLite format 3": "an SQLite database. Write the rows to a JSON-lines file",
    b"%PDF": "a PDF. Write its text to a file",
    b"version https://git-lfs": "a pointer of Git LFS, not the data. Fetch them: git lfs pull",
    b"<!DOCTYPE": "an HTML page. Was it downloaded from a page that shows the file?",
    b"<html": "an HTML page. Was it downloaded from a page that shows the file?",
}
_HALF_PAIR = re.compile("[\ud800-\udfff]")


def holds_rows(path: Path) -> bool:
    """Whether a file is of a kind that has rows with fields, by its name, or because it is Parquet."""
    name = path.name
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return Path(name).suffix.lower() in ROW_SUFFIXES or _start(path).startswith(PARQUET)


def records_of(path: Path) -> Iterator[Record]:
    """Yield each row's place and content.

    Raises:
        InputError: the file is of another kind, or a row can't be read; names file and line.
    """
    name = path.name
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    with open_file(path) as file:
        if _start(path).startswith(PARQUET):
            yield from _read_parquet(path)
        elif name.lower().endswith((".csv", ".tsv")):
            yield from _read_table(path, file, "\t" if name.lower().endswith(".tsv") else ",")
        else:
            yield from _read_json(path, file)


def open_file(path: Path) -> IO[bytes]:
    """Open a file for reading, unpacked.

    Raises:
        InputError: it is of a kind that is neither text nor rows.
    """
    start = _start(path)
    for magic, kind in OTHERS.items():
        if start.lstrip().startswith(magic) or start.startswith(magic):
            raise InputError(f"{path}: the file must be JSON lines, CSV, Parquet or text, and is {kind}.")
    opener = next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), open)
    return opener(path, "rb")


def read_text(path: Path) -> str:
    """Return a file's text, unpacked.

    Raises:
        InputError: it is not UTF-8.
    """
    with open_file(path) as file, _unpacking(path):
        content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the file must be UTF-8 text, but byte {error.start} is not.") from error


def read_json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[Record]:
    """Yield each line's place and content; blank lines are skipped."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path}:{number}", _parse_json(line, f"{path}:{number}")


def _read_json(path: Path, file: IO[bytes]) -> Iterator[Record]:
    with _unpacking(path):
        head = list(_until_content(file))
        if not _is_object(b"".join(head)):
            head += file
            rows = _as_one(b"".join(head))
            if rows is not None:
                yield from ((f"{path}, row {i}", _checked(row, f"{path}, row {i}")) for i, row in enumerate(rows, 1))
                return
        yield from read_json_lines(path, chain(head, file))


def _until_content(file: Iterable[bytes]) -> Iterator[bytes]:
    for line in file:
        yield line
        if line.strip():
            return


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text.decode("utf-8-sig")), dict)
    except ValueError:
        return False


def _as_one(text: bytes) -> list[Any] | None:
    """The rows of a file that is one array of objects, or one object over several lines; None where it is neither."""
    try:
        found = json.loads(text.decode("utf-8-sig"))
    except ValueError:
        return None
    rows = found if isinstance(found, list) else [found]
    return rows if all(isinstance(row, dict) for row in rows) else None


def _parse_json(line: bytes, where: str) -> Any:
    try:
        found = json.loads(line.decode("utf-8-sig"))  # Some editors begin a file with a mark.
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: the line must be UTF-8 text, but byte {error.start} is not.") from error
    except json.JSONDecodeError as error:
        hint = " Write a row a line, without brackets around them." if line.strip().startswith(b"[") else ""
        raise InputError(
            f"{where}: the line must be one JSON object. {error.msg}, column {error.colno}.{hint}"
        ) from error
    return _checked(found, where) if b"\\ud" in line.lower() else found


def _checked(value: Any, where: str, field: str = "") -> Any:
    r"""Return a value without half a surrogate pair, which JSON can write (``"\ud83d"``) and no tokenizer can read."""
    if isinstance(value, str):
        found = _HALF_PAIR.search(value)
        if found:
            raise InputError(
                f"{where}: {field or 'the row'} must be text that UTF-8 can write, got half a surrogate pair, "
                f"{found[0]!a}, at character {found.start()}. Was an emoji cut in two?"
            )
    elif isinstance(value, dict):
        for name, part in value.items():
            _checked(part, where, f'field "{name}"')
    elif isinstance(value, list):
        for part in value:
            _checked(part, where, field)
    return value


def _read_table(path: Path, file: IO[bytes], delimiter: str) -> Iterator[Record]:
    lines = (_decoded(line, f"{path}:{number}") for number, line in enumerate(file, start=1))
    rows = csv.DictReader(lines, delimiter=delimiter, restkey="", strict=True)
    try:
        with _unpacking(path):
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if "" in row or None in row.values():
                    raise InputError(f"{where}: the row must have {len(rows.fieldnames or ())} columns, as the header.")
                # An empty cell is no value, as in the other formats a field that is missing.
                yield where, {name: value or None for name, value in row.items()}
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: the line must be CSV with a header. {error}.") from error


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: the line must be UTF-8 text, but byte {error.start} is not.") from error


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(
            f"{path}: reading Parquet needs pyarrow, which comes with datasets. `pip install datasets`."
        ) from error
    try:
        batches = ParquetFile(path).iter_batches()
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
    except ArrowException as error:
        raise InputError(f"{path}: the Parquet file could not be read: {str(error).splitlines()[0]}") from error


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)


@contextmanager
def _unpacking(path: Path) -> Iterator[None]:
    """Tell of a compressed file that is damaged, in the place of each module's own exception."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{path}: the compressed file is damaged or incomplete: {error}") from error
