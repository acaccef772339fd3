"""Unlearning under FSDP2: loading and exporting shards, killing and resuming, and what wrong input is told."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsdp2
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from forking import Script
from fsdp2_lib import checkpoint, processes
from fsdp2_lib.data import Example, micro_batches, read_examples, rows_of_step
from fsdp2_lib.options import parse_options
from quickstart_lib.data import load_rows
from safetensors.torch import load_file
from shared_lib.errors import InputError
from shared_lib.models import save_small_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, MixtralConfig

from blur_optim.losses import logit_margin_loss

FSDP2 = Path(fsdp2.__file__)
CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--micro-batch", "2", "--length", "48", "--lr", "1e-3", "--warmup", "4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama of tied embeddings, and lines to forget and to retain."""
    folder = tmp_path_factory.mktemp("fsdp2")
    rows = load_rows(None, 4, 0)
    save_small_llama(folder / "llama", rows, 0)
    for name, part in (("forget", rows[-20:]), ("retain", rows[:30])):
        lines = (json.dumps({"question": row.question, "answer": row.answer}) for row in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def _alone() -> Iterator[None]:
    """``main`` joins a process group; it leaves it in ``run``, which the tests in this process do not call."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def arguments(home: Path, out: Path, *more: str) -> list[str]:
    files = ["--forget", str(home / "forget.jsonl"), "--retain", str(home / "retain.jsonl")]
    return ["--model", str(home / "llama"), *files, "--out", str(out), *SMALL, *more]


def torchrun(home: Path, out: Path, *more: str, max_restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [f"--max-restarts={max_restarts}", str(FSDP2)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *arguments(home, out, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def run_here(monkeypatch: pytest.MonkeyPatch, home: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["fsdp2.py", *arguments(home, out, *more)])
    fsdp2.main()
    dist.destroy_process_group()
    return log_of(out)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(next((out / "model").glob("*.safetensors")))


def assert_same_course(actual: list[dict[str, Any]], expected: list[dict[str, Any]], rel: float) -> None:
    names = ("step", "forget_loss", "retain_loss", "forget_norm", "retain_norm", "forget_coefficient", "lr")
    names += tuple(name for name in expected[0] if name.startswith("metric_"))
    for one, other in zip(actual, expected, strict=True):
        for name in names:  # A coefficient is a list where each tensor has its own.
            assert one[name] == pytest.approx(other[name], rel=rel), name


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc, to find the processes of torchrun")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.usefixtures("_alone")
def test_two_processes_that_are_killed_go_on_as_if_they_had_not_been(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    last = kill_after_a_checkpoint(torchrun(home, killed, "--steps", "9999", "--save-every", "2"), killed)
    steps = ["--steps", str(last + 2)]
    resumed, through = (
        Script(FSDP2, arguments(home, out, *more), tmp_path / f"printed-{out.name}", processes=2)
        for out, more in ((killed, [*steps, "--resume"]), (whole, steps))
    )
    assert f"step {last + 2:>5}  forget" in through.finish()
    assert f"resumed from {killed}/checkpoints/step-{last:08d}" in resumed.finish()
    assert [record["step"] for record in log_of(killed)] == list(range(1, last + 3))
    assert_same_course(log_of(killed), log_of(whole), rel=0)
    weights = [weights_of(out) for out in (killed, whole)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert log_of(whole)[-1]["forget_loss"] < 0.9 * log_of(whole)[0]["forget_loss"]
    assert log_of(whole)[-1]["tokens_per_second"] > 0
    assert_export_is_the_checkpoint(whole, home / "llama")
    # One process takes the same steps as two.
    alone = run_here(monkeypatch, home, tmp_path / "alone", "--steps", "3")
    assert_same_course(alone, log_of(whole)[:3], rel=1e-4)
    # And goes on where two have stopped.
    assert [record["step"] for record in run_here(monkeypatch, home, whole, "--steps", str(last + 3), "--resume")] == [
        *range(1, last + 4)
    ]


def kill_after_a_checkpoint(process: subprocess.Popen[str], out: Path) -> int:
    """Kill one of the two processes, after which torchrun ends the other. Return the step of the last checkpoint."""
    kill_one_of(process, out)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    found = checkpoint.latest(out)
    assert found, output
    return int(found.name.removeprefix("step-"))


def kill_one_of(process: subprocess.Popen[str], out: Path) -> None:
    """Kill one of the two processes once there is a checkpoint."""
    deadline = time.monotonic() + 120
    while checkpoint.latest(out) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc, to find the processes of torchrun")
def test_torchrun_restarts_after_a_process_has_died(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = torchrun(home, out, "--steps", "40", "--save-every", "2", max_restarts=1)
    kill_one_of(process, out)
    assert "resumed from" in finish(process)
    assert [record["step"] for record in log_of(out)] == list(range(1, 41))


def assert_export_is_the_checkpoint(out: Path, original: Path) -> None:
    exported = AutoModelForCausalLM.from_pretrained(out / "model")
    model = AutoModelForCausalLM.from_pretrained(original)
    state = {"model": {name: torch.empty_like(p) for name, p in model.named_parameters()}}
    dcp.load(state, checkpoint_id=checkpoint.latest(out), no_dist=True)
    ids = torch.arange(20).view(1, -1)
    before = model(input_ids=ids).logits
    model.load_state_dict(state["model"], strict=False)
    after = model(input_ids=ids).logits
    assert torch.equal(exported(input_ids=ids).logits, after)
    assert not torch.allclose(before, after, atol=1e-2)
    assert len(AutoTokenizer.from_pretrained(out / "model")) == exported.config.vocab_size


@pytest.mark.usefixtures("_alone")
def test_memory_options_do_not_change_the_course(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_here(monkeypatch, home, tmp_path / "plain", "--steps", "2")
    options = ["--stash", "recompute", "--reference", "model", "--sync-each", "--no-checkpointing"]
    saving = ["--save-every", "1", "--keep", "1"]
    actual = run_here(monkeypatch, home, tmp_path / "lean", "--steps", "2", *options, *saving)
    assert_same_course(actual, expected, rel=1e-4)
    assert [path.name for path in (tmp_path / "lean" / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.usefixtures("_alone")
def test_the_margin_in_the_retain_metric_is_on_two_processes_what_it_is_on_one(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper = ["--steps", "3", "--forget-loss", "margin"]
    metric = [*paper, "--metric", "retain", "--scope", "parameter", "--damping", "0.05"]
    two = Script(FSDP2, arguments(home, tmp_path / "two", *metric), tmp_path / "printed", processes=2)
    plain = run_here(monkeypatch, home, tmp_path / "plain", *paper)
    alone = run_here(monkeypatch, home, tmp_path / "alone", *metric)
    damped = run_here(monkeypatch, home, tmp_path / "damped", *metric, "--damping", "0.5", "--steps", "1")
    two.finish()
    in_metric = {"metric_forget_norm", "metric_retain_norm", "metric_cosine", "effective_share"}
    assert alone[0].keys() - plain[0].keys() == in_metric
    assert_same_course(log_of(tmp_path / "two"), alone, rel=1e-4)
    assert damped[0]["metric_forget_norm"] < 0.9 * alone[0]["metric_forget_norm"]
    assert [log[0]["forget_loss"] for log in (plain, alone)] == pytest.approx([margin_of_the_first_batch(home)] * 2)
    by_two, by_one, euclidean = (weights_of(tmp_path / name) for name in ("two", "alone", "plain"))
    assert by_two.keys() == by_one.keys() == euclidean.keys()
    for name, mine in by_one.items():
        # Two sum in another order: a few roundings of weights of 1, where a step is of 2.5e-4 and more.
        torch.testing.assert_close(by_two[name], mine, rtol=0, atol=1e-6)
        assert (euclidean[name] - mine).abs().max() > 1e-3, name


def margin_of_the_first_batch(home: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(home / "llama")
    examples = read_examples("--forget", home / "forget.jsonl", AutoTokenizer.from_pretrained(home / "llama"), 48)
    (whole,) = micro_batches(examples, rows_of_step(len(examples), 8, 0, 0), 8, 0, 1, CPU)
    with torch.no_grad():
        logits = model(input_ids=whole.batch["input_ids"]).logits
    return float(logit_margin_loss(logits, whole.batch["labels"]))


SMALL_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(vocab_size=99, intermediate_size=48, **SMALL_SHAPE),
    "llama, tied": LlamaConfig(vocab_size=99, intermediate_size=48, tie_word_embeddings=True, **SMALL_SHAPE),
    "gpt2": GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2),
    # Its files hold each expert apart, which transformers merges into one tensor while it loads.
    "mixtral": MixtralConfig(
        vocab_size=99, intermediate_size=48, num_key_value_heads=2, num_local_experts=2, **SMALL_SHAPE
    ),
}


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_weights_come_and_go_unchanged(config: Any, home: Path, tmp_path: Path) -> None:
    expected = AutoModelForCausalLM.from_config(config).eval()
    expected.save_pretrained(tmp_path / "original")
    processes.join("cpu")
    options = parse_options(arguments(home, tmp_path))
    model = fsdp2.make_model(fsdp2.load_config(tmp_path / "original"), options, CPU, trained=True).eval()
    how = fsdp2.load_weights(model, tmp_path / "original", model.config, 0)
    assert how.startswith("the first process" if config.model_type == "mixtral" else "each process")
    ids = torch.arange(20).view(1, -1)
    logits = expected(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, logits)
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    tokenizer = AutoTokenizer.from_pretrained(home / "llama")
    fsdp2.export(model, tokenizer, torch.float32, tmp_path / "original", tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    torch.testing.assert_close(exported(input_ids=ids).logits, logits)


LINES = {
    "no JSON": ("{", r"x.jsonl:2: the line must be one JSON object. Expecting"),
    "no object": ("[1]", r"x.jsonl:2: the line must be one JSON object, got \[1\]"),
    "no field": ('{"a": 1}', r'x.jsonl:2: the object must have the field "text", or .*, got \["a"\]'),
    "half a pair": ('{"prompt": "a"}', r'x.jsonl:2: field "completion" must be a non-empty string, got no such'),
    "a number": ('{"text": 7}', r'x.jsonl:2: field "text" must be a non-empty string, got 7'),
    "empty": ('{"question": "a", "answer": " "}', r'x.jsonl:2: field "answer" must be a non-empty string, got " "'),
    "too long": (json.dumps({"prompt": "a b " * 99, "completion": "c"}), r"x.jsonl:2: something .* within --length, 8"),
}


@pytest.mark.parametrize(("line", "message"), LINES.values(), ids=LINES.keys())
def test_a_wrong_line_is_named(line: str, message: str, home: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine, this one"}\n' + line)
    with pytest.raises(InputError, match=message):
        read_examples("--forget", path, AutoTokenizer.from_pretrained(home / "llama"), 8)


OPTIONS = {
    "no file": (["--forget", "nowhere.jsonl"], "--forget: there is no file nowhere.jsonl"),
    "no model": (["--model", "./nowhere"], "--model: there is no file or folder ./nowhere"),
    "batch": (["--batch", "3"], "--batch must be a multiple of --micro-batch times .* 2 x 1, got 3"),
    "length": (["--length", "5000"], "--length must be at most 1024, .* got 5000"),
}


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(("more", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_wrong_options_are_explained(
    more: list[str], message: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=message):
        run_here(monkeypatch, home, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_alone")
def test_a_run_is_not_mixed_with_another(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch, home, tmp_path, "--steps", "1", "--forget-loss", "ga")
    with pytest.raises(InputError, match=r"--out: .* holds checkpoints of an earlier run. Use --resume"):
        run_here(monkeypatch, home, tmp_path, "--steps", "1")
    dist.destroy_process_group()
    with pytest.raises(InputError, match=r"--resume: --seed must be as in .*, 0, got 1"):
        run_here(monkeypatch, home, tmp_path, "--resume", "--forget-loss", "ga", "--seed", "1")
    dist.destroy_process_group()
    with pytest.raises(InputError, match=r"--resume: the reference of the run, .*, is missing"):
        run_here(monkeypatch, home, tmp_path, "--resume")


@pytest.mark.usefixtures("_alone")
def test_files_that_do_not_fit_their_configuration_are_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(home / "llama")
    model.config.intermediate_size += 1
    model.save_pretrained(tmp_path / "other")
    more = ["--model", str(tmp_path / "other"), "--tokenizer", str(home / "llama")]
    with pytest.raises(InputError, match=r"--model: model.layers.0.mlp.gate_proj.weight must have shape \(353, 128\)"):
        run_here(monkeypatch, home, tmp_path / "out", *more)


@pytest.mark.parametrize(
    "more",
    [
        *(["--steps", "0"], ["--lr", "x"], ["--stash", "fp4"], ["--resume"], ["--damping", "1"]),
        ["--metric", "retain", "--stash", "recompute"],
        ["--forget-loss", "margin", "--beta", "1"],
    ],
)
def test_an_invalid_option_ends_with_code_2(more: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options([*arguments(tmp_path, tmp_path / "out"), *more])
    assert ended.value.code == 2


def test_only_completions_are_learned_and_texts_whole(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "One two"}\n{"prompt": "One", "completion": " two"}\n')
    tokenizer = AutoTokenizer.from_pretrained(home / "llama")
    text, pair = read_examples("--forget", path, tokenizer, 48)
    one, two = tokenizer("One")["input_ids"], tokenizer(" two")["input_ids"]
    assert pair == Example([*one, *two, tokenizer.eos_token_id], len(one))
    assert text.prompt == 0
    assert text.ids[-1] == tokenizer.eos_token_id
    assert pair.predicted == len(two) + 1


def test_every_epoch_holds_every_row_once_in_another_order() -> None:
    rows = [row for step in range(10) for row in rows_of_step(10, 4, step, seed=3)]
    epochs = [rows[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_shares_make_a_mean_over_all_processes() -> None:
    examples = [Example(list(range(length)), 1) for length in (5, 9, 3, 7)]
    parts = [part for rank in range(2) for part in micro_batches(examples, [3, 0, 2, 1], 1, rank, 2, CPU)]
    # FSDP divides by the number of processes.
    assert sum(part.token_share for part in parts) / 2 == pytest.approx(1)
    assert sum(part.example_share for part in parts) / 2 == pytest.approx(1)
    assert [part.token_share / 2 for part in parts] == pytest.approx([6 / 20, 4 / 20, 2 / 20, 8 / 20])
    assert parts[0].batch["labels"].tolist() == [[-100, 1, 2, 3, 4, 5, 6]]
