"""examples/unlearn.py from the command line to the saved model: scores, records, interruption, several processes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import unlearn
import yaml
from knowing import know
from quickstart_lib.data import load_rows
from safetensors.torch import load_file
from shared_lib.encoding import encode_rows
from shared_lib.errors import InputError
from shared_lib.metrics import mean_probability
from shared_lib.models import load_model, load_tokenizer, save_small_llama
from shared_lib.records import read_rows
from unlearn_lib import run_folder

UNLEARN = Path(unlearn.__file__)
SMALL = ["--lr", "1e-2", "--batch-size", "4", "--generate-rows", "2", "--cpu"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama, and lines to forget and to retain."""
    folder = tmp_path_factory.mktemp("unlearn")
    rows = load_rows(None, 4, 0)
    save_small_llama(folder / "llama", rows, 0)
    for name, part in (("forget", rows[-8:]), ("retain", rows[:12]), ("others", rows[20:24])):
        lines = (json.dumps({"question": row.question, "answer": row.answer}) for row in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def arguments(home: Path, out: Path, *more: str) -> list[str]:
    files = ["--forget", str(home / "forget.jsonl"), "--retain", str(home / "retain.jsonl")]
    return ["--model", str(home / "llama"), *files, "--out", str(out), *SMALL, *more]


def run_here(monkeypatch: pytest.MonkeyPatch, home: Path, out: Path, *more: str) -> None:
    monkeypatch.setattr(sys, "argv", ["unlearn.py", *arguments(home, out, *more)])
    unlearn.main()


def start(launcher: list[str], *rest: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, str(UNLEARN), *rest],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_weights(one: Path, other: Path, **tolerance: float) -> None:
    first, second = (load_file(out / "model" / "model.safetensors") for out in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], **{"rtol": 0, "atol": 0, **tolerance})


