"""Files of rows for every example: which kinds are read, and what the others are told."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsdp2_lib.data import read_examples
from quickstart_lib.data import load_rows
from shared_lib.errors import InputError
from shared_lib.formats import records_of
from shared_lib.models import build_tokenizer
from shared_lib.records import read_rows
from unlearn_lib.sources import read_source
from wmdp_rmu_lib.corpora import read_texts
from wmdp_rmu_lib.questions import read_questions

ROWS = [{"question": "Who?", "answer": "Me, Zoë."}, {"question": "Where?", "answer": 'In "Atlantis".'}]
LINES = "\n".join(json.dumps(row) for row in ROWS).encode()
CSV = 'question,answer\nWho?,"Me, Zoë."\nWhere?,"In ""Atlantis""."\n'.encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


KINDS: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": lambda: LINES,
    "array.json": lambda: json.dumps(ROWS).encode(),
    "array_over_lines.json": lambda: b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=2).encode(),
    "rows.csv": lambda: CSV,
    "rows.tsv": lambda: (
        b"question\tanswer\n" + 'Who?\tMe, Zoë.\nWhere?\tIn ""Atlantis"".\n'.encode().replace(b'""', b'"')
    ),
    "rows.jsonl.gz": lambda: gzip.compress(LINES),
    "rows.csv.bz2": lambda: bz2.compress(CSV),
    "rows.json.xz": lambda: lzma.compress(json.dumps(ROWS).encode()),
    "named_without_end": lambda: gzip.compress(LINES),
    "rows.parquet": lambda: parquet(ROWS),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(KINDS[name]())
    assert [row for _, row in records_of(path)] == ROWS
    assert all(str(path) in where for where, _ in records_of(path))


def test_an_object_over_several_lines_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    path.write_text(json.dumps(ROWS[0], indent=1))
    assert [row for _, row in records_of(path)] == ROWS[:1]


HALF = rb'{"question": "Who?", "answer": "Me \ud83d!"}'
WRONG = {
    "half a pair": (
        "x.jsonl",
        LINES + b"\n" + HALF,
        r'x\.jsonl:3: field "answer" .* half a surrogate pair, .*\\ud83d.*3',
    ),
    "half a pair in an array": ("x.json", b"[" + HALF + b"]", r"x\.json, row 1: .* half a surrogate pair"),
    "zip": ("x.jsonl", b"PK\x03\x04rest", r"x\.jsonl: the file must be .* is a zip archive or a spreadsheet"),
    "zstd": ("x.jsonl.zst", b"\x28\xb5\x2f\xfdrest", r"compressed with zstd"),
    "utf-16": ("x.jsonl", '{"text": "a"}'.encode("utf-16"), r"is UTF-16 text\. Save it as UTF-8"),
    "pointer": ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\n", r"pointer of Git LFS.*git lfs pull"),
    "page": ("x.jsonl", b"\n<!DOCTYPE html><html>", r"an HTML page"),
    "cut gzip": (
        "x.jsonl.gz",
        gzip.compress((LINES + b"\n") * 50)[:-20],
        r"x\.jsonl\.gz: the compressed file is damaged",
    ),
    "parquet": ("x.parquet", b"PAR1 and then nothing", r"x\.parquet: the Parquet file could not be read"),
    "columns": ("x.csv", CSV + b"one\n", r"x\.csv:4: the row must have 2 columns"),
    "quotes": ("x.csv", CSV + b'"open', r"x\.csv:\d: the line must be CSV with a header"),
    "bytes": ("x.csv", CSV + b"\xff,1\n", r"x\.csv:4: the line must be UTF-8 text, but byte 0 is not"),
    "lines": ("x.jsonl", b'{"text": "a"\n{"text": "b"}', r"x\.jsonl:1: the line must be one JSON object"),
}


@pytest.mark.parametrize(("name", "content", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(records_of(path))


def test_every_example_reads_them(tmp_path: Path) -> None:
    """The front ends share the reader; a text without rows is still a text to RMU, also compressed."""
    rows, questions = tmp_path / "rows.csv.gz", tmp_path / "questions.parquet"
    rows.write_bytes(gzip.compress(CSV))
    assert [row.answer for row in read_rows(str(rows))] == ["Me, Zoë.", 'In "Atlantis".']
    assert [row for _, row in read_source("--forget", str(rows)).records] == ROWS
    assert len(read_examples("--forget", rows, build_tokenizer(load_rows(None, 4, 0)[:20]), 64)) == 2
    questions.write_bytes(parquet([{"question": "Who?", "choices": ["I", "You"], "answer": 1}]))
    assert read_questions("--questions", str(questions))[0].choices == ("I", "You")
    (tmp_path / "passages.parquet").write_bytes(parquet([{"text": "One."}, {"text": "Two."}]))
    assert list(read_texts("--forget", str(tmp_path / "passages.parquet"), 100)) == ["One.", "Two."]
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(b"A line.\nAnother."))
    assert list(read_texts("--forget", str(tmp_path / "book.txt.gz"), 100)) == ["A line.\nAnother."]
    (tmp_path / "book.zip").write_bytes(b"PK\x03\x04rest")
    with pytest.raises(InputError, match="is a zip archive"):
        list(read_texts("--forget", str(tmp_path / "book.zip"), 100))
