"""The code blocks of docs/integrations.md and docs/faq.md run as they stand, in order, on a small model."""

import re
from pathlib import Path

import pytest
import torch
from tiny import collate, parameters, rows, tiny_llama

pytest.importorskip("transformers", reason="transformers is not installed")

DOCS = Path(__file__).parents[2] / "docs" / "integrations.md"
BLOCK = re.compile(r"<!-- test: (\S+) -->\n```(\w+)\n(.*?)```", flags=re.DOTALL)
BLOCKS = BLOCK.findall(DOCS.read_text(encoding="utf-8"))


def blocks(mark):
    return [code for name, _, code in BLOCKS if name == mark]


def run(code, names):
    exec(compile(code, str(DOCS), "exec"), dict(names))  # A block sees nothing of the others.


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {"model": tiny_llama(), "forget_rows": rows(8, 1), "retain_rows": rows(16, 2), "collator": collate}


def test_every_block_is_marked():
    assert len(BLOCKS) == DOCS.read_text(encoding="utf-8").count("```") / 2 == 10


def test_muon_and_adamw(names):
    page = DOCS.with_name("faq.md")
    (code,) = [code for name, _, code in BLOCK.findall(page.read_text(encoding="utf-8")) if name == "faq"]
    scope = dict(names)
    exec(compile(code, str(page), "exec"), scope)
    model, opt, batch = names["model"], scope["opt"], collate(names["forget_rows"])
    assert sum(len(group["params"]) for group in opt.param_groups) == len(list(model.parameters()))
    before = parameters(model)
    opt.step(lambda: -model(**batch).loss, lambda: model(**collate(names["retain_rows"])).loss)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# Two that a user sees too: the Trainer looks for a GPU to pin memory for, and peft for an attribute's older name.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_trainer_peft_and_accelerate(names, tmp_path, capsys):
    pytest.importorskip("peft", reason="peft is not installed")
    trainer, lora, accelerate = blocks("integrations")
    before = parameters(names["model"])
    run(trainer, names)
    assert "eval_forget_loss" in capsys.readouterr().out
    assert not any(torch.equal(p, b) for p, b in zip(names["model"].parameters(), before, strict=True))
    run(lora, names)
    assert (tmp_path / "merged" / "model.safetensors").exists()
    names["model"] = tiny_llama()
    before = parameters(names["model"])
    run(accelerate, names)
    assert not any(torch.equal(p, b) for p, b in zip(names["model"].parameters(), before, strict=True))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*The number of training batches")
def test_lightning(names):
    pytest.importorskip("lightning", reason="lightning is not installed")
    (code,) = blocks("lightning")
    before = parameters(names["model"])
    run(code, names)
    assert not any(torch.equal(p, b) for p, b in zip(names["model"].parameters(), before, strict=True))
