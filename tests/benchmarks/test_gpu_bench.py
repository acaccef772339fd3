"""The GPU's benchmark rehearsed on the CPU: every stage runs, what ends one ends no other, and nothing is lost."""

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu import kernels, report, runner, seven, unlearn
from gpu.context import Context, Sheet
from gpu.stages import STAGES, Stage
from harness import Result
from unlearning.jobs import TUNE, setting_folder
from unlearning.tracks import load_data

from blur_optim.kernels import native

BENCH = Path(__file__).parents[2] / "benchmarks" / "gpu_bench.py"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, BENCH, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "BLUR_OPTIM_DATA_DIR"}
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, env=environment)


@pytest.mark.skipif(bool(native.why_not(torch.device("cpu"))), reason="needs the native extension")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_every_stage_runs_without_a_gpu(tmp_path):
    # The build then has nothing to do: compiling takes as long as all the rest, and is what installing tests.
    library = tmp_path / "work/lib/blur_optim/_C.abi3.so"
    library.parent.mkdir(parents=True)
    shutil.copy(native.LIBRARY, library)
    out = tmp_path / "out"
    done = command("--out", out, "--work", tmp_path / "work", "--device", "cpu", "--quick", "--minutes", 30)
    text = (out / "report.md").read_text()
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{text}"
    assert "no number below means" in text.lower().replace("\n", " ")
    results = json.loads((out / "results.json").read_text())["stages"]
    assert [*results] == [stage.name for stage in STAGES]
    assert {result["status"] for result in results.values()} == {"done"}
    files = [*out.iterdir()]
    assert len(files) <= 8
    assert all(file.stat().st_size < 10_000_000 for file in files)
    for stage in STAGES:
        assert f"## {stage.name}" in text
        assert f"===== {stage.name}: done" in (out / "log.txt").read_text()
        assert results[stage.name]["tables"] or results[stage.name]["texts"], stage.name
        if stage.csv:
            with (out / f"{stage.name}.csv").open() as file:
                assert len([*csv.DictReader(file)]) > 1, stage.name
    (counts,) = results["tests"]["tables"]
    assert sum(row["passed"] for row in counts["rows"]) > 100
    wide = {row["operation"] for row in results["kernels"]["tables"][0]["rows"]}
    assert wide >= {"dots", "blend", "whole update", "dots in the metric", "whole update in the metric"}
    for stage, column, number in (
        ("step", "candidate", "device / AdamW"),
        ("memory", "method", "peak"),
        ("seven", "method", "seconds"),
    ):
        rows = {row[column]: row for row in results[stage]["tables"][0]["rows"]}
        assert rows["BLUR, metric='retain'"][number] > 0, stage
    check_unlearned(tmp_path / "work", results["unlearn"])


def check_unlearned(work, result):
    """All methods are in the tables; of what is not there, its absence is told."""
    at_the_end = result["texts"][0]
    labels = ("weighted sum", "BLUR in the retain metric", "normalized sum", "BLUR")
    places = [at_the_end.index(f"| NPO + NLL: {label} |") for label in labels]
    assert places == sorted(places)
    context = Context("cpu", True, work, 0.0)
    settings, sheet, cache = unlearn.quick_settings(context), Sheet(work / "again.json"), work / "unlearning-quick"
    assert unlearn.left_out(settings, unlearn.show(settings, cache, sheet)) == {}
    folder = setting_folder(cache, settings)
    for path in (folder / "runs").glob("*.json"):
        job = json.loads(path.read_text())["job"]
        if job["method"] == "npo+nll/normalized" and job["stage"] != TUNE:
            path.unlink()
    found = unlearn.show(settings, cache, sheet)
    assert unlearn.left_out(settings, found) == {"npo+nll/normalized": "left out"}
    more = replace(settings, methods=(*settings.methods, "npo+nll/conflict"))  # Which was not tuned yet.
    assert unlearn.left_out(more, found) == {"npo+nll/normalized": "left out", "npo+nll/conflict": "left out"}
    described = json.loads((folder / "settings.json").read_text()) | {"seeds": [1, 2]}
    (folder / "settings.json").write_text(json.dumps(described))
    missing = unlearn.left_out(settings, unlearn.show(settings, cache, sheet))
    assert missing["npo+nll/blur-metric"] == "1 of 2 runs left out"


