"""TRL: the block of docs/integrations.md runs as it stands, and trains as by hand on what SFTTrainer makes of chats."""

import pytest
import torch
from chats import chats, word_tokenizer
from hand_written import train
from test_integrations_docs import blocks
from tiny import tiny_llama

pytest.importorskip("trl", reason="trl is not installed")

#: What is put into the block, after its own arguments, to have it run here.
ADDED = {
    "max_length=1024": "use_cpu=True, bf16=False, report_to=[]",
    "learning_rate=1e-5": "weight_decay=0.1, lr_scheduler_type='constant', max_grad_norm=0.5, max_steps=3,"
    "per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy='no',"
    "use_cpu=True, report_to=[], disable_tqdm=True",
}


def rows_of(prepared):
    return [
        {**row, "attention_mask": [1] * len(row["input_ids"])}
        for row in prepared.select_columns(["input_ids", "labels"])
    ]


@pytest.mark.filterwarnings("ignore")  # Of TRL and datasets.
@pytest.mark.parametrize("options", [{}, {"metric": "retain", "gamma": 0.3}], ids=["euclidean", "retain metric"])
def test_chats_with_assistant_masks(tmp_path, monkeypatch, options):
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    names = {"model": tiny_llama(), "tokenizer": word_tokenizer()}
    names["forget_chats"], names["retain_chats"] = (Dataset.from_list(chats(*of)) for of in ((5, 1), (16, 2)))
    (code,) = blocks("trl")
    for own, added in ADDED.items():
        assert own in code
        code = code.replace(own, f"{own}, {added}")
    code = code.replace("learning_rate=1e-5", f"**{options}, learning_rate=1e-5")
    exec(compile(code, "docs/integrations.md", "exec"), names)
    forget, retain = rows_of(names["prepared"].eval_dataset), rows_of(names["prepared"].train_dataset)
    for row, chat in zip(forget, chats(5, 1), strict=True):
        answer = names["tokenizer"](chat["messages"][1]["content"])["input_ids"]
        # Only the answer is trained on, and the end of the turn.
        assert [label for label in row["labels"] if label != -100] == [*answer, names["tokenizer"].eos_token_id]
    expected = tiny_llama()
    train(expected, tiny_llama(), forget, retain, steps=3, accumulate=2, max_norm=0.5, lr=1e-5, **options)
    for p, e in zip(names["model"].parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, e, rtol=1e-6, atol=1e-8)
