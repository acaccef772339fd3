"""What is printed and written: fits a narrow terminal, appears whole or not at all."""

import errno
import io
import json
from pathlib import Path

import pytest
from quickstart_lib import figure, table
from quickstart_lib.digits import Match, Outcome
from quickstart_lib.results import Results, Trace, replacing, write_json
from rich.console import Console
from shared_lib.metrics import Scores

METHODS = ("gradient ascent", "weighted sum", "BLUR", "normalized", "BLUR, retain metric")
STEP = {"cosine": -0.25, "forget_norm": 10.0, "retain_norm": 0.5}


def trace(seconds: float, has_two_gradients: bool = True) -> Trace:
    steps = [STEP, STEP] if has_two_gradients else []
    return Trace(
        steps, path=[(0, 0.99, 0.99, 0.98), (1, 0.3, 0.98, 0.97), (2, 0.01, 0.9, 0.95)], seconds=[seconds, 9.0, seconds]
    )


@pytest.fixture
def results() -> Results:
    scores = {
        "forget": Scores(0.01234, 0.5, 1.5),
        "retain": Scores(0.98, 1.0, None),
        "untouched": Scores(0.9, 0.8, None),
    }
    sum_ = Outcome("weighted_sum", 1.0, 0.08, 0.13, 0.99, -0.9)
    blur = Outcome("blur", 0.0003, 0.02, 0.12, 0.99, -0.9)
    return Results(
        rows={"forget": 40, "retain": 280, "untouched": 80},
        training={"all-authors": (False, 30, 0.91), "without-forgotten": (True, 18, 0.985)},
        scores=dict.fromkeys(("before", *METHODS, "without them"), scores),
        traces={name: trace(0.1 if name == "weighted sum" else 0.2, name != METHODS[0]) for name in METHODS},
        answers={"to forget": {"question": "Who?", "true answer": "She. " * 30, "BLUR": "", "normalized": "no " * 40}},
        digits=[sum_, blur],
        digits_matches=[Match(sum_, blur), Match(sum_, None)],
    )


def printed(results: Results, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    table.tell(console, results, METHODS[2:], METHODS[1])
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_the_terminal_without_a_cut(results: Results, width: int) -> None:
    lines = printed(results, width)
    assert max(map(len, lines)) <= width
    start = lines.index("Forgetting two authors")
    assert not any("…" in line for line in lines[start:])


def test_table_holds_the_numbers(results: Results) -> None:
    text = "\n".join(printed(results, 100))
    for expected in (r"truth ratio", "0.01", "1.50", "-0.25", "2.00x", "1.00x", "40 rows to forget", "forget 0.012"):
        assert expected in text


def test_what_is_forgotten_while_the_rest_is_kept(results: Results) -> None:
    row = next(line for line in printed(results, 100) if line.startswith(" 95 % kept"))
    assert row.split()[3:] == ["-", *["0.30"] * 5, "-"]
    assert results.traces["BLUR"].forgotten_while_kept(0.5) == 0.01


def test_a_model_that_does_not_know_its_answers_is_told_of(results: Results) -> None:
    text = " ".join(printed(results, 100))
    assert "the model all-authors does not know its answers" in text
    assert "without-forgotten does not" not in text


def test_answers_that_repeat_themselves_are_shortened(results: Results) -> None:
    text = "\n".join(printed(results, 100))
    assert "no no no …" in text
    assert "(says nothing)" in text


def test_json_holds_settings_versions_and_all_numbers(results: Results) -> None:
    content = json.loads(json.dumps(results.to_json({"seed": 0}, "weighted sum")))
    assert content["settings"] == {"seed": 0}
    assert content["versions"]["torch"]
    assert content["scores"]["BLUR"]["forget"] == {"probability": 0.01234, "rouge_l": 0.5, "truth_ratio": 1.5}
    assert content["time_per_step_relative"]["BLUR"] == pytest.approx(2.0)
    assert content["mean_cosine"] == {"gradient ascent": None} | dict.fromkeys(METHODS[1:], -0.25)
    assert content["digits_at_equal_retain_loss"][1]["blur"] is None


def test_figure_is_drawn(results: Results, tmp_path: Path) -> None:
    figure.draw(results, "before", "without them", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    write_json(path, {"old": 1})

    def fill_the_disk() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fill_the_disk()
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]