def test_what_matters_most_is_unlearned_first(tmp_path):
    settings = unlearn.full_settings(Context("cuda", False, tmp_path, 0.0))
    first, every = unlearn.parts(settings)
    assert first.methods == ("npo+nll/weighted_sum", "npo+nll/blur-metric")
    assert every.methods == (*first.methods, "npo+nll/normalized", "npo+nll/blur")
    assert setting_folder(tmp_path, first) == setting_folder(tmp_path, every)  # So nothing is done twice.
    assert (settings.lrs, settings.looks) == ((3e-4, 1e-4), 10)
    forgotten = len(load_data(settings, 0).forget)
    assert settings.steps * settings.batch_size == pytest.approx(10 * forgotten, rel=0.02)


def result(operation, *, ratio=1.0, share=None):
    return Result(operation, "native", "gradients", "128M", ratio, ratio, ratio, None, share, None)


@pytest.mark.parametrize(
    ("dtype", "results", "verdicts"),
    [
        ("float32", [("whole update", 1.51, None), ("whole update in the metric", 1.64, None)], [False, True]),
        ("bfloat16", [("whole update", 1.29, None), ("whole update in the metric", 1.51, None)], [True, False]),
        ("float32", [("dots", 1, 0.89), ("dots in the metric", 1, 0.81), ("dots in the metric", 1, 0.79)], [0, 1, 0]),
        ("bfloat16", [("dots in the metric", 1, 0.1), ("AdamW in the metric", 1, 0.89)], [False]),
    ],
)
def test_kernels_are_held_against_their_limits(dtype, results, verdicts, tmp_path):
    sheet = Sheet(tmp_path / "sheet.json")
    found = [result(operation, ratio=ratio, share=share) for operation, ratio, share in results]
    kernels.hold_against_limits(found, kernels.Case(kernels.LARGE, dtype), sheet)
    assert [limit["reached"] for limit in sheet.limits] == verdicts
    kernels.hold_against_limits(found, kernels.Case(kernels.MANY, dtype), sheet)
    assert len(sheet.limits) == len(verdicts)  # Small tensors are held against nothing.


@pytest.mark.parametrize(("peak", "reached"), [(64.05, True), (76.6, False)])
def test_the_metric_is_to_take_no_more_memory(peak, reached, tmp_path):
    sheet = Sheet(tmp_path / "sheet.json")
    rows = {"weighted_sum": 52.0, "reference": 64.0, "metric": peak}
    rows = {name: {"peak GiB": gib, "seconds": 1.0} for name, gib in rows.items()}
    seven.hold_against_limits(rows, sheet, Context("cuda", False, tmp_path, 0.0))
    (limit,) = [limit for limit in sheet.limits if "metric" in limit["what"]]
    assert limit["reached"] is reached


def test_without_a_gpu_it_says_how_to_rehearse(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = command("--out", tmp_path, "--stages", "build")
    assert done.returncode == 2
    assert "--device cpu --quick" in done.stderr
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes: must be above 0, got 0"),
        (["--data", "/nowhere"], "--data: must be a folder with tofu/ in it, got /nowhere"),
        (["--stages", "dance"], "invalid choice: 'dance'"),
    ],
)
def test_what_is_refused(arguments, message, capsys):
    spec = importlib.util.spec_from_file_location("gpu_bench", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit):
        module.parse(arguments)
    assert message in capsys.readouterr().err


