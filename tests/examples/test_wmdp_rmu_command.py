"""The whole command on a tiny Llama, its sources of text, and what wrong input is told."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import wmdp_rmu
from quickstart_lib.data import load_rows
from safetensors.torch import load_file
from shared_lib.errors import InputError
from shared_lib.models import build_tokenizer, load_model, load_tokenizer
from test_wmdp_rmu_training import DOWN_PROJECTIONS, tiny_llama
from wmdp_rmu_lib import options as options_module
from wmdp_rmu_lib.corpora import Hub, passages, read_corpus, read_records, read_texts
from wmdp_rmu_lib.options import check_sources, is_hub_name, parse_options

SCRIPT = Path(wmdp_rmu.__file__)
DOCS = SCRIPT.parents[1] / "docs" / "wmdp_rmu.md"
SHORT = [
    "--device",
    "cpu",
    "--length",
    "24",
    "--retain-length",
    "24",
    "--batch",
    "2",
    "--held-out",
    "3",
    "--lr",
    "1e-2",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, two corpora to forget, one to retain and questions."""
    folder = tmp_path_factory.mktemp("wmdp_rmu")
    rows = load_rows(None, 4, 0)
    tokenizer = build_tokenizer(rows)
    tiny_llama(len(tokenizer)).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    texts = [f"{row.question} {row.answer}" for row in rows]
    for name, part in (("bio", texts[:20]), ("cyber", texts[20:40])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in part))
    (folder / "wiki.txt").write_text("\n".join(texts[40:]))
    question = {"question": "Who?", "choices": ["she", "he", "they"], "answer": 2}
    (folder / "questions.jsonl").write_text(json.dumps(question))
    return folder


def arguments(home: Path, out: Path, *more: str) -> list[str]:
    forget = ["--forget", str(home / "bio.jsonl"), "--forget", str(home / "cyber.jsonl")]
    retain = ["--retain", str(home / "wiki.txt"), "--passage-chars", "100"]
    return ["--model", str(home / "llama"), *forget, *retain, "--out", str(out), *SHORT, *more]


def run_here(monkeypatch: pytest.MonkeyPatch, home: Path, out: Path, *more: str) -> None:
    monkeypatch.setattr(sys, "argv", ["wmdp_rmu.py", *arguments(home, out, *more)])
    wmdp_rmu.main()


