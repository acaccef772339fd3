"""The order of things, on result files made by hand: what tuning chooses, what is run, what is not run again."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import unlearning  # noqa: F401  (puts shared_lib on the path)
from shared_lib.console import make_console, make_progress
from shared_lib.errors import InputError
from unlearning import stages
from unlearning.jobs import Job, result_file, setting_folder, write_json, yardstick_file
from unlearning.settings import Settings
from unlearning.stages import describe, kept, run_setting, select, sweep_jobs, tuning_jobs, weights_of
from unlearning.targets import model_folder

GA, BLUR = "ga/forget-only", "simnpo+nll/blur"
SETTINGS = Settings(
    "tiny",
    "short",
    "tofu",
    "",
    "forget01",
    methods=(GA, BLUR),
    lrs=(1e-3, 1e-2),
    tuning_weights=(1.0, 0.1),
    weights=(3.0, 1.0, 0.1),
    seeds=(1, 2),
)
ONLY_BLUR = replace(SETTINGS, methods=(BLUR,))


def look(forget: float | None, retain: float | None = 0.8, untouched: float | None = 0.5) -> dict[str, Any]:
    kinds = (("forget", forget), ("retain", retain), ("untouched", untouched))
    return {"step": 1} | {name: {"log_prob": p, "probability": p} for name, p in kinds}


TARGET = look(1.0, retain=0.8, untouched=0.5) | {"step": 0}


def result(*path: dict[str, Any], diverged: bool = False) -> dict[str, Any]:
    return {"path": [TARGET, *path], "diverged": diverged}


def choose(tmp_path: Path, results: dict[tuple[float, float], dict[str, Any]]) -> dict[str, float]:
    """Return what tuning chooses, given what became of each (learning rate, weight)."""
    write_json(yardstick_file(tmp_path, "target", 0), {"final": TARGET})
    for job in tuning_jobs(ONLY_BLUR):
        write_json(result_file(tmp_path, job), results[job.lr, job.weight])
    return select(ONLY_BLUR, tmp_path)[BLUR]


# -- Selection -------------------------------------------------------------------------------------------------------

BAD = result(look(0.9))


def test_what_is_kept_is_the_lower_share_of_the_target() -> None:
    assert kept(look(0.0, retain=0.4, untouched=0.5), TARGET) == pytest.approx(0.5)
    assert kept(look(0.0, retain=0.8, untouched=0.1), TARGET) == pytest.approx(0.2)
    assert kept(TARGET, TARGET) == 1.0


def test_the_learning_rate_is_chosen_for_how_far_it_forgets_while_it_keeps_nine_tenths(tmp_path: Path) -> None:
    # 1e-3 dominates 0.9 * 0.89, but keeps 0.89; what it forgets while it keeps enough is 0.6, and 1e-2 forgets 0.5.
    far = result(look(0.6), look(0.1, retain=0.89 * 0.8))
    choice = choose(
        tmp_path, {(1e-3, 1.0): far, (1e-3, 0.1): BAD, (1e-2, 1.0): result(look(0.5, 0.9 * 0.81)), (1e-2, 0.1): BAD}
    )
    assert choice == {"lr": 1e-2, "weight": 1.0}


def test_where_no_learning_rate_keeps_enough_all_of_its_runs_decide_together(tmp_path: Path) -> None:
    # Of 1 - p and kept: 1e-3 has (0.5, 0.8) and (0.1, 0.8), area 0.4. 1e-2 has (0.9, 0.3) and (0.4, 0.8), 0.27 + 0.2.
    def at(forget: float, share: float) -> dict[str, Any]:
        return result(look(forget, 0.8 * share))

    runs = {(1e-3, 1.0): at(0.5, 0.8), (1e-3, 0.1): at(0.9, 0.8), (1e-2, 1.0): at(0.1, 0.3), (1e-2, 0.1): at(0.6, 0.8)}
    # Its last points dominate 0.27 and 0.32: less than the one of the learning rate that was not chosen.
    assert choose(tmp_path, runs) == {"lr": 1e-2, "weight": 0.1}


def test_the_learning_rate_is_judged_at_its_best_moment_and_the_weight_at_the_end(tmp_path: Path) -> None:
    # The run of weight 1 passes the best point of all, and ends at a bad one.
    passing = result(look(0.1), look(0.05, retain=0.08))
    choice = choose(
        tmp_path, {(1e-3, 1.0): passing, (1e-3, 0.1): result(look(0.4)), (1e-2, 1.0): BAD, (1e-2, 0.1): BAD}
    )
    assert choice == {"lr": 1e-3, "weight": 0.1}


def test_what_is_lost_of_untouched_rows_counts(tmp_path: Path) -> None:
    lost = result(look(0.1, retain=0.8, untouched=0.05))
    kept_ = result(look(0.3, retain=0.76, untouched=0.46))
    choice = choose(tmp_path, {(1e-3, 1.0): lost, (1e-3, 0.1): kept_, (1e-2, 1.0): BAD, (1e-2, 0.1): BAD})
    assert choice == {"lr": 1e-3, "weight": 0.1}


def test_of_equals_the_first_is_taken(tmp_path: Path) -> None:
    same = result(look(0.5))
    assert choose(tmp_path, dict.fromkeys([(lr, w) for lr in (1e-3, 1e-2) for w in (1.0, 0.1)], same)) == {
        "lr": 1e-3,
        "weight": 1.0,
    }


def test_a_run_that_diverged_is_not_chosen_for_what_it_was_before(tmp_path: Path) -> None:
    diverged = result(look(0.1), diverged=True)
    choice = choose(
        tmp_path, {(1e-3, 1.0): diverged, (1e-3, 0.1): result(look(0.8)), (1e-2, 1.0): BAD, (1e-2, 0.1): BAD}
    )
    assert choice == {"lr": 1e-3, "weight": 0.1}


@pytest.mark.parametrize("kind", ["forget", "retain", "untouched"])
def test_a_look_that_is_not_finite_is_no_point(tmp_path: Path, kind: str) -> None:
    nothing = look(0.0) | {kind: {"log_prob": None, "probability": None}}
    broken = result(nothing, diverged=True)
    choice = choose(tmp_path, {(1e-3, 1.0): broken, (1e-3, 0.1): broken, (1e-2, 1.0): BAD, (1e-2, 0.1): BAD})
    assert choice == {"lr": 1e-2, "weight": 1.0}


def test_the_tuning_seed_is_compared_with_its_own_target(tmp_path: Path) -> None:
    settings = replace(ONLY_BLUR, targets=2, tuning_seed=3)
    write_json(yardstick_file(tmp_path, "target", 1), {"final": TARGET})  # 3 modulo 2; there is no other
    for job in tuning_jobs(settings):
        write_json(result_file(tmp_path, job), BAD)
    assert select(settings, tmp_path) == {BLUR: {"lr": 1e-3, "weight": 1.0}}


@pytest.mark.parametrize(
    ("taus", "lr", "weight"), [((0.98,), 1e-3, 0.1), ((0.9,), 1e-3, 1.0), ((0.98, 0.9), 1e-2, 1.0)]
)
def test_rate_and_weight_are_chosen_together_where_the_settings_say(
    tmp_path: Path, taus: tuple[float, ...], lr: float, weight: float
) -> None:
    def levels(at_98: float, at_90: float) -> dict[str, Any]:
        return result(look(at_98, 0.98 * 0.8), look(at_90, 0.9 * 0.8))

    runs = {
        (1e-3, 1.0): levels(0.5, 0.1),
        (1e-3, 0.1): levels(0.4, 0.35),
        (1e-2, 1.0): levels(0.42, 0.14),  # nowhere the lowest, and the lowest on average
        (1e-2, 0.1): result(look(0.0, 0.1), diverged=True),
    }
    settings = replace(ONLY_BLUR, tuned_at=taus)
    write_json(yardstick_file(tmp_path, "target", 0), {"final": TARGET})
    for job in tuning_jobs(settings):
        write_json(result_file(tmp_path, job), runs[job.lr, job.weight])
    assert select(settings, tmp_path)[BLUR] == {"lr": lr, "weight": weight}


# -- Jobs ------------------------------------------------------------------------------------------------------------


def test_tuning_tries_each_learning_rate_with_each_weight_on_one_seed() -> None:
    jobs = tuning_jobs(SETTINGS)
    assert [(job.lr, job.weight) for job in jobs if job.method == BLUR] == [
        (1e-3, 1.0),
        (1e-3, 0.1),
        (1e-2, 1.0),
        (1e-2, 0.1),
    ]
    assert [(job.lr, job.weight) for job in jobs if job.method == GA] == [(1e-3, 1.0), (1e-2, 1.0)]
    assert {(job.stage, job.seed, job.full_scores) for job in jobs} == {("tune", 0, False)}


SELECTED = {GA: {"lr": 1e-3, "weight": 1.0}, BLUR: {"lr": 1e-2, "weight": 0.1}}


def test_the_sweep_tries_every_weight_on_every_held_out_seed() -> None:
    jobs = sweep_jobs(SETTINGS, SELECTED)
    assert Counter((job.method, job.seed, job.weight) for job in jobs) == Counter(
        [(GA, seed, 1.0) for seed in (1, 2)] + [(BLUR, seed, weight) for seed in (1, 2) for weight in (3.0, 1.0, 0.1)]
    )
    assert {(job.method, job.lr) for job in jobs} == {(GA, 1e-3), (BLUR, 1e-2)}
    assert {job.stage for job in jobs} == {"sweep"}


@pytest.mark.parametrize("weights", [(3.0, 1.0, 0.1), (3.0, 1.0), (0.1,), (0.1, 0.1)])
def test_each_method_and_seed_has_full_scores_once_at_the_chosen_weight(weights: tuple[float, ...]) -> None:
    jobs = sweep_jobs(replace(SETTINGS, weights=weights), SELECTED)
    full = [job for job in jobs if job.full_scores]
    assert sorted((job.method, job.seed, job.weight) for job in full) == [
        (GA, 1, 1.0),
        (GA, 2, 1.0),
        (BLUR, 1, 0.1),
        (BLUR, 2, 0.1),
    ]
    assert len({job.key for job in jobs}) == len(jobs)


def test_full_scores_can_be_of_some_seeds_alone() -> None:
    selected = {BLUR: {"lr": 1e-3, "weight": 0.1}}
    jobs = sweep_jobs(replace(ONLY_BLUR, weights=(), judged_seeds=(2,)), selected)
    assert [(job.seed, job.weight, job.full_scores) for job in jobs] == [(1, 0.1, False), (2, 0.1, True)]


def test_weights_are_round_numbers_around_the_method_s_scale() -> None:
    assert weights_of("npo+nll/blur", (3.0, 1.0, 0.3), 3.0) == [0.3, 0.1, 0.03]
    assert weights_of(BLUR, (3.0, 1.0, 0.3), 3.0) == [3.0, 1.0, 0.3]
    assert weights_of(GA, (3.0, 1.0, 0.3), 3.0) == [1.0]


# -- A whole run, with workers that only write files -----------------------------------------------------------------


class Workers:
    """Stands for the processes: notes each call and writes the file that a worker would have written."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fails_at: Job | None = None

    def run(
        self, calls: Iterable[tuple[Any, ...]], work: Callable[..., Any], pool: object, done: Callable[[Any], None]
    ) -> None:
        for cache, settings, *call in calls:
            if call[0] == self.fails_at:
                raise KeyboardInterrupt
            self.calls.append((work.__name__, call[0] if len(call) == 1 else tuple(call)))
            getattr(self, work.__name__)(cache, settings, *call)
            done(call)

    def train(self, cache: Path, settings: Settings, role: str, number: int) -> None:
        model_folder(cache, settings, role, number).mkdir(parents=True)

    def measure(self, cache: Path, settings: Settings, role: str, number: int) -> None:
        content = {
            "final": TARGET,
            "scores": {"number": number},
            "training": None,
            "parameters": 1234,
            "rows": {"forget": 40},
        }
        write_json(yardstick_file(setting_folder(cache, settings), role, number), content | {"role": role})

    def unlearn(self, cache: Path, settings: Settings, job: Job) -> None:
        write_json(result_file(setting_folder(cache, settings), job), result(look(0.5 * job.weight)))


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    workers = Workers()
    monkeypatch.setattr(stages, "run_side_by_side", workers.run)
    monkeypatch.setattr(stages, "_commit", lambda: "abc1234")
    return workers


