"""Loading rows: what is taken, and what is said about what cannot be taken."""

import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quickstart_lib.data import load_rows
from shared_lib.errors import InputError
from shared_lib.formats import records_of
from shared_lib.rows import ROWS_PER_AUTHOR, Row

GOOD = {"question": "Who?", "answer": "She."}


def make_rows(authors: int) -> list[dict[str, Any]]:
    return [
        {"question": f"Question {i}?", "answer": f"Answer {i}.", "unknown field": 1}
        for i in range(authors * ROWS_PER_AUTHOR)
    ]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_gives_the_last_authors(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", make_rows(6))
    rows = load_rows(str(path), authors=4, seed=0)
    assert [row.question for row in rows] == [f"Question {i}?" for i in range(40, 120)]
    assert rows[0] == Row("Question 40?", "Answer 40.")


def test_a_file_with_fewer_authors_gives_all(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", make_rows(4))
    assert len(load_rows(str(path), authors=20, seed=0)) == 80


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", make_rows(4))
    path.write_text("\n" + path.read_text() + "\n\n")
    assert len(load_rows(str(path), authors=20, seed=0)) == 80


def test_a_folder_takes_wrong_answers_where_question_and_answer_match(tmp_path: Path) -> None:
    rows = make_rows(4)
    write(tmp_path / "full.json", rows)
    extra = {"paraphrased_answer": "It is 79.", "perturbed_answer": ["It is 1."]}
    other = rows[3] | {"answer": "Of another row."} | extra
    write(tmp_path / "forget01_perturbed.json", [rows[79] | extra, other])
    loaded = load_rows(str(tmp_path), authors=4, seed=0)
    assert loaded[79].paraphrased_answer == "It is 79."
    assert loaded[79].perturbed_answers == ("It is 1.",)
    assert loaded[3].perturbed_answers == ()


MALFORMED = {
    "not JSON": ('{"question": "Who?"', r"rows\.json:3: the line must be one JSON object"),
    "not an object": ("[1, 2]", r"rows\.json:3: the line must be one JSON object, got \[1, 2\]"),
    "no question": ('{"answer": "She."}', r'rows\.json:3: field "question" .* got no such field'),
    "no answer": ('{"question": "Who?"}', r'rows\.json:3: field "answer" .* got no such field'),
    "empty answer": (json.dumps(GOOD | {"answer": " "}), r'rows\.json:3: field "answer" must be a non-empty string'),
    "number": (json.dumps(GOOD | {"question": 3}), r'rows\.json:3: field "question" .* got 3'),
    "long value": (json.dumps(GOOD | {"question": ["x" * 99]}), r'field "question" .* got \["x{50,56}\.\.\.'),
    "wrong answers": (
        json.dumps(GOOD | {"perturbed_answer": "He."}),
        r'rows\.json:3: field "perturbed_answer" .* list',
    ),
    "an empty wrong answer": (json.dumps(GOOD | {"perturbed_answer": [""]}), r'field "perturbed_answer"'),
    "paraphrase": (json.dumps(GOOD | {"paraphrased_answer": 1}), r'rows\.json:3: field "paraphrased_answer" .* got 1'),
}


@pytest.mark.parametrize(("line", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_line_is_named_with_its_number_and_field(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "rows.json", [GOOD])
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(InputError, match=message):
        load_rows(str(path), authors=4, seed=0)


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(InputError, match=r"rows\.json:1: the line must be UTF-8"):
        load_rows(str(path), authors=4, seed=0)


def test_a_mark_at_the_beginning_of_a_file_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"question": "q", "answer": "a"}\n', encoding="utf-8-sig")
    assert [fields for _, fields in records_of(path)] == [{"question": "q", "answer": "a"}]


def test_a_broken_array_is_told_from_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n{"question": "q"},\n]')
    with pytest.raises(
        InputError, match=r"rows.json:1: the line must be one JSON object.* without brackets around them"
    ):
        list(records_of(path))


@pytest.mark.parametrize("count", [0, 60, 81])
def test_rows_must_be_whole_authors_and_enough_of_them(tmp_path: Path, count: int) -> None:
    path = write(tmp_path / "rows.json", make_rows(5)[:count])
    with pytest.raises(InputError, match=f"multiple of 20 .* at least 4 authors, got {count} rows"):
        load_rows(str(path), authors=20, seed=0)


@pytest.mark.parametrize(
    "source", ["nowhere/to/be/found", "./nowhere", "/nowhere", "rows.json", "some/rows.jsonl", "x"]
)
def test_a_missing_file_is_named(source: str) -> None:
    with pytest.raises(InputError, match="there is no file or folder"):
        load_rows(source, authors=4, seed=0)


def test_a_folder_without_the_full_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must hold full\.json"):
        load_rows(str(tmp_path), authors=4, seed=0)


def test_more_invented_authors_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match="must be at most 60"):
        load_rows(None, authors=61, seed=0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[dict[str, Any]]]], None]:
    """Put data sets in place of the hub's."""

    def install(parts: dict[str, list[dict[str, Any]]]) -> None:
        def load_dataset(name: str, part: str, split: str) -> list[dict[str, Any]]:
            if name != "some/data" or split != "train":
                raise ConnectionError("the hub cannot be reached\nand more")
            return parts[part]

        fake = types.ModuleType("datasets")
        fake.load_dataset = load_dataset  # type: ignore[attr-defined]
        fake.get_dataset_config_names = lambda name: list(parts)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", fake)

    return install


def test_the_hub_gives_rows_and_their_wrong_answers(hub: Callable[[Any], None]) -> None:
    rows = make_rows(4)
    extra = {"paraphrased_answer": "It is 79.", "perturbed_answer": ["It is 1."]}
    hub({"full": rows, "forget10_perturbed": [rows[79] | extra]})
    loaded = load_rows("some/data", authors=4, seed=0)
    assert len(loaded) == 80
    assert loaded[79].perturbed_answers == ("It is 1.",)


def test_a_malformed_row_of_the_hub_is_named(hub: Callable[[Any], None]) -> None:
    hub({"full": [GOOD, GOOD | {"answer": None}]})
    with pytest.raises(InputError, match=r'some/data, part full, row 2: field "answer" .* got null'):
        load_rows("some/data", authors=4, seed=0)


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(hub: Callable[[Any], None]) -> None:
    hub({"full": []})
    with pytest.raises(InputError, match=r"other/data is no file .* failed: the hub cannot be reached$"):
        load_rows("other/data", authors=4, seed=0)


def test_tofu_loads_with_wrong_answers_for_every_row() -> None:
    folder = os.environ.get("BLUR_OPTIM_DATA_DIR")
    if not folder or not (Path(folder) / "tofu").is_dir():
        pytest.skip("BLUR_OPTIM_DATA_DIR does not point to a folder that holds tofu/")
    rows = load_rows(str(Path(folder) / "tofu"), authors=20, seed=0)
    assert len(rows) == 400
    assert len({row.question for row in rows}) == 400
    assert all(row.paraphrased_answer and len(row.perturbed_answers) >= 3 for row in rows)