def test_a_run_trains_tells_and_saves(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = ["--steps", "12", "--log-every", "5", "--questions", str(home / "questions.jsonl")]
    run_here(monkeypatch, home, out, *more)
    told = capsys.readouterr().out
    assert re.findall(r"^step +(\d+)  (bio|cyber)  forget", told, re.MULTILINE) == [
        ("1", "bio"),
        ("5", "bio"),
        ("10", "cyber"),
        ("12", "cyber"),
    ]
    assert re.search(r"cos [+-]0\.\d+  \|g_f\| \S+  \|g_r\| \S+  a \S+  b 800", told)
    assert re.search(r"activations to forget: median norm \S+, \S+ in layer 7; steered to a norm of 6.5, 6.5", told)
    results = json.loads((out / "results.json").read_text())
    assert results["trained"] == DOWN_PROJECTIONS
    assert [step["step"] for step in results["steps"]] == list(range(1, 13))
    for name, value in results["before"].items():
        # Rich breaks a long name over several lines; its numbers stand in the first.
        assert f"{value:.4g}" in told, name
        assert f"{results['after'][name]:.4g}" in told, name
    assert {name.rpartition(": ")[2] for name in results["before"]} == {"perplexity", "activation norm", "accuracy"}
    changed = [name for name in results["before"] if results["before"][name] != results["after"][name]]
    assert len(changed) >= 6
    before, after = (load_file(folder / "model.safetensors") for folder in (home / "llama", out / "model"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == DOWN_PROJECTIONS
    assert len(load_tokenizer(out / "model")) == load_model(out / "model", "cpu").config.vocab_size
    assert sorted(path.name for path in out.iterdir()) == ["model", "results.json"]


def test_both_frozen_ways_make_one_run_and_seed_and_dtype_others(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"swap": [], "copy": ["--frozen", "copy"], "seed": ["--seed", "1"], "bfloat16": ["--dtype", "bfloat16"]}
    for name, more in kinds.items():
        run_here(monkeypatch, home, tmp_path / name, "--steps", "3", "--no-model", *more)
    found = {name: json.loads((tmp_path / name / "results.json").read_text()) for name in kinds}
    assert found["swap"]["steps"] == found["copy"]["steps"]
    assert found["swap"]["after"] == found["copy"]["after"]
    assert found["swap"]["steps"] != found["seed"]["steps"]
    losses = {name: [step["forget_loss"] for step in found[name]["steps"]] for name in kinds}
    assert losses["bfloat16"] != losses["swap"]
    assert losses["bfloat16"] == pytest.approx(losses["swap"], rel=0.05)  # Eight layers of 8 bits each.
    assert [path.name for path in (tmp_path / "swap").iterdir()] == ["results.json"]


SOURCES = {
    "forget": (["--forget", "nowhere.jsonl", "--length", "24"], r"--forget: there is no file nowhere.jsonl"),
    "retain": (["--retain", "./nowhere"], r"--retain: there is no file ./nowhere"),
    "questions": (["--questions", "nowhere.jsonl"], r"--questions: there is no file nowhere.jsonl"),
    "model": (["--model", "./nowhere"], r"--model: there is no folder ./nowhere"),
    "gguf": (["--gguf-file", "x.gguf"], r"--gguf-file: there is no file .*llama/x.gguf"),
    "tasks": (["--lm-eval-path", "nowhere"], r"--lm-eval-path: there is no folder nowhere"),
}


@pytest.mark.parametrize(("more", "message"), SOURCES.values(), ids=SOURCES.keys())
def test_what_is_not_there_is_named_before_anything_is_loaded(
    more: list[str], message: str, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        check_sources(parse_options(arguments(home, tmp_path / "out", *more)))


def test_a_missing_package_comes_with_the_command_that_installs_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options_module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--lm-eval needs the package lm-eval, .*: pip install lm-eval"):
        check_sources(parse_options(arguments(home, tmp_path / "out", "--lm-eval", "wmdp_bio,mmlu")))


def test_results_are_not_mixed_with_others(home: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").touch()
    with pytest.raises(InputError, match=r"--out: .* must be a new or an empty folder"):
        check_sources(parse_options(arguments(home, tmp_path)))


LATER = {
    "layer": (["--layer", "9"], r"--layer: the model's layers are 0 to 8, got 9"),
    "pattern": (["--param-pattern", "c_proj"], r"--param-pattern: in layer 5 nothing is called 'c_proj'"),
    "length": (["--length", "513"], r"--length must be at most 512, .* got 513"),
    "retain length": (["--retain-length", "513"], r"--retain-length must be at most 512, .* got 513"),
    "few": (["--held-out", "19"], r"--forget: .*bio.jsonl must have at least 21 passages of more than 50 .* got 20"),
    "short": (["--min-chars", "9999"], r"--forget: .* passages of more than 9999 characters, .* got 0"),
    "device": (["--device", "nonsense"], r"--device: 'nonsense' cannot be used here"),
    "dtype": (["--model", "{out}"], r"--model: .* could not be loaded: "),
}


@pytest.mark.parametrize(("more", "message"), LATER.values(), ids=LATER.keys())
def test_what_does_not_fit_is_explained_and_leaves_nothing(
    more: list[str], message: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    given = [part.format(out=tmp_path / "empty") for part in more]
    with pytest.raises(InputError, match=message):
        run_here(monkeypatch, home, tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()


INVALID = {
    "--layers": (["--layers", "6,8"], r"--layers: a layer above --layer, 7, .* got 8"),
    "--length": (["--length", "1,2,3"], r"--length: must be a whole number of at least 2, got '1'"),
    "lengths": (["--length", "8,9,10"], r"--length: give one value, or one for each of the 2 --forget, got 3"),
    "steering": (["--steering", "1,2,3"], r"--steering: give one value, or one for each of the 2 --forget, got 3"),
    "--steering": (["--steering", "0"], r"--steering: must be a positive number, got '0'"),
    "--gamma": (["--gamma", "x"], r"--gamma: must be a positive number, got 'x'"),
    "--damping": (["--damping", "1"], r"--damping: needs --metric retain"),
    "--rule": (["--rule", "sum"], r"--rule: invalid choice: 'sum'"),
}


@pytest.mark.parametrize(("more", "message"), INVALID.values(), ids=INVALID.keys())
def test_an_invalid_option_ends_with_code_2(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options(arguments(tmp_path, tmp_path / "out", *more))
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_retain_weight_of_the_metric_is_another(tmp_path: Path) -> None:
    """800 would be steps of 800 times the learning rate."""
    for more, weight in (
        ([], 800.0),
        (["--metric", "retain"], 1.0),
        (["--metric", "retain", "--retain-weight", "2"], 2.0),
    ):
        assert parse_options(arguments(tmp_path, tmp_path / "out", *more)).retain_weight == weight


def test_a_run_in_the_metric(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first step there is no retain gradient, and so no metric but eps; from then on there is."""
    run_here(monkeypatch, home, tmp_path, "--steps", "3", "--no-model", "--metric", "retain", "--lr", "1e-3")
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert [step["retain_coefficient"] for step in steps] == [1.0] * 3
    assert steps[0]["metric_retain_norm"] == 0 < steps[1]["metric_retain_norm"]
    assert all(step["retain_loss"] < 10 * step["forget_loss"] for step in steps)


def test_tensors_with_a_scale_of_their_own(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--metric", "retain", "--scope", "parameter", "--lr", "1e-3"]
    run_here(monkeypatch, home, tmp_path, "--steps", "2", "--no-model", *options)
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert len(set(steps[1]["forget_coefficient"])) == len(steps[1]["forget_coefficient"]) > 1


def test_the_command_line_is_met_before_the_slow_imports(tmp_path: Path) -> None:
    """torch is made impossible to import: what is told without it was told before."""
    (tmp_path / "torch.py").write_text("raise SystemExit(99)")
    for more, code, text in ((["--help"], 0, "--retain-weight"), ([], 2, "--forget: there is no file no.jsonl")):
        command = [sys.executable, str(SCRIPT), "--model", "m", "--forget", "no.jsonl", "--retain", "no.jsonl", *more]
        ended = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60)
        assert ended.returncode == code, ended.stderr
        assert text in ended.stdout + ended.stderr


LINES = {
    "no JSON": ("{", r"x.jsonl:2: the line must be one JSON object. Expecting"),
    "no object": ("[1]", r"x.jsonl:2: the line must be one JSON object, got \[1\]"),
    "no field": ('{"a": 1}', r'x.jsonl:2: field "text" must be a string, got no such field, only \["a"\]'),
    "a number": ('{"text": 7}', r'x.jsonl:2: field "text" must be a string, got 7'),
    "bytes": (b"\xff", r"x.jsonl:2: the line must be UTF-8 text, but byte 0 is not"),
}


@pytest.mark.parametrize(("line", "message"), LINES.values(), ids=LINES.keys())
def test_a_wrong_line_is_named(line: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(InputError, match=message):
        list(read_texts("--forget", str(path), 100))


def test_text_is_cut_at_line_ends() -> None:
    text = "one\ntwo\n\nthree\n" + "x" * 20 + "\nfour\n"
    assert list(passages(text, 9)) == ["one\ntwo", "three", "x" * 20, "four"]
    assert list(passages(text, 1000)) == [text.strip()]


def test_a_text_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"ab\xff")
    with pytest.raises(InputError, match=r"x.txt: the file must be UTF-8 text, but byte 2 is not"):
        list(read_texts("--retain", str(tmp_path / "x.txt"), 100))


def test_a_corpus_is_filtered_cut_and_split(home: Path) -> None:
    tokenizer = load_tokenizer(home / "llama")
    source = str(home / "bio.jsonl")
    texts = list(read_texts("--forget", source, 100))
    corpus = read_corpus("--forget", source, tokenizer, 6, held_out=5, batch=2)
    encoded = [tokenizer(text)["input_ids"][:6] for text in texts]
    assert corpus.name == "bio"
    assert corpus.held_out == encoded[::4]
    assert corpus.train == [ids for i, ids in enumerate(encoded) if i % 4]
    limit = sorted(map(len, texts))[5]
    fewer = read_corpus("--forget", source, tokenizer, 6, held_out=1, batch=2, min_chars=limit)
    assert len(fewer.train) + 1 == sum(len(text) > limit for text in texts) < 20


HUB = {
    "cais/wmdp-corpora:cyber-forget-corpus": Hub("cais/wmdp-corpora", "cyber-forget-corpus", "train", "text"),
    "wikitext:wikitext-2-raw-v1:test": Hub("wikitext", "wikitext-2-raw-v1", "test", "text"),
    "a/b::validation:body": Hub("a/b", None, "validation", "body"),
    "a/b": Hub("a/b", None, "train", "text"),
}


@pytest.mark.parametrize(("source", "hub"), HUB.items(), ids=HUB.keys())
def test_hub_names(source: str, hub: Hub) -> None:
    assert is_hub_name(source)
    assert Hub.parse("--forget", source, "train") == hub


@pytest.mark.parametrize("source", ["nowhere.jsonl", "folder/file.jsonl", "./a/b", "~/a", "a/b/c", "nowhere"])
def test_paths_are_not_hub_names(source: str) -> None:
    assert not is_hub_name(source)


def test_rows_of_the_hub_are_read_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any, split: str) -> list[dict[str, Any]]:
        asked.append((*names, split))
        return [{"body": "fine"}, {"body": None}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    texts = read_texts("--retain", "a/b:c:test:body", 100)
    assert next(texts) == "fine"
    with pytest.raises(InputError, match=r'a/b, split test, row 2: field "body" must be a string, got null'):
        next(texts)
    assert asked == [("a/b", "c", "test")]
    with pytest.raises(InputError, match=r"--retain: a:b:c:d:e must have at most four parts, NAME:CONFIG:SPLIT:FIELD"):
        next(read_texts("--retain", "a:b:c:d:e", 100))


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nmany more lines")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"--questions: cais/wmdp is no file here, .* hub failed: no route$"):
        next(read_records("--questions", "cais/wmdp:wmdp-bio"))


def documented() -> list[list[str]]:
    """Return the arguments of every command of the script in its documentation."""
    blocks = re.findall(r"```bash\n(.*?)```", DOCS.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line.partition("wmdp_rmu.py")[2], comments=True) for line in lines if "wmdp_rmu.py" in line]


def test_documented_commands_are_understood() -> None:
    commands = [parse_options(command) for command in documented()]
    assert len(commands) >= 3
    paper = commands[0]
    assert paper.model == "HuggingFaceH4/zephyr-7b-beta"
    assert all(is_hub_name(source) for source in (paper.retain, paper.forget[1]))
    settings = (paper.layer, paper.layers, paper.steering, paper.retain_weight, paper.lr, paper.steps, paper.batch)
    assert settings == (7, [5, 6, 7], [6.5, 6.5], 800, 5e-5, 150, 4)
    assert {command.rule for command in commands} >= {"blur", "weighted_sum"}
