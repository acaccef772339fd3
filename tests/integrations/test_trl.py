"""TRL: the block of docs/integrations.md runs as it stands, and trains as by hand on what SFTTrainer made of the chats."""

import pytest
from chats import chats, word_tokenizer
from hand_written import train
from test_integrations_docs import blocks
from test_processes import torch
from tiny import tiny_llama

pytest.importorskip("trl", reason="trl is not installed")

ARGUMENTS = """max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, weight_decay=0.1,
    lr_scheduler_type="constant", max_grad_norm=0.5, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no","""


@pytest.mark.filterwarnings("ignore")  # Of TRL and datasets.
def test_chats_with_assistant_masks(tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    names = {"model": tiny_llama(), "tokenizer": word_tokenizer()}
    names |= {side: Dataset.from_list(chats(*of)) for side, of in (("forget_chats", (5, 1)), ("retain_chats", (16, 2)))}
    (code,) = blocks("trl")
    for placeholder, there in (("learning_rate=1e-5", f"learning_rate=1e-3, {ARGUMENTS}"), ("max_length=1024", "max_length=32, use_cpu=True, bf16=False, report_to=[]")):
        assert placeholder in code
        code = code.replace(placeholder, there)
    exec(compile(code, "docs/integrations.md", "exec"), names)
    prepared = names["prepared"]
    rows = [[{**row, "attention_mask": [1] * len(row["input_ids"])} for row in of.select_columns(["input_ids", "labels"])]
            for of in (prepared.eval_dataset, prepared.train_dataset)]
    asked = [row["labels"][: len(row["labels"]) // 3] for row in rows[0]]
    assert all(label == -100 for labels in asked for label in labels)  # The questions are masked.
    assert all(row["labels"][-1] == row["input_ids"][-1] for row in rows[0])
    expected = tiny_llama()
    train(expected, tiny_llama(), *rows, steps=3, accumulate=2, max_norm=0.5)
    for p, e in zip(names["model"].parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, e, rtol=1e-5, atol=1e-6)
