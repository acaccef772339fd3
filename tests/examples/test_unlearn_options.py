"""Options of examples/unlearn.py, what wrong ones are told, and that its documentation is true."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import unlearn
from knowing import know
from quickstart_lib.data import load_rows
from shared_lib import method
from shared_lib.errors import InputError
from shared_lib.models import save_small_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from unlearn_lib import options as options_module
from unlearn_lib.options import as_settings, parse_options
from unlearn_lib.rows import KINDS, parse_row
from unlearn_lib.run_folder import RunFolder, write_json
from unlearn_lib.sources import check_files

from blur_optim.integrations.objectives import FORGET_LOSSES, RETAIN_LOSSES, TEMPERED_LOSSES
from blur_optim.integrations.transformers import BLURTrainingArguments
from blur_optim.step.rules import RULES
from blur_optim.step.settings import METRICS

DOCS = Path(__file__).parents[2] / "docs" / "unlearn.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
COMMANDS = [
    shlex.split(line)
    for language, text in BLOCKS
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
    if "unlearn.py" in line
]
NEEDED = ["--model", "m", "--forget", "f.jsonl", "--retain", "r.jsonl"]


def test_names_are_those_of_the_library() -> None:
    assert tuple(RULES) == method.RULES
    assert method.METRICS == METRICS
    assert set(method.WITHOUT_BETA) == set(FORGET_LOSSES) - set(TEMPERED_LOSSES)
    assert set(options_module.METHODS) == set(FORGET_LOSSES) - {"idk"}
    assert options_module.RETAIN_LOSSES == RETAIN_LOSSES
    helps = {field.name: field.metadata.get("help", "") for field in fields(BLURTrainingArguments)}
    for name, choices in (("scope", method.SCOPES), ("stash", options_module.STASHES)):
        assert re.findall(r"'(\w+)'", helps[name]) == list(choices)


def test_defaults() -> None:
    assert parse_options(NEEDED).lr == 1e-5
    assert parse_options([*NEEDED, "--lora", "8"]).lr == 1e-4
    plain, metric = parse_options(NEEDED), parse_options([*NEEDED, "--metric", "retain"])
    assert (plain.max_grad_norm, plain.damping) == (1.0, 0.01)
    assert (metric.max_grad_norm, metric.damping) == (0.0, 0.01)  # There a limit is a smaller learning rate.
    assert parse_options([*NEEDED, "--metric", "retain", "--max-grad-norm", "2", "--damping", "0"]).max_grad_norm == 2
    settings = as_settings(parse_options([*NEEDED, "--eval", "a=b=c", "--overwrite"]))
    assert settings["eval"] == [["a", "b=c"]]
    assert not {"out", "overwrite", "dry_run"} & set(settings)
    json.dumps(settings)


def test_every_option_is_explained_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    text = capsys.readouterr().out
    entries = re.split(r"\n  (?=--)", text.partition("\nmodel:")[2].partition("\nexamples:")[0])[1:]
    assert len(entries) == len(vars(parse_options(NEEDED)))
    for entry in entries:
        words = " ".join(entry.split())
        takes_a_value = re.match(r"--[\w-]+ [A-Z{]", words)
        required = words.startswith(("--model ", "--forget ", "--retain "))
        assert required or not takes_a_value or "(default: " in words, words


INVALID = {
    "number": (["--epochs", "0"], "--epochs: must be a positive number, got '0'"),
    "nan": (["--lr", "nan"], "--lr: must be a positive number, got 'nan'"),
    "whole": (["--batch-size", "1.5"], "--batch-size: must be a whole number of at least 1, got '1.5'"),
    "fraction": (["--eval-fraction", "1"], "--eval-fraction: must be a number of at least 0 and less than 1, got '1'"),
    "choice": (["--method", "rmu"], "--method: invalid choice: 'rmu'"),
    "eval": (["--eval", "x.jsonl"], "--eval: must be NAME=FILE_OR_NAME, got 'x.jsonl'"),
    "eval twice": (["--eval", "a=x", "--eval", "a=y"], "--eval: each set must have a name of its own, got 'a' twice"),
    "eval reserved": (["--eval", "forget=x"], "each set must have a name of its own, got 'forget' twice"),
    "adapter": (["--keep-adapter"], "--keep-adapter: needs --lora R"),
    "embeddings": (["--lora-embeddings"], "--lora-embeddings: needs --lora R"),
    "alpha": (["--lora-alpha", "3"], "--lora-alpha: needs --lora R"),
    "adapter's dtype": (["--lora", "2", "--keep-adapter", "--save-dtype", "float16"], "--save-dtype: an adapter is"),
    "beta": (["--method", "ga", "--beta", "1"], "--beta: --method ga has none"),
    "beta of margin": (["--method", "margin", "--beta", "1"], "--beta: --method margin has none"),
    "damping": (["--damping", "0.1"], "--damping: needs --metric retain"),
    "metric": (["--metric", "fisher"], "--metric: invalid choice: 'fisher'"),
    "abbreviated": (["--gam", "1"], "unrecognized arguments: --gam"),
}


@pytest.mark.parametrize(("more", "message"), INVALID.values(), ids=INVALID.keys())
def test_an_invalid_option_ends_with_code_2(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options([*NEEDED, *more])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama that knows the rows to forget in a folder of the name that the documentation has, and rows."""
    folder = tmp_path_factory.mktemp("unlearn_docs")
    rows = load_rows(None, 4, 0)
    save_small_llama(folder / "my-model", rows, 0)
    for name, part in (
        ("forget", rows[-4:]),
        ("retain", rows[:4]),
        ("paraphrases", rows[30:32]),
        ("holdout", rows[20:24]),
    ):
        lines = (json.dumps({"question": row.question, "answer": row.answer}) for row in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    know(folder / "my-model", folder / "forget.jsonl", folder / "my-model")
    return folder


WRONG = {
    "no file": (["--forget", "nowhere.jsonl"], "^--forget: there is no file nowhere.jsonl"),
    "no eval file": (["--eval", "x=./nowhere"], "^--eval x: there is no file ./nowhere"),
    "no folder": (["--model", "./nowhere"], "^--model: there is no folder ./nowhere"),
    "no model": (["--model", "empty"], "^--model: empty could not be loaded: "),
    "no name": (
        ["--model", "nofolder"],
        "^--model: nofolder could not be loaded: .* There is no folder of that name here",
    ),
    "no gguf": (["--gguf-file", "x.gguf"], "^--gguf-file: there is no file x.gguf in my-model"),
    "gguf alone": (["--model", "only-gguf"], "could not be loaded: .* try --gguf-file a.gguf"),
    "broken gguf": (["--model", "only-gguf", "--gguf-file", "a.gguf"], "^--model: only-gguf could not be loaded: "),
    "quantized": (["--model", "quantized"], "^--model: quantized must not be quantized"),
    "length": (["--max-length", "5000"], "^--max-length: must be at most 1024, .* got 5000"),
    "prompt": (["--max-length", "8"], r"^--forget: forget.jsonl:1: a token to predict .* --max-length, 8 tokens"),
    "out is a file": (["--out", "forget.jsonl"], "^--out: forget.jsonl must be a folder, and is a file"),
    "out is not ours": (["--out", "my-model", "--overwrite"], "^--out: my-model must be empty or hold a run of this"),
}


@pytest.mark.parametrize(("more", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_explained(more: list[str], message: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    for name in ("empty", "only-gguf", "quantized"):
        Path(name).mkdir(exist_ok=True)
    Path("only-gguf/a.gguf").write_bytes(b"GGUF")
    config = LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4})
    config.save_pretrained("quantized")
    files = ["--model", "my-model", "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--out", "x", "--cpu"]
    monkeypatch.setattr(sys, "argv", ["unlearn.py", *files, *more])
    with pytest.raises(InputError, match=message):
        unlearn.main()
    assert not Path("x").exists()
    assert (home / "my-model" / "config.json").exists()


def test_rows_are_no_longer_than_the_model_reads(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(home / "my-model")
    AutoTokenizer.from_pretrained(home / "my-model").save_pretrained(tmp_path / "short")
    for limit, expected in ((128, 128), (1024, 512)):
        model.config.max_position_embeddings = limit
        model.save_pretrained(tmp_path / "short")
        files = ["--forget", str(home / "forget.jsonl"), "--retain", str(home / "retain.jsonl")]
        more = ["--model", str(tmp_path / "short"), "--out", str(tmp_path / "x"), "--cpu", "--dry-run"]
        monkeypatch.setattr(sys, "argv", ["unlearn.py", *files, *more])
        unlearn.main()
        assert f"max_length: {expected}" in capsys.readouterr().out


def test_missing_files_are_met_before_the_slow_imports(home: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, unlearn.__file__, *NEEDED]
    path = {"PYTHONPATH": str(Path(unlearn.__file__).parent)}
    done = subprocess.run(command, cwd=home, env=path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, "Error: --forget: there is no file f.jsonl.\n")


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, {})
    assert folder.checkpoint() is None
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"half'), (14, None)):
        (tmp_path / "training" / f"checkpoint-{step}").mkdir(parents=True)
        if state is not None:
            (tmp_path / "training" / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert folder.checkpoint() == tmp_path / "training" / "checkpoint-10"


def test_another_run_in_the_folder_is_told_by_what_differs(tmp_path: Path) -> None:
    def facts(lr: float, sha: str, processes: int = 1) -> dict:
        data = {"--forget": {"source": "f.jsonl", "sha256": sha}}
        return {"settings": {"lr": lr}, "data": data, "processes": processes}

    RunFolder(tmp_path, facts(0.1, "a")).claim(overwrite=False)
    RunFolder(tmp_path, facts(0.1, "a")).check(overwrite=False)
    with pytest.raises(InputError, match=r"--lr was 0.1, now 0.2; the rows of --forget have changed; it had 1 proc"):
        RunFolder(tmp_path, facts(0.2, "b", 2)).check(overwrite=False)
    RunFolder(tmp_path, facts(0.2, "b")).check(overwrite=True)
    RunFolder(tmp_path, facts(0.2, "b")).claim(overwrite=True)
    RunFolder(tmp_path, facts(0.2, "b")).check(overwrite=False)


def test_a_folder_in_which_nothing_has_begun_is_released(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out", {"settings": {}})
    folder.claim(overwrite=False)
    write_json(folder.before, {})
    folder.release()
    assert not folder.path.exists()
    folder.claim(overwrite=False)
    folder.log.write_text("")
    folder.release()
    assert (folder.path / "run.json").is_file()


def test_the_documentation_shows_each_kind_of_row() -> None:
    rows = [json.loads(line) for language, text in BLOCKS if language == "json" for line in text.splitlines()]
    assert [parse_row(("docs", row), "docs").kind for row in rows] == list(KINDS)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command)[:40])
def test_the_documentation_s_commands_run(
    command: list[str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    place = next(i for i, word in enumerate(command) if word.endswith("unlearn.py"))
    words = command[place + 1 :]
    check_files(parse_options(words))
    if "--lora" in words:
        pytest.importorskip("peft", reason="peft is not installed")
    more = ["--out", str(tmp_path / "out"), "--max-steps", "1", "--generate-rows", "1", "--cpu"]
    monkeypatch.setattr(sys, "argv", ["unlearn.py", *words, *more])
    unlearn.main()
    assert "--dry-run" in words or (tmp_path / "out" / "model" / "README.md").is_file()


def test_the_documentation_has_commands() -> None:
    assert len(COMMANDS) >= 3
