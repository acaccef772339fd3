"""The command, end to end on a tiny setting: a report, nothing done twice, one line where something is wrong."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import unlearning  # noqa: F401  (puts shared_lib on the path)
import unlearning_bench
from shared_lib.errors import run
from unlearning import presets, small_models, stages, workshop
from unlearning.settings import Learning
from unlearning_bench import make_settings, parse_options

BENCH = Path(__file__).parents[2] / "benchmarks" / "unlearning_bench.py"
METHODS = ("npo+nll/weighted_sum", "npo+nll/blur")
# Four invented authors, and a model that knows next to nothing: what is tested is the way, not where it leads.
TINY = replace(
    presets.preset("tofu", "short"),
    name="tofu-tiny",
    data="",
    authors=4,
    model="tiny",
    learning=Learning(lr=3e-3, epochs=2, batch_size=16, known=0.001),
    methods=METHODS,
    lrs=(1e-3,),
    tuning_weights=(1.0,),
    weights=(1.0,),
    seeds=(1, 2),
    steps=3,
    looks=1,
    look_rows=4,
    judged_rows=4,
    generated_rows=2,
    relearned_rows=2,
    relearning_steps=1,
)


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterator[None]:
    """Let ``--form short`` be a tiny setting; handlers of signals, which the command sets, are put back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("BLUR_OPTIM_DATA_DIR", raising=False)  # With it the command would take all tracks, full-sized.
        patch.setitem(presets.PRESETS, ("tofu", "short"), TINY)
        patch.setitem(small_models.SIZES, "tiny", (16, 24, 1, 400))
        yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def command(folder: Path, *arguments: str) -> int:
    """Run the command here, and return its exit code."""
    places = ("--cache", str(folder / "cache"), "--out", str(folder / "out"), "--processes", "1", "--no-cost")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["unlearning_bench.py", *places, *arguments])
        return run(unlearning_bench.main)


def in_this_process(
    calls: Iterable[tuple[Any, ...]], work: Callable[..., Any], pool: object, done: Callable[[Any], None]
) -> None:
    for call in calls:
        done(work(*call))


def results(folder: Path) -> dict[str, int]:
    """Return every file of the cache with the time at which it was written, but those that each run writes again."""
    again = {"settings.json", "target.json", "retrained.json"}
    files = [path for path in (folder / "cache").rglob("*") if path.is_file() and path.name not in again]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def report(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "out").rglob("*")) if path.is_file()}


def runs(folder: Path) -> dict[Path, dict[str, Any]]:
    return {path: json.loads(path.read_text()) for path in sorted((folder / "cache").rglob("runs/*.json"))}


