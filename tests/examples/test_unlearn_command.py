"""examples/unlearn.py from the command line to the saved model: scores, records, kinds of models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from shared_lib.encoding import encode_rows
from shared_lib.errors import InputError
from shared_lib.metrics import mean_probability
from shared_lib.models import load_model, load_tokenizer
from shared_lib.records import read_rows
from unlearn_run import log_of, make_home, results_of, run_here


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("unlearn"))


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
    assert "rule blur, metric euclidean; trained" in body
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
    "margin": ["--method", "margin", "--metric", "retain", "--scope", "parameter", "--lr", "1e-3"],
    "metric": ["--metric", "retain", "--damping", "0.1", "--gamma", "0.5", "--lr", "1e-3"],
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
    assert ("blur_metric_cosine" in steps[0]) == ("--metric" in more)
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


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let peft's configuration have no such field, as an older one."""
    from unlearn_lib import models

    fields = models.fields
    monkeypatch.setattr(models, "fields", lambda cls: [field for field in fields(cls) if field.name != name])


# peft 0.21 reads the older of two names that transformers 5.23 has for it, also where it only loads.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("embeddings", [(), ("--lora-embeddings", "--metric", "retain")], ids=["alone", "embeddings"])
def test_an_adapter_is_merged_or_kept(
    embeddings: tuple[str, ...], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    more = ["--epochs", "1", "--lora", "4", "--retain-loss", "kl", "--lora-targets", "q_proj,v_proj", *embeddings]
    run_here(monkeypatch, home, tmp_path / "merged", *more)
    run_here(monkeypatch, home, tmp_path / "kept", *more, "--keep-adapter")
    merged = load_model(tmp_path / "merged" / "model", "cpu")
    kept = peft.PeftModel.from_pretrained(load_model(home / "llama", "cpu"), tmp_path / "kept" / "model")
    ids = torch.arange(20).view(1, -1)
    torch.testing.assert_close(merged(input_ids=ids).logits, kept(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    before = load_model(home / "llama", "cpu")
    assert not torch.allclose(merged(input_ids=ids).logits, before(input_ids=ids).logits)
    moved = not torch.equal(merged.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert moved == bool(embeddings)
    tied = before.get_output_embeddings().weight is before.get_input_embeddings().weight
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    assert_scores_are_of(merged, home, tmp_path / "merged")
    assert not (tmp_path / "kept" / "model" / "model.safetensors").exists()
    assert "library_name: peft" in (tmp_path / "kept" / "model" / "README.md").read_text()
    more = ["--lora", "2", *embeddings]
    with pytest.raises(InputError, match=r"--lora-targets: (Target modules .*nowhere|No modules were targeted)"):
        run_here(monkeypatch, home, tmp_path / "x", *more, "--lora-targets", "nowhere")
    if embeddings:
        with pytest.raises(InputError, match=r"--lora-targets: .* --lora-embeddings trains the token embeddings whole"):
            run_here(monkeypatch, home, tmp_path / "x", *more, "--lora-targets", "q_proj,lm_head")
        without(monkeypatch, "ensure_weight_tying")
        parted = pytest.raises(InputError, match=r"--lora-embeddings: .* keeps them one from version 0.18 on")
        with parted, pytest.warns(UserWarning, match="ensure_weight_tying"):
            run_here(monkeypatch, home, tmp_path / "x", *more)
    assert not (tmp_path / "x").exists()  # The corrected command may have the folder.


def test_a_dry_run_writes_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--dry-run", "--accumulation", "2", "--epochs", "3", "--batch-size", "3"]
    run_here(monkeypatch, home, tmp_path / "out", *more)
    told = capsys.readouterr().out
    assert "'Question: " in told
    assert "6 steps would be taken" in told  # 8 rows are three batches, which are two steps, three times.
    assert "--metric" not in told
    for lora, hints in (([], 1), (["--lora", "2"], 2), (["--lora", "2", "--lora-embeddings"], 1)):
        run_here(monkeypatch, home, tmp_path / "out", "--dry-run", "--metric", "retain", *lora)
        assert capsys.readouterr().out.count("--metric retain ") == hints
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
