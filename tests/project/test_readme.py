"""The code blocks of the README run as they stand, in order, on a small model."""

import re
from pathlib import Path

import torch
from torch import nn

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"<!-- test: readme -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


class Output:
    def __init__(self, logits):
        self.logits = logits


class TinyLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, input_ids):
        return Output(self.head(self.embedding(input_ids)))


def test_every_python_block_is_marked():
    assert len(BLOCKS) == README.read_text(encoding="utf-8").count("```python") == 2


def test_the_blocks_run(capsys):
    def batch():
        tokens = torch.randint(0, 11, (3, 6))
        return {"input_ids": tokens}, tokens

    model = TinyLM()
    (f_inputs, f_labels), (r_inputs, r_labels) = batch(), batch()
    names = {
        "model": model,
        "f_inputs": f_inputs,
        "f_labels": f_labels,
        "r_inputs": r_inputs,
        "r_labels": r_labels,
        "f_reference_log_probs": torch.full((3,), -14.0),
        "forget_batches": [batch(), batch()],
        "retain_batches": [batch()],
    }
    before = [p.detach().clone() for p in model.parameters()]
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
    assert "cosine" in capsys.readouterr().out
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert float(names["forget_loss"]) > 0
    assert all(p.grad is None for p in model.parameters())