def outcome(result: dict[str, Any]) -> dict[str, Any]:
    """Return of a result what does not depend on the machine."""
    return {name: value for name, value in result.items() if name not in ("seconds", "peak_bytes")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the tiny setting to its end, in this process."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "run_side_by_side", in_this_process)
        assert command(folder) == 0
    workshop.workshop.cache_clear()
    return folder


# -- What a run leaves -----------------------------------------------------------------------------------------------


def test_every_job_has_its_result(finished: Path) -> None:
    jobs = [result["job"] for result in runs(finished).values()]
    assert sorted((job["stage"], job["method"], job["seed"], job["full_scores"]) for job in jobs) == sorted(
        [("tune", method, 0, False) for method in METHODS]
        + [("sweep", method, seed, True) for method in METHODS for seed in (1, 2)]
    )
    same = {"forget_loss": "npo", "retain_loss": "nll", "lr": 1e-3, "weight": 0.1}
    same |= {"steps": 3, "batch_size": 8, "accumulation": 1}
    assert all(same.items() <= job.items() for job in jobs)


def test_a_result_holds_what_happened(finished: Path) -> None:
    for result in runs(finished).values():
        assert result["format"] == 1
        assert not result["diverged"]
        assert [step["step"] for step in result["steps"]] == [0, 1, 2]
        assert {"cosine", "forget_norm", "retain_norm", "forget_coefficient", "update_norm"} <= set(result["steps"][0])
        assert [look["step"] for look in result["path"]] == [0, 3]
        assert result["final"] == result["path"][-1]
        assert result["threads"] == 1
        assert result["seconds"] > 0
        if result["job"]["full_scores"]:
            assert {"forget_quality", "partial_utility", "forget_rouge_l"} <= set(result["scores"])
            assert [look["step"] for look in result["relearning"]] == [0, 1]
        else:
            assert result["scores"] is result["relearning"] is None


def test_every_run_begins_at_the_target(finished: Path) -> None:
    (target,) = (json.loads(path.read_text()) for path in (finished / "cache").rglob("target.json"))
    assert all(result["path"][0] == target["final"] for result in runs(finished).values())
    assert target["parameters"] > 0
    assert len(target["training"]["probability"]) == 1  # It is known after one epoch, so little is asked for.


def test_the_target_is_compared_with_the_retrained_model_and_that_with_nothing(finished: Path) -> None:
    scores = {
        role: json.loads(next((finished / "cache").rglob(f"{role}.json")).read_text())["scores"]
        for role in ("target", "retrained")
    }
    assert scores["target"]["forget_quality"] is not None
    assert scores["retrained"].get("forget_quality") is None


def test_the_same_seed_begins_with_the_same_batches_whatever_the_method(finished: Path) -> None:
    first = {
        (result["job"]["method"], result["job"]["seed"], result["job"]["stage"]): result["steps"][0]
        for result in runs(finished).values()
    }
    for seed, stage in ((0, "tune"), (1, "sweep"), (2, "sweep")):
        ours, theirs = (first[method, seed, stage] for method in METHODS)
        assert ours["forget_loss"] == theirs["forget_loss"]
        assert ours["retain_loss"] == theirs["retain_loss"]
    assert len({step["retain_loss"] for step in first.values()}) == 3


def test_a_report_is_written(finished: Path) -> None:
    files = report(finished)
    assert {"tofu-tiny.md", "tofu-tiny.json"} <= set(files)
    assert all(method.split("/")[1] in files["tofu-tiny.md"].decode() for method in METHODS)
    assert not any(name.startswith(".unfinished") for name in files)


# -- Again -----------------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing_and_reports_the_same(finished: Path) -> None:
    before, told = results(finished), report(finished)
    # Its own way of running jobs: it would have to start processes, which do not know the tiny model.
    assert command(finished) == 0
    assert results(finished) == before
    assert report(finished) == told


def test_an_interrupted_run_goes_on_in_processes_and_finds_the_same(finished: Path) -> None:
    before, told = runs(finished), report(finished)
    times = results(finished)
    lost = [path for path, result in before.items() if result["job"]["method"] == METHODS[1]][-1]
    lost.unlink()
    assert command(finished) == 0
    after = runs(finished)
    assert {path: outcome(result) for path, result in after.items()} == {
        path: outcome(result) for path, result in before.items()
    }
    written = {name for name, when in results(finished).items() if times[name] != when}
    assert written == {str(lost.relative_to(finished))}
    assert report(finished).keys() == told.keys()


# -- Options ---------------------------------------------------------------------------------------------------------


WRONG = {
    "unknown method": (["--methods", "foo"], "--methods must be FORGET+RETAIN/COMBINATION, got 'foo'"),
    "the same method twice": (["--methods", METHODS[0], METHODS[0]], "--methods must be different"),
    "the tuning seed": (["--seeds", "0"], "--seeds must be different, and other than the tuning seed 0"),
    "the same seed twice": (["--seeds", "1", "1"], "--seeds must be different"),
    "no data": (["--data", "/nonexistent/tofu"], "--data: there is no file or folder /nonexistent/tofu"),
    "unknown subset": (["--subset", "forget02", "--name", "x"], "--subset must be one of forget01"),
    "no steps": (["--steps", "0", "--name", "x"], "--steps must be at least 1, got 0"),
    "a warm-up beyond the steps": (["--warm-up", "2", "--name", "x"], "--warm-up must be a share of the steps"),
    "no learning rate": (["--lrs", "0", "--name", "x"], "--lrs must be positive and different, got 0.0"),
    "a training rate of 0": (["--training-lr", "0", "--name", "x"], "--training-lr must be positive, got 0.0"),
    "a training rate for models that are given": (
        ["--training-lr", "1e-3", "--form", "paper"],
        "--training-lr must be left out with --form paper, whose models know their data",
    ),
    "a weight twice": (["--tuning-weights", "1", "1", "--name", "x"], "--tuning-weights must be positive and differ"),
    "a learning rate that is none": (["--lrs", "nan", "--name", "x"], "--lrs must be positive and different, got nan"),
    "blocks that share rows": (["--blocks", "0", "3", "--name", "x"], "--blocks must be at least --authors apart"),
    "one block": (["--blocks", "0", "--name", "x"], "--blocks must be two or more"),
    "a block before the first": (["--blocks", "-4", "4", "--name", "x"], "--blocks must be two or more"),
    "seeds on the tuning block": (["--blocks", "0", "4", "--name", "x"], "--seeds must not fall on the block that is"),
    "blocks of another track": (
        ["--blocks", "0", "4", "--name", "x", "--track", "wmdp", "--data", "."],
        "--blocks must be left out with --track wmdp",
    ),
    "fewer than no authors": (["--authors", "-1", "--name", "x"], "--authors must be how many a model knows"),
    "no rows": (["--batch-size", "0", "--name", "x"], "--batch-size must be at least 1, got 0"),
    "a rank below 1": (["--lora-rank", "-1", "--name", "x"], "--lora-rank must be at least 1"),
    "embeddings of adapters": (["--embeddings", "trained", "--name", "x"], "--embeddings must be trained with --lora"),
    "embeddings of full weights": (
        ["--embeddings", "only", "--lora-rank", "4", "--name", "x"],
        "--embeddings must be trained with --lora",
    ),
    "embeddings of RMU": (
        ["--embeddings", "only", "--methods", "rmu+rmu/blur", "--name", "x"],
        "--embeddings: RMU trains weights of its layers and no others",
    ),
    "a device that is not there": (["--device", "nonsense"], "--device: 'nonsense' cannot be used here"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_is_met_with_one_line_before_anything_is_begun(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path, *arguments) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith(f"Error: {message}")
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


USAGE = {
    "a model without a name": (["--model", "3m"], "--name must be given with --model"),
    "a subset without a name": (["--subset", "forget05"], "--name must be given with --subset"),
    "a training rate without a name": (["--training-lr", "1e-3"], "--name must be given with --training-lr"),
    "a grid without a name": (["--tuning-weights", "1", "3"], "--name must be given with --tuning-weights"),
    "steps without a name": (["--steps", "9"], "--name must be given with --steps"),
    "a name for several tracks": (
        ["--track", "tofu", "wmdp", "--name", "x"],
        "--name must be that of the report of one",
    ),
    "no processes": (["--processes", "0"], "--processes must be at least 1, got 0"),
    "an unknown track": (["--track", "tofuu"], "argument --track: invalid choice: 'tofuu'"),
    "a seed that is no number": (["--seeds", "one"], "argument --seeds: invalid int value: 'one'"),
    "an option cut short": (["--meth", "npo+nll/blur"], "unrecognized arguments: --meth"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE.keys())
def test_wrong_usage_ends_with_code_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_options(arguments)
    assert end.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err.splitlines()[-1]


def test_a_real_process_ends_with_the_line_and_code_2(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, str(BENCH), "--methods", "foo", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("Error: --methods must be FORGET+RETAIN/COMBINATION, got 'foo'. FORGET is one of")
    assert process.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_options_change_the_preset_and_nothing_else() -> None:
    assert make_settings(parse_options([]), "tofu") == TINY
    options = (
        "--methods npo+kl/blur --seeds 4 5 --steps 9 --model 3m --name mine --subset forget05 --data there "
        "--lrs 1e-3 1e-2 --tuning-weights 1 3 --authors 30 --blocks 0 40 80 --warm-up 0 --embeddings only "
        "--training-lr 5e-4"
    )
    assert make_settings(parse_options(options.split()), "tofu") == replace(
        TINY,
        methods=("npo+kl/blur",),
        seeds=(4, 5),
        steps=9,
        model="3m",
        name="mine",
        subset="forget05",
        data="there",
        lrs=(1e-3, 1e-2),
        tuning_weights=(1.0, 3.0),
        authors=30,
        blocks=(0, 40, 80),
        targets=3,
        warm_up=0.0,
        embeddings="only",
        learning=replace(TINY.learning, lr=5e-4),
    )
