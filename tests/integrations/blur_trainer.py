"""A small BLURTrainer, for the tests of what it does."""

import pytest
import torch
from tiny import collate, rows, tiny_llama

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from blur_optim.integrations.transformers import BLURTrainer, BLURTrainingArguments

FORGET, RETAIN = rows(5, 1), rows(9, 2)
PREFERENCES = [{"chosen": c, "rejected": r} for c, r in zip(rows(5, 3), FORGET, strict=True)]


def arguments(folder, **changes):
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return BLURTrainingArguments(str(folder), **{**options, **changes})


def trainer(folder, model=None, forget=FORGET, retain=RETAIN, *, more=None, cls=BLURTrainer, **changes):
    return cls(
        tiny_llama() if model is None else model,
        arguments(folder, **changes),
        collate,
        forget_dataset=forget,
        retain_dataset=retain,
        **(more or {}),
    )


def assert_same(model, other, rtol=1e-5):
    # Two ways through the same float32 operations: fused or foreach AdamW, a padded batch or two.
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol * 1e-1)