def run(settings: Settings, cache: Path) -> Path:
    return run_setting(settings, cache, 1, "python benchmarks/unlearning_bench.py", make_progress(make_console()))


def test_stages_come_in_their_order(tmp_path: Path, workers: Workers) -> None:
    run(SETTINGS, tmp_path)
    names = [name for name, _ in workers.calls]
    assert names == ["train"] * 2 + ["measure"] * 2 + ["unlearn"] * 14
    # Others are compared with the retrained model, so it is judged first.
    assert [call for name, call in workers.calls if name == "measure"] == [("retrained", 0), ("target", 0)]
    stages_of = [call.stage for name, call in workers.calls if name == "unlearn"]
    assert stages_of == ["tune"] * 6 + ["sweep"] * 8


def test_nothing_runs_twice(tmp_path: Path, workers: Workers) -> None:
    first = run(SETTINGS, tmp_path)
    workers.calls.clear()
    assert run(SETTINGS, tmp_path) == first
    assert workers.calls == []


def test_more_seeds_run_only_what_is_new(tmp_path: Path, workers: Workers) -> None:
    run(SETTINGS, tmp_path)
    workers.calls.clear()
    run(replace(SETTINGS, seeds=(1, 2, 5)), tmp_path)
    assert {(name, call.seed) for name, call in workers.calls} == {("unlearn", 5)}
    assert len(workers.calls) == 4


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, workers: Workers) -> None:
    jobs = tuning_jobs(SETTINGS)
    workers.fails_at = jobs[4]
    with pytest.raises(KeyboardInterrupt):
        run(SETTINGS, tmp_path)
    done = len(workers.calls)
    workers.fails_at = None
    run(SETTINGS, tmp_path)
    assert [call for _, call in workers.calls[done : done + 2]] == jobs[4:]
    assert len(workers.calls) == len(set(workers.calls)) == 18


