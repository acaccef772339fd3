"""Training until the answers are known, and what is kept of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quickstart import look_up_or_compute
from shared_lib.console import make_console, make_progress
from shared_lib.encoding import Example
from shared_lib.errors import InputError, TrainingError
from shared_lib.learning import Pupil, learn_models
from shared_lib.rows import Row
from shared_lib.training import Recipe, cache_key, learn, was_learned
from transformers import LlamaConfig, LlamaForCausalLM

RECIPE = Recipe(learning_rate=0.02, max_epochs=60, batch_size=2)
EXAMPLES = [Example([2, 3], [4, 5, 1]), Example([2, 6], [7, 1]), Example([2, 7], [6, 6, 1])]
ROWS = [Row("Who?", "She."), Row("What?", "That.")]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))


def test_training_stops_once_the_answers_are_known(model: LlamaForCausalLM) -> None:
    reports: list[tuple[int, float]] = []
    history = learn(model, EXAMPLES, RECIPE, lambda *report: reports.append(report))
    assert len(history) < RECIPE.max_epochs
    assert history[-1] >= RECIPE.known > max(history[:-1])
    assert reports == list(enumerate(history, start=1))


def test_training_stops_at_the_cap_and_says_so(model: LlamaForCausalLM, tmp_path: Path) -> None:
    recipe = replace(RECIPE, max_epochs=2)
    history = learn(model, EXAMPLES, recipe, lambda *report: None)
    assert len(history) == 2
    (tmp_path / "training.json").write_text(json.dumps({"recipe": {"known": recipe.known}, "probability": history}))
    assert was_learned(tmp_path) == (False, 2, history[-1])


def test_key_is_that_of_the_same_training() -> None:
    assert cache_key("a", ROWS, RECIPE) == cache_key("a", list(ROWS), replace(RECIPE))


@pytest.mark.parametrize(
    ("start", "rows", "recipe"),
    [
        ("b", ROWS, RECIPE),
        ("a", ROWS[::-1], RECIPE),
        ("a", [ROWS[0], Row("What?", "This.")], RECIPE),
        ("a", ROWS, replace(RECIPE, seed=1)),
        ("a", ROWS, replace(RECIPE, max_epochs=61)),
    ],
    ids=["start", "order", "answer", "seed", "epochs"],
)
def test_key_is_another_for_another_training(start: str, rows: list[Row], recipe: Recipe) -> None:
    assert cache_key(start, rows, recipe) != cache_key("a", ROWS, RECIPE)


def test_key_follows_the_files_of_a_local_model(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("old")
    before = cache_key(str(tmp_path), ROWS, RECIPE)
    (tmp_path / "weights").write_text("newer")
    assert cache_key(str(tmp_path), ROWS, RECIPE) != before


def test_a_failing_process_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    start, out = tmp_path / "no model", tmp_path / "models"
    start.mkdir()
    progress = make_progress(make_console())
    with pytest.raises(TrainingError, match=r"learning two rows: training failed: .*no model"):
        learn_models({"two": Pupil("learning two rows", ROWS)}, str(start), ROWS, RECIPE, out, progress)
    assert list(out.iterdir()) == []


def test_reference_is_computed_once_and_a_damaged_file_is_named(
    model: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, progress = tmp_path / "reference.safetensors", make_progress(make_console())
    computed = look_up_or_compute(model, EXAMPLES, path, progress)
    assert "computed, and kept in" in capsys.readouterr().out
    read = look_up_or_compute(model, EXAMPLES[::-1], path, progress)
    assert "read from" in capsys.readouterr().out
    assert (len(read), read.computed, computed.computed) == (3, 0, 3)
    path.write_bytes(b"half")
    with pytest.raises(InputError, match=r"reference\.safetensors'.* delete the file to have it computed anew"):
        look_up_or_compute(model, EXAMPLES, path, progress)
