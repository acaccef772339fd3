"""examples/unlearn.py when it does not run through: interruption, several processes, another day, an early stop."""

import math
import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest
import torch
import unlearn
from forking import Script
from knowing import know
from safetensors.torch import load_file
from shared_lib.errors import InputError
from shared_lib.models import load_model, load_tokenizer
from unlearn_lib import run_folder
from unlearn_run import arguments, log_of, make_home, results_of, run_here

UNLEARN = Path(unlearn.__file__)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("unlearn"))


def assert_same_weights(one: Path, other: Path, **tolerance: float) -> None:
    first, second = (load_file(out / "model" / "model.safetensors") for out in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], **{"rtol": 0, "atol": 0, **tolerance})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    number: signal.Signals, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--epochs", "15", "--save-steps", "3", "--batch-size", "3"]
    if number == signal.SIGTERM:
        pytest.importorskip("peft", reason="peft is not installed")
        more += ["--lora", "4", "--lora-dropout", "0.1", "--lora-embeddings", "--metric", "retain"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    script = Script(UNLEARN, arguments(home, killed, *more), tmp_path / "printed")
    (process,) = script.processes
    deadline = time.monotonic() + 300
    while not list(killed.glob("training/checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        assert process.exitcode is None, script.printed()
        time.sleep(0.02)
    os.kill(process.pid, number)
    (code,) = script.wait()
    output = script.printed()
    assert not (killed / "results.json").exists(), output
    if number == signal.SIGTERM:
        assert code == 130
        assert "The same command goes on from checkpoint-" in output
        assert "Traceback" not in output
    run_here(monkeypatch, home, killed, *more)
    run_here(monkeypatch, home, whole, *more)
    assert_same_weights(killed, whole)
    assert [log["step"] for log in log_of(killed)] == [*range(1, 46), 45]
    assert results_of(killed)["scores"] == results_of(whole)["scores"]
    for one, other in zip(log_of(killed)[:45], log_of(whole)[:45], strict=True):
        assert one == other


def test_a_run_that_only_has_to_be_scored_is_not_trained_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run_here(monkeypatch, home, out, "--epochs", "2", "--keep-checkpoints")
    first, weights = results_of(out), load_file(out / "model" / "model.safetensors")
    (out / "results.json").unlink()
    (out / "model" / "model.safetensors").unlink()
    run_here(monkeypatch, home, out, "--epochs", "2", "--keep-checkpoints")
    assert results_of(out)["scores"] == first["scores"]
    assert results_of(out)["statistics"] == first["statistics"]
    again = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_two_processes_take_the_steps_of_one(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Under --cpu accelerate starts several processes with MPI only. This is its launcher for GPUs.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(UNLEARN)]
    out, alone = tmp_path / "two", tmp_path / "one"
    command = [sys.executable, *launcher, *arguments(home, out, "--epochs", "2")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "check": False}
    done = subprocess.run(command, env=environment, timeout=300, **merged)
    output = done.stdout
    assert done.returncode == 0, output
    assert output.count("8 rows (8 question)") == output.count("Model: ") == 1
    run_here(monkeypatch, home, alone, "--epochs", "2", "--accumulation", "2")
    # Sums in another order, twice through AdamW.
    assert_same_weights(out, alone, rtol=1e-3, atol=1e-4)
    two, one = results_of(out), results_of(alone)
    assert two["processes"] == 2
    for name, scores in one["scores"].items():
        assert two["scores"][name]["before"] == pytest.approx(scores["before"], rel=1e-5)
        assert two["scores"][name]["after"] == pytest.approx(scores["after"], rel=1e-2)
    with pytest.raises(InputError, match=r"--out: .* it had 2 processes, now 1"):
        run_here(monkeypatch, home, out, "--epochs", "2")


def test_a_run_goes_on_with_the_prompts_of_its_first_day(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A template that prints the date, and a run that is begun on one day and ended on another."""
    tokenizer = load_tokenizer(home / "llama")
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>"
    tokenizer.chat_template += "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    load_model(home / "llama", "cpu").save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    out, chat = tmp_path / "out", ["--model", str(tmp_path / "chat"), "--max-steps", "2", "--save-steps", "1"]
    on_day(monkeypatch, 3)
    monkeypatch.setattr(unlearn.RunFolder, "drop_checkpoints", lambda self: None)
    run_here(monkeypatch, home, out, *chat)
    first = results_of(out)
    assert first["day"] == "2026-02-03"
    (out / "results.json").unlink()
    on_day(monkeypatch, 4)
    run_here(monkeypatch, home, out, *chat)
    assert results_of(out)["data"] == first["data"]
    run_here(monkeypatch, home, tmp_path / "another", *chat, "--dry-run")
    assert "04 Feb 2026" in capsys.readouterr().out
    # Whatever else changes the tokens of the same rows is refused.
    (out / "results.json").unlink()
    tokenizer.chat_template = tokenizer.chat_template.replace("[", "<")
    tokenizer.save_pretrained(tmp_path / "chat")
    with pytest.raises(InputError, match=r"the rows of --forget are the same and their tokens are not"):
        run_here(monkeypatch, home, out, *chat)


def on_day(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    class Today(date):
        @classmethod
        def today(cls) -> date:
            return date(2026, 2, day)

    for module in (unlearn, run_folder):
        monkeypatch.setattr(module, "date", Today)


def test_stop_at_rows_never_seen(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that knows the rows stops in the middle of an epoch; what was only to be scored still is the same."""
    know(home / "llama", home / "forget.jsonl", tmp_path / "knowing")
    more = ["--model", str(tmp_path / "knowing"), "--stop-at", str(home / "others.jsonl"), "--stop-every", "1"]
    more += ["--lr", "3e-3", "--method", "ga", "--epochs", "30", "--keep-checkpoints", "--batch-size", "2"]
    out = tmp_path / "out"
    run_here(monkeypatch, home, out, *more)
    first, weights = results_of(out), load_file(out / "model" / "model.safetensors")
    stop = first["stop"]
    assert stop["reached"]
    assert stop["step"] == first["steps"] < 120
    assert first["steps"] % 4 != 0
    assert stop["forget"] <= stop["never seen"]
    # The level is that of the model before, as the table has it.
    assert math.exp(-stop["never seen"]) == pytest.approx(
        first["scores"]["never seen"]["before"]["perplexity"], rel=1e-4
    )
    assert math.exp(-stop["forget"]) == pytest.approx(first["scores"]["forget"]["after"]["perplexity"], rel=1e-4)
    told = "Stopped: the answers to forget are as improbable as rows never seen"
    assert told in capsys.readouterr().out
    assert told in (out / "model" / "README.md").read_text()
    (out / "results.json").unlink()
    run_here(monkeypatch, home, out, *more)
    again = results_of(out)
    assert (again["stop"], again["scores"], again["steps"]) == (stop, first["scores"], first["steps"])
    assert all(torch.equal(p, weights[n]) for n, p in load_file(out / "model" / "model.safetensors").items())
    # Rows that the model knows are no level, nor are rows that are trained on.
    with pytest.raises(InputError, match=r"--stop-at: .*: a row must not be in --retain too"):
        run_here(monkeypatch, home, tmp_path / "x", *more, "--stop-at", str(home / "retain.jsonl"))
    swapped = ["--forget", str(home / "others.jsonl"), "--stop-at", str(home / "forget.jsonl")]
    with pytest.raises(InputError, match=r"--stop-at: `holdout` must be less probable"):
        run_here(monkeypatch, home, tmp_path / "x", *more, *swapped)
    assert not (tmp_path / "x").exists()