def test_a_model_that_knows_the_data_already_is_not_trained(tmp_path: Path, workers: Workers) -> None:
    run(replace(SETTINGS, learning=None, model="there", retrained="elsewhere"), tmp_path)
    assert "train" not in [name for name, _ in workers.calls]
    assert [call for name, call in workers.calls if name == "measure"] == [("retrained", 0), ("target", 0)]


def test_several_targets_are_trained_and_judged_once_each(tmp_path: Path, workers: Workers) -> None:
    run(replace(SETTINGS, targets=2, seeds=(1, 2, 3)), tmp_path)
    expected = Counter((role, number) for role in ("target", "retrained") for number in (0, 1))
    for stage in ("train", "measure"):
        assert Counter(call for name, call in workers.calls if name == stage) == expected


def test_models_that_no_seed_needs_are_not_trained(tmp_path: Path, workers: Workers) -> None:
    run(
        replace(SETTINGS, targets=4, seeds=(1, 5, 2)), tmp_path
    )  # 5 is 1 modulo 4; tuning, on 0, needs its target alone
    expected = {("target", 0), ("target", 1), ("target", 2), ("retrained", 1), ("retrained", 2)}
    for stage in ("train", "measure"):
        assert {call for name, call in workers.calls if name == stage} == expected


# -- What the report is made from ------------------------------------------------------------------------------------


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_one_target_is_the_yardstick_of_every_seed(tmp_path: Path, workers: Workers) -> None:
    folder = run(SETTINGS, tmp_path)
    yardsticks = sorted(path.name for path in folder.glob("*.json"))
    assert yardsticks == ["retrained.json", "settings.json", "sources.json", "target.json"]
    for role in ("target", "retrained"):
        assert read(folder / f"{role}.json") == read(yardstick_file(folder, role, 0))


