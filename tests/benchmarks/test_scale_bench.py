"""The simulation against real processes, and the order of the methods in it."""

import csv
import io
import re
from pathlib import Path

import pytest
import scale_bench
from harness import write_csv
from rich.console import Console
from scale_bench import card_for, cases_of, parse, plot, rows_of, show
from scale_check import CASES, check
from scale_methods import METHODS
from scale_models import Case
from scale_simulation import Peak, simulate

from blur_optim.step.stash import STASHES


@pytest.fixture(scope="module")
def peaks() -> dict[str, Peak]:
    """Of every method where gradients are most of what there is: one rank, and a few tokens."""
    return {method: simulate(Case("tiny", 1, method, length=32)) for method in METHODS}


def test_the_prediction_is_what_two_real_processes_count() -> None:
    (found,) = check([case for case in CASES if case.method == "int8"])
    assert abs(found.error) < 0.01
    assert found.predicted.before == pytest.approx(found.counted.before, rel=1e-3)
    if found.process is not None:
        assert found.counted.before + found.process == pytest.approx(found.predicted.peak, rel=0.03)


def test_every_stash_is_among_the_methods() -> None:
    assert METHODS.keys() == {"weighted_sum", "original", *STASHES}


def test_parameters_and_state_are_three_sets_of_float32(peaks: dict[str, Peak]) -> None:
    for peak in peaks.values():
        assert peak.state == pytest.approx(2 * peak.parameters, rel=1e-3)
        assert peak.before == pytest.approx(3 * peak.parameters, rel=0.01)
        assert peak.peak > 4 * peak.parameters


def test_a_smaller_stash_needs_less_and_the_original_way_most(peaks: dict[str, Peak]) -> None:
    unit = peaks["reference"].parameters
    above = {name: (peak.peak - peaks["reference"].peak) / unit for name, peak in peaks.items()}
    assert above["int8"] == pytest.approx(-0.75, abs=0.05)
    assert above["bfloat16"] == pytest.approx(-0.5, abs=0.05)
    assert above["cpu"] < 0
    assert above["original"] == pytest.approx(0.85, abs=0.05)
    assert peaks["recompute"].peak < peaks["weighted_sum"].peak + 0.05 * unit


def test_more_ranks_need_less_and_adapters_alone_the_least(peaks: dict[str, Peak]) -> None:
    one = peaks["reference"]
    eight = simulate(Case("tiny", 8, "reference", length=32))
    adapters = simulate(Case("tiny", 1, "reference", lora=True, length=32))
    assert eight.parameters == pytest.approx(one.parameters / 8, rel=0.01)
    assert eight.peak < one.peak / 3
    assert adapters.state < one.state / 20
    assert adapters.peak < one.peak / 3


def test_table_csv_and_picture(peaks: dict[str, Peak], tmp_path: Path) -> None:
    rows = rows_of({Case("tiny", 1, method, length=32): peak for method, peak in peaks.items()})
    console = Console(file=io.StringIO(), width=100)
    show(rows, console)
    text = console.file.getvalue()
    assert all(title in text for title, _ in METHODS.values())
    assert "Simulated, not measured" in text
    assert re.search(r"weighted sum +0\.\d\d \(24\)", text)
    plot(rows, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    write_csv(tmp_path / "scale.csv", rows, "simulated")
    _, *lines = (tmp_path / "scale.csv").read_text().splitlines()
    read = {row["method"]: row for row in csv.DictReader(lines)}
    assert read.keys() == METHODS.keys()
    assert float(read["weighted_sum"]["above_sum"]) == 0
    assert float(read["original"]["above_sum"]) > 0


def test_a_tenth_of_a_card_is_left_free() -> None:
    assert [card_for(peak) for peak in (1, 21.5, 21.7, 72, 73, 126, 127)] == [24, 24, 40, 80, 141, 141, None]


def test_the_options_make_the_cases() -> None:
    options = parse(["--models", "1b", "7b", "--ranks", "8", "64", "--methods", "int8", "--lora", "both"])
    cases = list(cases_of(options))
    assert len(cases) == 8
    assert cases[0] == Case("1b", 8, "int8", False, 1, 2048)
    assert [case.method for case in cases_of(parse([]))] == list(METHODS)


@pytest.mark.parametrize("wrong", [["--ranks", "0"], ["--models", "8b"], ["--length", "0"], ["--methods", "fp4"]])
def test_invalid_options_end_with_code_2(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(wrong)
    assert ended.value.code == 2


def test_it_says_at_once_that_it_is_a_simulation() -> None:
    assert "This is a simulation" in scale_bench.__doc__
