"""BLURTrainer's record: a line for each step with what the step saw, also over checkpoints."""

import json

import pytest
import torch
from tiny import collate, rows, tiny_llama

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from blur_optim.integrations.record import RecordCallback
from blur_optim.integrations.transformers import BLURTrainer, BLURTrainingArguments
from blur_optim.record import read_record


def trainer(folder, **changes):
    options = {
        "forget_loss": "ga",
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    args = BLURTrainingArguments(str(folder), **{**options, **changes})
    return BLURTrainer(tiny_llama(), args, collate, forget_dataset=rows(4, 1), retain_dataset=rows(8, 2))


def test_a_line_for_each_step_agrees_with_the_log(tmp_path):
    path = tmp_path / "run.jsonl"
    made = trainer(tmp_path, record=str(path), record_alignment=True, gradient_accumulation_steps=2)
    made.train()
    record = read_record(path)
    logs = [entry for entry in made.state.log_history if "forget_loss" in entry]
    assert [line["step"] for line in record.steps] == [entry["step"] for entry in logs] == [1, 2, 3, 4]
    for line, entry in zip(record.steps, logs, strict=True):
        assert line["forget_loss"] == pytest.approx(entry["forget_loss"], rel=1e-6)
        assert line["retain_loss"] == pytest.approx(entry["retain_loss"], rel=1e-6)
        assert line["cosine"] == pytest.approx(entry["blur_cosine"], rel=1e-9)
    # The rate that the step was taken with; the log has the next.
    assert [line["lr"] for line in record.steps] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    names = record.metadata["parameters"]
    assert set(names) == {name for name, _ in made.model.named_parameters()}
    assert len(record.steps[0]["alignment"]["cosine"]) == len(names)


def test_every(tmp_path):
    trainer(tmp_path, record=str(tmp_path / "run.jsonl"), record_every=3).train()
    record = read_record(tmp_path / "run.jsonl")
    assert [line["step"] for line in record.steps] == [1, 3]
    assert "alignment" not in record.steps[0]


def test_a_resumed_run_goes_on_at_the_checkpoint(tmp_path):
    path = tmp_path / "run.jsonl"
    options = {"record": str(path), "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, **options).train()
    before = read_record(path).steps
    torch.manual_seed(5)
    trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    after = read_record(path).steps
    assert [line["step"] for line in after] == [1, 2, 3, 4]
    assert after[1] == before[1]
    assert after[3]["time"] > before[3]["time"]
    assert after[3]["forget_loss"] == pytest.approx(before[3]["forget_loss"], rel=1e-5)


def test_as_a_callback_on_a_run_that_fails_and_begins_anew(tmp_path):
    path = tmp_path / "run.jsonl"
    made = trainer(tmp_path)
    made.add_callback(RecordCallback(made, path))
    compute, calls = made.compute_retain_loss, []

    def failing(model, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return compute(model, batch)

    made.compute_retain_loss = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        made.train()
    assert [json.loads(line).get("step") for line in path.read_text().splitlines()] == [None, 1, 2]
    made.train()
    assert [line["step"] for line in read_record(path).steps] == [1, 2, 3, 4]