def test_several_targets_are_yardsticks_by_seed(tmp_path: Path, workers: Workers) -> None:
    folder = run(replace(SETTINGS, targets=2, seeds=(1, 2, 3)), tmp_path)
    names = {path.name for path in folder.glob("*.json")}
    assert names == {
        "settings.json",
        "sources.json",
        "tuning-target.json",
        *(f"{role}-{seed}.json" for role in ("target", "retrained") for seed in (1, 2, 3)),
    }
    assert read(folder / "tuning-target.json")["scores"] == {"number": 0}
    for seed, number in ((1, 1), (2, 0), (3, 1)):
        assert read(folder / f"target-{seed}.json")["scores"] == {"number": number}
        assert read(folder / f"retrained-{seed}.json")["role"] == "retrained"


def test_settings_say_what_was_run_and_chosen(tmp_path: Path, workers: Workers) -> None:
    about = read(run(SETTINGS, tmp_path) / "settings.json")
    assert about["methods"] == [GA, BLUR]
    assert about["seeds"] == [1, 2]
    assert about["model"] == {"name": SETTINGS.model, "parameters": 1234}
    # Made up above: the smaller the weight, the less is left.
    assert about["selected"] == {GA: {"lr": 1e-3, "weight": 1.0}, BLUR: {"lr": 1e-3, "weight": 0.1}}
    assert (about["command"], about["commit"]) == ("python benchmarks/unlearning_bench.py", "abc1234")
    assert {"python", "torch", "transformers"} <= set(about["versions"])
    assert (
        Settings.from_json({name: about[name] for name in SETTINGS.to_json()} | {"model": "1m", "data": ""}) == SETTINGS
    )