class TestStages:
    """Stages that fail, as files that are run in place of gpu_bench.py."""

    @pytest.fixture
    def context(self, tmp_path, monkeypatch):
        (tmp_path / "work").mkdir()
        (tmp_path / "out").mkdir()
        (tmp_path / "benchmarks").mkdir()
        monkeypatch.setattr(runner, "ROOT", tmp_path)
        monkeypatch.setattr(runner, "WORTHWHILE", 0.01)
        monkeypatch.setattr(runner, "CPU_PATIENCE", 1.0)
        return Context("cpu", True, tmp_path / "work", 0.0)

    def run(self, context, tmp_path, bodies, minutes=1.0, each=10.0, least=0.0):
        lines = ["import json, os, sys, time", "name, told = sys.argv[2:]", "work = json.loads(told)['work']"]
        lines += ["def keep(**found): open(f'{work}/{name}.json', 'w').write(json.dumps(found))"]
        lines += [f"if name == {name!r}:\n    {body}" for name, body in bodies.items()]
        (tmp_path / "benchmarks/gpu_bench.py").write_text("\n".join(lines))
        stages = [Stage(name, each / 60, "what it does", least / 60, csv=True) for name in bodies]
        fine = runner.run_stages(stages, context, tmp_path / "out", minutes, {"commit": "abc"})
        return fine, json.loads((tmp_path / "out/results.json").read_text())["stages"]

    def test_a_crash_a_hang_and_an_error_end_one_stage_each(self, context, tmp_path):
        kept = "keep(records=[{'a': 1}], tables=[{'title': 'T', 'rows': [{'x': 2.5}]}])"
        bodies = {
            "crash": f"{kept}; os.abort()",
            "hang": f"{kept}; time.sleep(60)",
            "error": "raise RuntimeError('the card is full')",
            "fine": kept,
        }
        start = time.monotonic()
        fine, results = self.run(context, tmp_path, bodies, each=3.0)
        assert time.monotonic() - start < 30
        assert not fine
        assert results["crash"]["status"].startswith("failed with exit code -6")
        assert results["hang"]["status"] == "ended after its 3 s"
        assert results["error"]["error"] == "RuntimeError: the card is full"
        assert results["fine"]["status"] == "done"
        for name in ("crash", "hang", "fine"):  # What was found before the end is there.
            assert (tmp_path / f"out/{name}.csv").read_text() == "a\n1\n"
        text = (tmp_path / "out/report.md").read_text()
        assert text.count("| 2.5 |") == 3
        assert "the card is full" in text

    def test_the_time_of_all_stages_is_limited(self, context, tmp_path):
        fine, results = self.run(context, tmp_path, {"first": "time.sleep(60)", "second": "pass"}, minutes=1.5 / 60)
        assert not fine
        assert results["first"]["status"].startswith("ended after its")
        assert results["second"]["status"] == "not started: no time left"

    def test_a_stage_leaves_the_later_ones_their_least(self, context, tmp_path):
        bodies = {"first": "time.sleep(60)", "second": "keep()"}
        _, results = self.run(context, tmp_path, bodies, minutes=3 / 60, least=1.5)
        assert results["first"]["status"].startswith("ended after its")
        assert results["second"]["status"] == "done"
        assert sum(stage.least for stage in STAGES) == pytest.approx(8)  # The default of --minutes.

    def test_what_a_stage_has_started_ends_with_it(self, context, tmp_path):
        body = (
            "import subprocess; p = subprocess.Popen(['sleep', '60']); keep(records=[{'pid': p.pid}]); time.sleep(60)"
        )
        _, results = self.run(context, tmp_path, {"parent": body}, each=2.0)
        pid = results["parent"]["records"][0]["pid"]
        deadline = time.monotonic() + 20  # It was sent its end; a busy machine may let it die a moment later.
        while is_running(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_limits_are_reached_or_missed(tmp_path):
    sheet = Sheet(tmp_path / "sheet.json")
    sheet.limit("share", 0.95, least=0.9)
    sheet.limit("ratio", 1.6, most=1.5)
    sheet.limit("nothing", float("nan"), most=1.5)
    results = {"kernels": {"status": "done", "seconds": 1.0, "what": "", **json.loads(sheet.path.read_text())}}
    text = "\n".join(report.lines(results, {}, Context("cuda", False, tmp_path, 0.0)))
    verdicts = re.findall(r"\| (\w+) \| [\d.na]+ \| [≤≥] [\d.]+ \| (\w+) \|", text)
    assert verdicts == [("share", "reached"), ("ratio", "MISSED"), ("nothing", "MISSED")]
    assert "rehearsal" not in text


def test_a_context_crosses_to_the_stage(tmp_path):
    for data in (None, tmp_path):
        context = Context("cuda", False, tmp_path / "work", 12.5, data)
        assert Context.from_json(context.to_json()) == context
