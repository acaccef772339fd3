"""From folders of result files to a whole report; the folders are made here, for the other tests of the report too."""

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from unlearning.report import write_report

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
METHODS = ("ga/forget-only", "npo+nll/weighted_sum", "npo+nll/blur", "npo+nll/normalized")
WEIGHTS, SEEDS = (1.0, 0.1), (1, 2, 3)
LR = 1e-3
# How fast a method forgets at w = 1, and what share of that it pays on what is to be kept.
SPEED = {"weighted_sum": (6.0, 0.05), "blur": (8.0, 0.05), "normalized": (3.0, 0.02), "forget-only": (90.0, 0.3)}


def measured(forget: float, retain: float = 0.9, untouched: float = 0.8) -> dict[str, Any]:
    """Return the three kinds of rows: forget by its log-probability, the others by their probability."""
    kept = {"retain": retain, "untouched": untouched}
    return {
        "forget": {"log_prob": forget, "probability": math.exp(forget)},
        **{name: {"log_prob": math.log(p), "probability": p} for name, p in kept.items()},
    }


def nothing() -> dict[str, Any]:
    """Return what stands for numbers that are not finite."""
    return {kind: {"log_prob": None, "probability": None} for kind in ("forget", "retain", "untouched")}


def make_run(method: str, weight: float, seed: int, path: Iterable[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Return a result file; its last point is its end."""
    losses, combine = method.split("/")
    forget_loss, _, retain_loss = losses.partition("+")
    points = [{"step": 10 * i, "epoch": i / 2, **point} for i, point in enumerate(path)]
    return {
        "format": 1,
        "job": {
            "stage": "sweep",
            "method": method,
            "forget_loss": forget_loss,
            "retain_loss": retain_loss or None,
            "combine": combine,
            "weight": weight,
            "lr": LR,
            "steps": 10 * (len(points) - 1),
            "batch_size": 4,
            "accumulation": 1,
            "seed": seed,
            "full_scores": False,
        },
        "path": points,
        "steps": [],
        "final": {name: points[-1][name] for name in ("forget", "retain", "untouched")},
        "scores": None,
        "relearning": None,
        "diverged": False,
        "seconds": 36.0,
        "threads": 1,
        **changes,
    }


def make_settings(**changes: Any) -> dict[str, Any]:
    """Return the content of settings.json."""
    methods = changes.get("methods", METHODS)
    return {
        "track": "tofu",
        "form": "short",
        "name": "tofu-small",
        "data": "forget10",
        "model": {"parameters": 1234567, "name": "Llama, 4 layers"},
        "tuning_seed": 0,
        "seeds": list(SEEDS),
        "weights": list(WEIGHTS),
        "lrs": [LR],
        "command": "python benchmarks/unlearning_bench.py --track tofu --data /home/someone/tofu --out docs/results",
        "commit": "abc1234",
        "versions": {"torch": "2.13.0", "torchjd": None},
        "selected": {name: {"lr": LR, "weight": WEIGHTS[0]} for name in methods},
        "steps": 50,
        "batch_size": 4,
        "rows": {"forget": 40, "retain": 80, "untouched": 40},
        **changes,
        "methods": list(methods),
    }


def make_folder(folder: Path, runs: Iterable[dict[str, Any]], **settings: Any) -> Path:
    """Write a folder of result files with a target and a retrained model."""
    (folder / "runs").mkdir(parents=True)
    write(folder / "settings.json", make_settings(**settings))
    scores = {"forget_quality": 1e-20, "model_utility": 0.7, "forget_rouge_l": 0.95, "privleak": -80.0}
    write(folder / "target.json", {"final": measured(-0.02, 0.9, 0.8), "scores": scores, "training": {}})
    scores = {"forget_quality": 1.0, "model_utility": 0.7, "forget_rouge_l": 0.3, "privleak": 0.0}
    write(folder / "retrained.json", {"final": measured(-2.0, 0.9, 0.8), "scores": scores, "training": {}})
    for i, run in enumerate(runs):
        write(folder / "runs" / f"{i:03}.json", run)
    return folder


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def plausible_runs(methods: Iterable[str] = METHODS, weights: Iterable[float] = WEIGHTS, steps: int = 12) -> list[Any]:
    """Return runs of all methods, weights and seeds that look like real ones."""
    runs = []
    for method in methods:
        for weight in weights:
            for seed in SEEDS:
                runs.append(_plausible_run(method, weight, seed, steps))
    return runs


def _plausible_run(method: str, weight: float, seed: int, steps: int) -> dict[str, Any]:
    rng = random.Random(f"{method} {weight} {seed}")
    speed, price = SPEED.get(method.split("/")[1], (5.0, 0.04))
    speed, price = speed * weight**0.4 * rng.uniform(0.9, 1.1), price * rng.uniform(0.9, 1.1) * weight**0.3
    path = []
    for i in range(6):
        forget, lost = -0.02 - speed * i / 5, price * i / 5
        path.append(measured(forget, 0.9 * (1 - lost), 0.8 * (1 - 1.5 * lost)))
    norms = [4 * math.exp(-3 * i / steps) * rng.uniform(0.8, 1.2) for i in range(steps)]
    cosines = [rng.gauss(-0.05, 0.1) for _ in range(steps)]
    traces = [
        {
            "step": i,
            "cosine": cosine if "+" in method else None,
            "forget_norm": norm,
            "retain_norm": 0.5 if "+" in method else None,
            "forget_coefficient": weight - (cosine * 0.5 / norm if "blur" in method else 0.0),
            "retain_coefficient": 1.0,
        }
        for i, (norm, cosine) in enumerate(zip(norms, cosines, strict=True))
    ]
    scores = {
        "forget_quality": 10 ** rng.uniform(-8, -3),
        "model_utility": 0.65,
        "forget_rouge_l": 0.4,
        "privleak": 12.5,
    }
    relearning = [
        {"step": s, "relearned_rows": 1 - 0.8**s, "other_forgotten_rows": 0.3 - 0.2 * 0.9**s, "retain": 0.85}
        for s in range(0, 25, 4)
    ]
    selected = weight == WEIGHTS[0]
    more = {"scores": scores, "relearning": relearning} if selected else {}
    return make_run(method, weight, seed, path, steps=traces, **more)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of a complete folder."""
    folder = tmp_path_factory.mktemp("report")
    runs = plausible_runs()
    runs[0] = diverged(runs[0])
    make_folder(folder / "in", runs)
    ratio = {"median": 1.25, "low": 1.2, "high": 1.3}
    write(
        folder / "in" / "cost.json",
        {"baseline": METHODS[1], "methods": {METHODS[2]: {"time_ratio": ratio, "extra_gradient_sets": 1.0}}},
    )
    return write_report(folder / "in", folder / "out")


def diverged(run: dict[str, Any]) -> dict[str, Any]:
    """Return the run as it is written when numbers stop being finite half-way."""
    path = [{**point, **(nothing() if i > 2 else {})} for i, point in enumerate(run["path"])]
    return {**run, "path": path, "final": nothing(), "scores": None, "relearning": None, "diverged": True}


def test_all_files_are_written_and_every_link_of_the_markdown_exists(report: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", report.read_text(encoding="utf-8"))
    assert len(links) == 5
    assert all((report.parent / link).stat().st_size > 5000 for link in links)
    drawn = sorted(path.name for path in (report.parent / "figures").iterdir())
    keys = ("gradients", "memorisation", "relearning", "trade-off", "weights")
    assert drawn == [f"tofu-small-{key}.{suffix}" for key in keys for suffix in ("png", "svg")]
    assert sorted(p.name for p in report.parent.iterdir()) == ["figures", "tofu-small.json", "tofu-small.md"]


def test_figures_are_small_and_without_a_date(report: Path) -> None:
    for path in (report.parent / "figures").iterdir():
        assert path.stat().st_size < 300_000, path.name
        if path.suffix == ".svg":
            assert "dc:date" not in path.read_text(encoding="utf-8")


def test_the_report_says_what_was_run(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    for fact in (
        "# Unlearning on TOFU: tofu-small",
        "--data path/to/tofu --out docs/results",
        "commit abc1234",
        "Llama, 4 layers, 1,234,567 parameters",
        "forget 40, retain 80, untouched 40",
        "24 of 24 runs",
        "seeds: 1, 2, 3; tuned on 0",
        "torch 2.13.0",
        "Runs that diverged: GA: forget loss alone 1 of 6.",
        "| NPO + NLL: BLUR | 1.25 | 1.20 to 1.30 | 1 |",
    ):
        assert fact in text
    assert "torchjd" not in text  # was not installed
    assert "Incomplete" not in text


def test_no_path_of_the_machine_is_in_the_report(report: Path) -> None:
    for path in (report, report.with_suffix(".json")):
        assert "/home" not in path.read_text(encoding="utf-8")
        assert str(report.parent) not in path.read_text(encoding="utf-8")


def test_every_table_is_one_for_github(report: Path) -> None:
    """A row with another number of cells than its heading is shown wrongly."""
    blocks = report.read_text(encoding="utf-8").split("\n\n")
    tables = [block.split("\n") for block in blocks if block.startswith("|")]
    assert (
        len(tables) == 5 + 1 + 2 + 2 + 1 + 1 + 2 + 1 + 1
    )  # equal retain, hypervolume, ratios, main, ... weights, relearning, cost
    for rows in tables:
        assert len({row.count("|") for row in rows}) == 1


def test_the_json_has_the_numbers_of_tables_and_figures(report: Path) -> None:
    content = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))
    rows = {row[0]: row for row in content["tables"]["equal-retain-0.95"]["rows"]}
    text = report.read_text(encoding="utf-8")
    mean = rows["NPO + NLL: BLUR"][1]["mean"]
    assert f"| NPO + NLL: BLUR | −{abs(mean):.2f} ± " in text
    assert rows["NPO + NLL: BLUR"][4]["verdict"] in ("better", "tie", "worse")
    assert rows["NPO + NLL: weighted sum"][4] is None
    front = content["fronts"]["npo+nll/blur"]["1"]
    assert front["kept"] == sorted(front["kept"], reverse=True)
    assert front["log_prob"] == sorted(front["log_prob"], reverse=True)
    trace = content["runs_at_selected_weight"]["npo+nll/blur"]["1"]["steps"]
    assert len(trace["cosine"]) == len(trace["step"]) == 12


def test_the_same_files_give_the_same_bytes(report: Path, tmp_path: Path) -> None:
    again = write_report(report.parent.parent / "in", tmp_path)
    for path in report.parent.rglob("*.*"):
        assert (again.parent / path.relative_to(report.parent)).read_bytes() == path.read_bytes(), path.name


def test_a_report_of_what_is_there_names_what_is_missing(tmp_path: Path) -> None:
    runs = [run for run in plausible_runs() if run["job"]["method"] in METHODS[1:3]]
    folder = make_folder(
        tmp_path / "in", [run for run in runs if (run["job"]["weight"], run["job"]["seed"]) != (0.1, 3)]
    )
    (folder / "retrained.json").unlink()
    text = write_report(folder, tmp_path / "out").read_text(encoding="utf-8")
    assert "**Incomplete.** 10 of 21 runs" in text  # what has no retain loss and no run is expected at one weight
    assert "**Not there yet: retrained.**" in text
    assert "`npo+nll/blur` w = 0.1 (seed 3)" in text
    assert "`npo+nll/normalized` w = 1 (seeds 1, 2, 3), w = 0.1 (seeds 1, 2, 3)" in text
    assert "incomplete: 2 of 12 runs are missing" in text


def test_a_folder_without_any_run_gives_a_report(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", [])
    for name in ("target", "retrained"):
        (folder / f"{name}.json").unlink()
    report = write_report(folder, tmp_path / "out")
    text = report.read_text(encoding="utf-8")
    assert "0 of 21 runs" in text
    assert "**Not there yet: target, retrained.**" in text
    assert "still to run: 3 of 3 seeds" in text
    assert "![" not in text
    assert list((report.parent / "figures").iterdir()) == []


def test_verbatim_and_knowledge_memorisation_are_drawn_where_they_were_measured(tmp_path: Path) -> None:
    runs = plausible_runs(METHODS[1:3], WEIGHTS[:1])
    for run in runs:
        for i, point in enumerate(run["path"]):
            point |= {"verbmem": 0.9 - i / 10, "knowmem": 0.8 - i / 10}
    folder = make_folder(tmp_path / "in", runs, track="muse", name="muse-books", weights=[1.0], methods=METHODS[1:3])
    final = {**measured(-2.0), "verbmem": 0.125, "knowmem": 0.25}
    write(folder / "retrained.json", {"final": final, "scores": {}, "training": {}})
    report = write_report(folder, tmp_path / "out")
    content = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))
    path = content["runs_at_selected_weight"]["npo+nll/blur"]["1"]["path"]
    assert path["memorisation"][1] == {"verbmem": 0.8, "knowmem": 0.7}
    assert "# Unlearning on MUSE" in report.read_text(encoding="utf-8")
    drawn = (report.parent / "figures" / "muse-books-memorisation.svg").read_text(encoding="utf-8")
    assert "<!-- VerbMem -->" in drawn
    assert "<!-- p_forget -->" not in drawn


def test_the_command_writes_the_report_or_says_in_one_line_why_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "unlearning.report", str(make_folder(tmp_path / "in", [])), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(tmp_path / "out" / "tofu-small.md"), "")
    (tmp_path / "in" / "settings.json").unlink()
    failed = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("Error: ")
    assert "settings.json is missing" in failed.stderr
    assert failed.stderr.count("\n") == 1