def test_the_chosen_are_on_record_before_the_sweep(tmp_path: Path, workers: Workers) -> None:
    # So that a report can be made of what there is while the sweep goes on.
    workers.fails_at = sweep_jobs(SETTINGS, {GA: {"lr": 1e-3, "weight": 1.0}})[0]
    with pytest.raises(KeyboardInterrupt):
        run(SETTINGS, tmp_path)
    assert read(setting_folder(tmp_path, SETTINGS) / "settings.json")["selected"][BLUR]["lr"] == 1e-3


def test_describe_needs_only_the_yardsticks(tmp_path: Path, workers: Workers) -> None:
    for role in ("retrained", "target"):
        workers.measure(tmp_path, SETTINGS, role, 0)
    folder = setting_folder(tmp_path, SETTINGS)
    describe(SETTINGS, folder, {}, "")
    assert read(folder / "settings.json")["selected"] == {}


# -- What the results rest on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["data", "retain_data", "questions", "utility_questions", "model", "retrained"])
def test_results_of_files_that_have_changed_since_are_not_mixed_with_new_ones(
    field: str, tmp_path: Path, workers: Workers
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "full.json").write_text("{}")
    settings = replace(SETTINGS, **{field: str(files)})
    run(settings, tmp_path / "cache")
    os.utime(files / "full.json", (1, 1))
    run(settings, tmp_path / "cache")  # The same content, as after another checkout: nothing to say.
    changed = r"--cache: .* holds results from other files .* Delete it"
    (files / "full.json").write_text("[]")
    with pytest.raises(InputError, match=changed):
        run(settings, tmp_path / "cache")
    (files / "part").mkdir()
    (files / "full.json").rename(files / "part" / "full.json")
    (files / "part" / "full.json").write_text("{}")  # The name and content of before, at another place.
    with pytest.raises(InputError, match=changed):
        run(settings, tmp_path / "cache")
