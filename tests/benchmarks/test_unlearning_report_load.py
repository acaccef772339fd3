"""Result files as objects, and errors that name the file and the field."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_unlearning_report import make_folder, make_run, measured, nothing, write
from unlearning.report.load import load
from unlearning.report.names import Method, score_label

from shared_lib.errors import InputError  # isort: skip


def run_with(**changes: Any) -> dict[str, Any]:
    return {**make_run("npo+nll/blur", 1.0, 1, [measured(-0.1), measured(-2.0)]), **changes}


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    step = {"step": 0, "cosine": -0.5, "forget_norm": 2.0, "retain_norm": 3.0, "forget_coefficient": 1.75}
    setting = load(make_folder(tmp_path / "in", [run_with(steps=[step], scores={"model_utility": 0.5, "x": None})]))
    [run] = setting.runs
    assert (run.method.id, run.weight, run.seed, run.stage) == ("npo+nll/blur", 1.0, 1, "sweep")
    assert run.path[1].measured is not None
    assert run.path[1].measured.forget.log_prob == -2.0
    assert (run.steps[0].cosine, run.steps[0].retain_coefficient) == (-0.5, None)
    assert run.steps[0].projection == -0.5 * 3 / 2
    assert run.scores == {"model_utility": 0.5, "x": None}
    assert setting.target(1) is setting.target(2) is setting.targets[None]


def test_each_seed_has_its_own_target_where_there_are_several(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", [])
    write(folder / "target-2.json", {"final": measured(-0.5), "scores": {}, "training": {}})
    setting = load(folder)
    found = setting.target(2)
    assert found is not None
    assert found.final.forget.log_prob == -0.5
    assert setting.target(1) is setting.tuning_target is setting.targets[None]
    write(folder / "tuning-target.json", {"final": measured(-0.7), "scores": {}, "training": {}})
    tuned_on = load(folder).tuning_target
    assert tuned_on is not None
    assert tuned_on.final.forget.log_prob == -0.7


def test_the_retrained_model_is_that_of_the_seed_or_of_all(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", [])
    write(folder / "retrained-2.json", {"final": measured(-9.0), "scores": {}, "training": {}})
    setting = load(folder)
    levels = [model.final.forget.log_prob for seed in (1, 2) if (model := setting.retrained_model(seed))]
    assert levels == [-2.0, -9.0]
    (folder / "retrained.json").unlink()
    assert load(folder).retrained_model(1) is None


def test_what_is_not_finite_is_nothing(tmp_path: Path) -> None:
    path = [{"step": 0, "epoch": 0, **measured(-0.1)}, {"step": 9, "epoch": 1, **nothing()}]
    path.append({"step": 10, "epoch": 1.1, "forget": None, "retain": None, "untouched": None})
    [run] = load(make_folder(tmp_path / "in", [run_with(path=path, final=None, diverged=True)])).runs
    assert [point.measured is None for point in run.path] == [False, True, True]
    assert run.final is None
    broken = run_with()
    broken["path"][1]["forget"] = {"log_prob": math.nan, "probability": math.nan}
    [run] = load(make_folder(tmp_path / "nan", [broken])).runs
    assert run.path[1].measured is None


def change(content: dict[str, Any], field: str, value: Any) -> None:
    *parents, name = field.split(".")
    for parent in parents:
        content = content[parent]
    if value is None:
        del content[name]
    else:
        content[name] = value


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("job.weight", "heavy", 'field `job.weight` must be a number, got "heavy"'),
        ("job.weight", True, "field `job.weight` must be a number, got true"),
        ("job.seed", None, "field `job.seed` must be an integer, got no such field"),
        ("job.method", "blur", "a method must be named like `npo\\+nll/blur`"),
        ("final.retain", 3, "field `final.retain` must be a JSON object, got 3"),
        ("final.forget", {"probability": 1}, "field `final.forget.log_prob` must be a number, got no such field"),
        ("format", 2, "field `format` must be 1, got 2"),
        ("diverged", None, "field `diverged` must be true or false"),
        ("steps", [4], r"field `steps\[0\]` must be a JSON object, got 4"),
        ("scores", {"model_utility": "good"}, "field `scores.model_utility` must be a number"),
    ],
)
def test_an_error_names_the_file_and_the_field(tmp_path: Path, field: str, value: Any, message: str) -> None:
    run = run_with()
    change(run, field, value)
    with pytest.raises(InputError, match=message) as caught:
        load(make_folder(tmp_path / "in", [run]))
    assert str(caught.value).startswith(str(tmp_path / "in" / "runs" / "000.json"))


def test_errors_of_other_files_name_them(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", [])
    (folder / "runs" / "half.json").write_text('{"format": 1')
    with pytest.raises(InputError, match=r"half\.json: the file must hold one JSON object"):
        load(folder)
    (folder / "runs" / "half.json").unlink()
    write(folder / "cost.json", {"baseline": "a", "methods": {"npo+nll/blur": {"time_ratio": {"median": 1}}}})
    with pytest.raises(
        InputError, match=r"cost\.json: field `methods\.npo\+nll/blur\.time_ratio\.low` must be a number"
    ):
        load(folder)
    (folder / "cost.json").unlink()
    (folder / "target-best.json").write_text("{}")
    with pytest.raises(InputError, match=r"target-best\.json must be named"):
        load(folder)
    (folder / "target-best.json").unlink()
    settings = json.loads((folder / "settings.json").read_text())
    write(folder / "settings.json", {**settings, "weights": [1, "x"]})
    with pytest.raises(InputError, match=r"settings\.json: field `weights\.1` must be a number"):
        load(folder)


def test_method_ids_and_their_names() -> None:
    method = Method.parse("simnpo+kl/blur-per-parameter")
    assert (method.forget_loss, method.retain_loss, method.combine) == ("simnpo", "kl", "blur-per-parameter")
    assert method.baseline == "simnpo+kl/weighted_sum"
    assert method.label == "SimNPO + KL: BLUR per parameter"
    assert Method.parse("ga/forget-only").baseline is None
    assert Method.parse("npo+nll/weighted_sum").baseline is None
    assert Method.parse("npo+nll/my_own").label == "NPO + NLL: my own"
    assert score_label("forget_rouge_l") == "forget ROUGE-L"
    assert score_label("mia_loss_auc") == "MIA loss AUC"