def test_a_run_from_rows_to_model(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = ["--epochs", "2", "--eval", f"others={home / 'others.jsonl'}", "--eval-fraction", "0.25"]
    run_here(monkeypatch, home, out, *more)
    told = capsys.readouterr().out
    assert "8 rows (8 question)" in told
    assert "3 held out" in told
    assert f"Model: {out / 'model'}" in told
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", "model", "results.json", "run.json"]

    results = results_of(out)
    scores = results["scores"]
    assert {name: score["after"]["rows"] for name, score in scores.items()} == {
        "forget": 8,
        "retain": 9,
        "retain, held out": 3,
        "others": 4,
    }
    for when, folder in (("before", home / "llama"), ("after", out / "model")):
        examples = encode_rows(load_tokenizer(folder), read_rows(str(home / "forget.jsonl")))
        expected = mean_probability(load_model(folder, "cpu"), examples)
        assert scores["forget"][when]["probability"] == pytest.approx(expected, rel=1e-4)
    assert scores["forget"]["after"]["perplexity"] > 1.5 * scores["forget"]["before"]["perplexity"]
    assert [log["step"] for log in log_of(out)] == [1, 2, 3, 4, 4]
    cosines = [log["blur_cosine"] for log in log_of(out)[:4]]
    assert results["statistics"]["cosine"] == {
        "first": cosines[0],
        "last": cosines[-1],
        "mean": pytest.approx(sum(cosines) / 4),
    }
    assert results["data"]["--forget"]["sha256"] in (out / "model" / "README.md").read_text()

    # The same command again has nothing to do; another is not mixed with it.
    run_here(monkeypatch, home, out, *more)
    assert "This run is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"--out: .* other settings: --epochs was 2.0, now 3.0. Give those"):
        run_here(monkeypatch, home, out, "--epochs", "3", *more[2:])
    run_here(monkeypatch, home, out, "--epochs", "1", "--overwrite")
    assert results_of(out)["steps"] == 2


def test_the_card_is_one_that_the_hub_reads(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch, home, tmp_path, "--max-steps", "1", "--gamma", "0.5")
    _, header, body = (tmp_path / "model" / "README.md").read_text().split("---\n", maxsplit=2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["unlearning", "blur"],
    }
    for part in ("not proven deletion", "--gamma 0.5", "| gamma | `0.5` |", "| cosine |", "| forget | 8 |", "torch"):
        assert part in body


FLAVOURS = {
    "simnpo": ["--method", "simnpo", "--beta", "1", "--rule", "normalized", "--scope", "parameter", "--normalize"],
    "ga, kl": [
        "--method",
        "ga",
        "--retain-loss",
        "kl",
        "--stash",
        "int8",
        "--scheduler",
        "constant",
        "--warmup",
        "0.5",
    ],
    "dpo": ["--method", "dpo", "--accumulation", "2", "--max-grad-norm", "0", "--dtype", "bfloat16"],
    "npo, kl": ["--retain-loss", "kl", "--bf16", "--gradient-checkpointing", "--eval-fraction", "0"],
}


@pytest.mark.parametrize("more", FLAVOURS.values(), ids=FLAVOURS.keys())
def test_every_method_moves_the_model(
    more: list[str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch, home, tmp_path, "--epochs", "2", *more)
    scores = results_of(tmp_path)["scores"]["forget"]
    assert scores["before"]["probability"] != scores["after"]["probability"]
    steps = [log for log in log_of(tmp_path) if "blur_cosine" in log]
    assert len(steps) == results_of(tmp_path)["steps"] == (2 if "--accumulation" in more else 4)


def test_what_is_saved_is_what_was_scored(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch, home, tmp_path, "--max-steps", "2", "--save-dtype", "bfloat16", "--keep-checkpoints")
    assert {value.dtype for value in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.bfloat16}
    assert (tmp_path / "training" / "checkpoint-2").is_dir()
    assert_scores_are_of(load_model(tmp_path / "model", "cpu", dtype=torch.bfloat16), home, tmp_path)


def assert_scores_are_of(model: Any, home: Path, out: Path) -> None:
    examples = encode_rows(load_tokenizer(home / "llama"), read_rows(str(home / "forget.jsonl")))
    expected = mean_probability(model, examples)
    # bfloat16 rounds otherwise in batches of another size.
    rel = 1e-4 if model.dtype == torch.float32 else 5e-2
    assert results_of(out)["scores"]["forget"]["after"]["probability"] == pytest.approx(expected, rel=rel)


# peft 0.21 reads the older of two names that transformers 5.23 has for it, also where it only loads.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_merged_or_kept(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    more = ["--epochs", "1", "--lora", "4", "--retain-loss", "kl", "--lora-targets", "q_proj,v_proj"]
    run_here(monkeypatch, home, tmp_path / "merged", *more)
    run_here(monkeypatch, home, tmp_path / "kept", *more, "--keep-adapter")
    merged = load_model(tmp_path / "merged" / "model", "cpu")
    kept = peft.PeftModel.from_pretrained(load_model(home / "llama", "cpu"), tmp_path / "kept" / "model")
    ids = torch.arange(20).view(1, -1)
    torch.testing.assert_close(merged(input_ids=ids).logits, kept(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(input_ids=ids).logits, load_model(home / "llama", "cpu")(input_ids=ids).logits)
    assert_scores_are_of(merged, home, tmp_path / "merged")
    assert not (tmp_path / "kept" / "model" / "model.safetensors").exists()
    assert "library_name: peft" in (tmp_path / "kept" / "model" / "README.md").read_text()
    with pytest.raises(InputError, match=r"--lora-targets: Target modules .*nowhere"):
        run_here(monkeypatch, home, tmp_path / "x", "--lora", "2", "--lora-targets", "nowhere")
    assert not (tmp_path / "x").exists()  # The corrected command may have the folder.


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    number: signal.Signals, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--epochs", "15", "--save-steps", "3", "--batch-size", "3"]
    if number == signal.SIGTERM:
        pytest.importorskip("peft", reason="peft is not installed")
        more += ["--lora", "4", "--lora-dropout", "0.1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start([], *arguments(home, killed, *more))
    deadline = time.monotonic() + 300
    while not list(killed.glob("training/checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert not (killed / "results.json").exists(), output
    if number == signal.SIGTERM:
        assert process.returncode == 130
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
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    out, alone = tmp_path / "two", tmp_path / "one"
    process = start(launcher, *arguments(home, out, "--epochs", "2"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
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


def test_a_dry_run_writes_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--dry-run", "--accumulation", "2", "--epochs", "3", "--batch-size", "3"]
    run_here(monkeypatch, home, tmp_path / "out", *more)
    told = capsys.readouterr().out
    assert "'Question: " in told
    assert "6 steps would be taken" in told  # 8 rows are three batches, which are two steps, three times.
    assert not (tmp_path / "out").exists()
    run_here(monkeypatch, home, tmp_path / "out", *more[1:])
    assert results_of(tmp_path / "out")["steps"] == 6


def test_questions_follow_the_chat_template(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(home / "llama")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>\n{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    load_model(home / "llama", "cpu").save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    chat = ["--model", str(tmp_path / "chat"), "--max-steps", "1"]
    run_here(monkeypatch, home, tmp_path / "a", *chat, "--dry-run")
    assert "[user]" in capsys.readouterr().out
    run_here(monkeypatch, home, tmp_path / "b", *chat, "--plain-questions", "--dry-run")
    assert "[user]" not in capsys.readouterr().out
    run_here(monkeypatch, home, tmp_path / "a", *chat)
    assert results_of(tmp_path / "a")["steps"] == 1
    assert load_tokenizer(tmp_path / "a" / "model").chat_template == tokenizer.chat_template


def write_gguf(home: Path, path: Path) -> None:
    """The small Llama's shape with random weights, and its vocabulary, in float32."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    model, tokenizer = load_model(home / "llama", "cpu"), load_tokenizer(home / "llama")
    config, bpe = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk"}
    names |= {
        f"self_attn.{part}_proj": f"attn_{to}" for part, to in zip("qkvo", ("q", "k", "v", "output"), strict=True)
    }
    names |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, value in model.named_parameters():
        for before, after in names.items():
            name = name.replace(before, after)
        writer.add_tensor(name, value.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_an_ordinary_model(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "gguf", tmp_path / "out"
    folder.mkdir()
    write_gguf(home, folder / "small.gguf")
    run_here(monkeypatch, home, out, "--model", str(folder), "--gguf-file", "small.gguf", "--epochs", "1")
    assert "quantization_config" not in json.loads((out / "model" / "config.json").read_text())
    examples = encode_rows(load_tokenizer(out / "model"), read_rows(str(home / "forget.jsonl")))
    expected = mean_probability(load_model(out / "model", "cpu"), examples)
    assert results_of(out)["scores"]["forget"]["after"]["probability"] == pytest.approx(expected, rel=1e-4)


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


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_before_anything_is_loaded(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(home / "llama")
    tokenizer.add_tokens(["Quixotry"])
    load_model(home / "llama", "cpu").save_pretrained(tmp_path / "more")
    tokenizer.save_pretrained(tmp_path / "more")
    (tmp_path / "new.jsonl").write_text('{"text": "A Quixotry."}')
    more = ["--model", str(tmp_path / "more"), "--dry-run"]
    run_here(monkeypatch, home, tmp_path / "out", *more)  # A token that no row has does no harm.
    with pytest.raises(InputError, match=r"--forget: .*new\.jsonl:1: .* got \d+ \('Quixotry'\)"):
        run_here(monkeypatch, home, tmp_path / "out", *more, "--forget", str(tmp_path / "new.jsonl"))


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
