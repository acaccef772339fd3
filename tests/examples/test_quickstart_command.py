"""The command line, end to end: what it writes, what it keeps, how it ends."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import quickstart
import shared_lib.learning
import shared_lib.metrics
from forking import Script, forking_context
from quickstart_lib.options import parse_options
from shared_lib.errors import InputError, TrainingError, run

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.py"
TINY = ["--authors", "4", "--epochs", "2", "--steps", "6", "--digits-steps", "2"]


def start(output: Path, *arguments: str) -> Script:
    return Script(QUICKSTART, arguments, output, environment={"COLUMNS": "60"}, daemon=False)


def test_a_second_run_begins_with_the_unlearning_and_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # One test, so that no other worker of pytest-xdist trains the models again.
    out = tmp_path / "out"
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(shared_lib.metrics, "GENERATE_AT_MOST", 2)  # A model that knows nothing talks to the end.
    ratio = shared_lib.metrics.median_truth_ratio
    monkeypatch.setattr(shared_lib.metrics, "median_truth_ratio", lambda model, of, rows: ratio(model, of, rows[:4]))
    monkeypatch.setattr(shared_lib.learning, "get_context", lambda kind: forking_context())  # As spawned, and sooner.
    first_stdout, first = run_tiny(out, monkeypatch, capsys)
    kept = {path: path.stat().st_mtime_ns for path in (out / "models").rglob("*")}
    second_stdout, second = run_tiny(out, monkeypatch, capsys)
    assert "learning all authors" in first_stdout
    assert "learning all authors" not in second_stdout
    assert "reference: computed, and kept in " in " ".join(first_stdout.split())
    assert "reference: read from " in " ".join(second_stdout.split())
    assert [path.name for path in kept if "reference" in path.name] == ["reference.safetensors"]
    assert {path: path.stat().st_mtime_ns for path in (out / "models").rglob("*")} == kept
    assert sorted(path.name for path in out.iterdir()) == ["models", "quickstart.json", "quickstart.png"]
    check_numbers(first)
    assert second["scores"] == first["scores"]
    assert second["digits"] == first["digits"]
    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert "does not know its answers" in " ".join(first_stdout.split())


def run_tiny(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[str, dict[str, Any]]:
    """Run it here, where the slow imports have been made; the models learn in processes of their own all the same."""
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *TINY, "--out", str(out)])
    quickstart.main()
    return capsys.readouterr().out, json.loads((out / "quickstart.json").read_text())


def check_numbers(numbers: dict[str, Any]) -> None:
    assert numbers["command"][1:3] == ["--authors", "4"]
    assert numbers["settings"]["steps"] == 6
    assert numbers["rows"] == {"forget": 40, "retain": 20, "untouched": 20}
    assert set(numbers["traces"]) == {quickstart.ASCENT, *quickstart.METHODS}
    for name in quickstart.METHODS:
        assert len(numbers["traces"][name]["steps"]) == 6
    assert "metric_cosine" in numbers["traces"][quickstart.IN_METRIC]["steps"][0]
    assert [point[0] for point in numbers["traces"]["BLUR"]["path"]] == [0, 5, 6]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send to another process")
def test_ctrl_c_while_learning_leaves_nothing_half_written(tmp_path: Path) -> None:
    models = tmp_path / "models"
    script = start(tmp_path / "printed", "--out", str(tmp_path))
    (process,) = script.processes
    deadline = time.monotonic() + 120
    while not (models.is_dir() and list(models.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.exitcode is None, script.printed()
    os.kill(process.pid, signal.SIGINT)
    assert script.wait(120) == [130]
    said = "Interrupted. Finished models are kept; nothing is left half-written."
    assert script.printed().splitlines()[-1] == said, script.printed()
    assert list(models.iterdir()) == []


def test_a_missing_file_ends_in_one_line(tmp_path: Path) -> None:
    script = start(tmp_path / "printed", "--data", "nowhere/rows.json", "--out", str(tmp_path / "out"))
    assert script.wait(120) == [2]
    assert script.printed() == "Error: --data: there is no file or folder nowhere/rows.json.\n"
    assert not (tmp_path / "out").exists()


INVALID = {
    "no steps": (["--steps", "0"], "--steps: must be a whole number of at least 1, got '0'"),
    "fraction": (["--epochs", "1.5"], "--epochs: must be a whole number of at least 1, got '1.5'"),
    "few authors": (["--authors", "3"], "--authors: must be a whole number of at least 4, got '3'"),
    "negative": (["--gamma", "-1"], "--gamma: must be a positive number, got '-1'"),
    "not a number": (["--lr", "nan"], "--lr: must be a positive number, got 'nan'"),
    "word": (["--lr", "fast"], "--lr: must be a positive number, got 'fast'"),
    "unknown": (["--colour", "red"], "unrecognized arguments: --colour red"),
}


@pytest.mark.parametrize(("arguments", "message"), INVALID.values(), ids=INVALID.keys())
def test_an_invalid_option_is_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_learning_rates_depend_on_the_start() -> None:
    small, given = parse_options([]), parse_options(["--model", "some/model"])
    assert (small.lr, small.learning_lr) == (None, 3e-3)  # Each method has its own.
    assert given.lr < min(method["lr"] for method in quickstart.METHODS.values())
    assert given.learning_lr < small.learning_lr
    assert parse_options(["--lr", "1"]).lr == 1.0


ENDS = {
    "bad input": (InputError("row 3 is bad"), 2, "Error: row 3 is bad\n"),
    "training": (TrainingError("it was killed"), 1, "Error: it was killed\n"),
    "full disk": (
        OSError(28, "No space left on device", "a.png"),
        1,
        "Error: No space left on device (a.png). Nothing is left half-written.\n",
    ),
    "other I/O": (OSError("the model is lost"), 1, "Error: the model is lost. Nothing is left half-written.\n"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "Interrupted. Finished models are kept; nothing is left half-written.\n"),
}


@pytest.fixture
def _same_signals() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_same_signals")
@pytest.mark.parametrize(("error", "code", "message"), ENDS.values(), ids=ENDS.keys())
def test_a_run_ends_in_one_line_and_a_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    assert run(main) == code
    assert capsys.readouterr().err == message


@pytest.mark.usefixtures("_same_signals")
def test_an_unforeseen_error_is_not_hidden() -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)
