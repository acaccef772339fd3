"""BLURTrainer and BLURModule in two processes (DDP and FSDP2, gloo)."""

import json
from pathlib import Path

import pytest
import torch
from forking import Script
from hand_written import train
from tiny import collate, rows, tiny_llama, tiny_lora
from trainer_script import accelerate_block

pytest.importorskip("transformers", reason="transformers is not installed")

HERE = Path(__file__).parent
FORGET, RETAIN = rows(5, 1), rows(16, 2)


def launch(script, folder, *arguments):
    """Run the script in two processes that meet as under a launcher."""
    Script(HERE / script, [str(folder), *arguments], folder / "printed", processes=2).finish()


def assert_trained_as(expected, folder, file="model.pt"):
    for name, value in torch.load(folder / file).items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-5, atol=1e-6)


# peft 0.21 reads the older of two names that transformers 5.23 has for it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_trainer(tmp_path, way):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    launch("trainer_script.py", tmp_path, way)

    # Batches go to the processes in turn: two micro-batches of two processes are the four of one.
    expected = tiny_llama()
    statistics = train(expected, tiny_llama(), FORGET, RETAIN, steps=3, accumulate=4, max_norm=0.5)
    assert_trained_as(expected, tmp_path)
    logs = json.loads((tmp_path / "logs.json").read_text())
    assert logs[-2]["blur_cosine"] == pytest.approx(float(statistics.cosine), rel=1e-3)
    # The reference was computed by both, each a part, and stands in one file.
    assert json.loads((tmp_path / "stored.json").read_text()) == len(FORGET)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["reference.safetensors"]
    if way == "fsdp":
        expected = tiny_lora(fresh=True)
        train(expected, tiny_llama(), FORGET, RETAIN, ("npo", "kl"), steps=3, accumulate=4, max_norm=0.5)
        assert_trained_as(expected, tmp_path, "lora.pt")
        expected, options = tiny_llama(), {"metric": "retain", "gamma": 0.3}
        train(expected, tiny_llama(), FORGET, RETAIN, steps=3, accumulate=4, max_norm=0.5, **options)
        assert_trained_as(expected, tmp_path, "metric.pt")
        # A loop by hand with accelerate, as in the documentation: the four micro-batches of one process.
        here = {"model": tiny_llama(), "collator": collate, "forget_rows": rows(16, 1), "retain_rows": rows(16, 2)}
        exec(accelerate_block(accumulate=4), here)
        assert_trained_as(here["model"], tmp_path, "accelerate.pt")


def test_lightning(tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed")
    launch("lightning_ddp_script.py", tmp_path)
    expected = tiny_llama()
    train(expected, None, FORGET, RETAIN, ("ga", "nll"), steps=2, accumulate=4, max_norm=0.5)
    assert_trained_as(expected, tmp_path)
