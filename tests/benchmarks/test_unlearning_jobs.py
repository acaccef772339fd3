"""Jobs and their files: which is which, written whole or not at all, done by processes side by side."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import unlearning  # noqa: F401  (puts shared_lib on the path)
from unlearning.jobs import (
    CHOICES,
    Job,
    result_file,
    run_side_by_side,
    setting_folder,
    spawning,
    write_json,
    yardstick_file,
)
from unlearning.presets import PRESETS, preset
from unlearning.settings import Learning, Settings
from unlearning_marks import leave_a_mark, leave_a_mark_or_fail, leave_a_mark_slowly

JOB = Job("sweep", "npo+nll/blur", 0.1, 3e-4, seed=1)
SETTINGS = preset("tofu", "short")
CACHE = Path("cache")
CALLS = 8


# -- Keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_the_same_in_every_process_and_release() -> None:
    # Another one would have all that was ever computed be computed again.
    assert JOB.key == "bc72e18165d2"
    assert Job("sweep", "npo+nll/blur", 0.1, 3e-4, seed=1, full_scores=False).key == JOB.key


def test_jobs_that_differ_in_anything_have_keys_of_their_own() -> None:
    others = [
        replace(JOB, stage="tune"),
        replace(JOB, method="npo+kl/blur"),
        replace(JOB, weight=0.01),
        replace(JOB, lr=1e-3),
        replace(JOB, seed=2),
        replace(JOB, full_scores=True),
    ]
    assert len({job.key for job in (JOB, *others)}) == 7
    assert result_file(CACHE, JOB) != result_file(CACHE, others[0])


# -- Folders ---------------------------------------------------------------------------------------------------------


CHANGES: dict[str, dict[str, Any]] = {
    "steps": {"steps": 51},
    "batch size": {"batch_size": 9},
    "accumulation": {"accumulation": 2},
    "beta": {"beta": 0.2},
    "data": {"data": "elsewhere"},
    "subset": {"subset": "forget05"},
    "authors": {"authors": 31},
    "model": {"model": "1m"},
    "learning": {"learning": Learning(epochs=41)},
    "no learning": {"learning": None},
    "looks": {"looks": 5},
    "warm-up": {"warm_up": 0.0},
    "embeddings": {"embeddings": "only"},
    "relearning": {"relearning_steps": 21},
    "targets": {"targets": 2},
}
SAME: dict[str, dict[str, Any]] = {
    "methods": {"methods": ("npo+nll/blur",)},
    "seeds": {"seeds": (1, 2, 3, 4)},
    "tuning seed": {"tuning_seed": 9},
    "weights": {"weights": (7.0,)},
    "tuning weights": {"tuning_weights": (7.0,)},
    "learning rates": {"lrs": (7.0,)},
    "threads": {"threads": 2},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_decides_a_result_decides_the_folder(change: dict[str, Any]) -> None:
    assert setting_folder(CACHE, replace(SETTINGS, **change)) != setting_folder(CACHE, SETTINGS)


@pytest.mark.parametrize("change", SAME.values(), ids=SAME.keys())
def test_what_decides_which_jobs_there_are_does_not(change: dict[str, Any]) -> None:
    assert set(change) <= set(CHOICES)
    assert setting_folder(CACHE, replace(SETTINGS, **change)) == setting_folder(CACHE, SETTINGS)


def test_presets_have_folders_of_their_own_under_their_track() -> None:
    folders = [setting_folder(CACHE, settings) for settings in PRESETS.values()]
    assert len(set(folders)) == len(PRESETS)
    assert all(
        folder.parent == CACHE / settings.track for folder, settings in zip(folders, PRESETS.values(), strict=True)
    )


@pytest.mark.parametrize("settings", [*PRESETS.values(), replace(SETTINGS, learning=None)], ids=lambda s: s.name)
def test_settings_survive_json(settings: Settings) -> None:
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_a_folder_holds_what_belongs_to_it() -> None:
    folder = setting_folder(CACHE, SETTINGS)
    assert result_file(folder, JOB) == folder / "runs" / f"{JOB.key}.json"
    assert yardstick_file(folder, "target", 2) == folder / "yardsticks" / "target-2.json"


# -- Files -----------------------------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    write_json(tmp_path / "a.json", {"a": nan, "b": [1.5, inf, {"c": -inf}], "d": (nan, 2), "e": None, "f": True})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "a": None,
        "b": [1.5, None, {"c": None}],
        "d": [None, 2],
        "e": None,
        "f": True,
    }


def test_a_float_survives_to_the_last_bit(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [0.1 + 0.2, 1e-308, -3.0])
    assert json.loads((tmp_path / "a.json").read_text()) == [0.1 + 0.2, 1e-308, -3.0]


def test_folders_are_made_and_nothing_else_is_left_there(tmp_path: Path) -> None:
    write_json(tmp_path / "b" / "c" / "a.json", 1)
    assert [path.name for path in (tmp_path / "b" / "c").iterdir()] == ["a.json"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_before_the_end_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.glob("*.json")) == [path]  # What is half done is not taken for a result.


# -- Processes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(tmp_path: Path) -> list[tuple[str, int]]:
    return [(str(tmp_path), number) for number in range(CALLS)]


def test_every_call_is_made_once_in_another_process_that_stays(tmp_path: Path, calls: list[tuple[str, int]]) -> None:
    done: list[int] = []
    with spawning(1) as pool:
        run_side_by_side(calls, leave_a_mark, pool, done.append)
        run_side_by_side([(str(tmp_path), CALLS)], leave_a_mark, pool, done.append)
    assert sorted(done) == list(range(CALLS + 1))
    workers = {(tmp_path / str(number)).read_text() for number in range(CALLS + 1)}
    assert len(workers) == 1
    assert workers != {str(os.getpid())}


def test_the_first_failure_is_raised_and_what_was_not_begun_is_left(
    tmp_path: Path, calls: list[tuple[str, int]]
) -> None:
    done: list[int] = []
    with pytest.raises(OSError, match="number 1 cannot"), spawning(1) as pool:
        run_side_by_side(calls, leave_a_mark_or_fail, pool, done.append)
    assert done == [0]
    finished = sorted(int(path.name) for path in tmp_path.iterdir())
    # A pool hands out a call or two ahead; these are finished.
    assert finished in ([0], [0, 2], [0, 2, 3], [0, 2, 3, 4])


def test_what_goes_wrong_with_a_result_stops_the_rest(tmp_path: Path, calls: list[tuple[str, int]]) -> None:
    def refuse(number: int) -> None:
        raise ValueError(f"no place for {number}")

    with pytest.raises(ValueError, match="no place for 0"), spawning(1) as pool:
        run_side_by_side(calls, leave_a_mark_slowly, pool, refuse)
    assert len(list(tmp_path.iterdir())) < CALLS
