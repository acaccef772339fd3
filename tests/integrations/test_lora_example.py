"""examples/lora.py runs to its end, untrained and for two steps."""

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="peft is not installed")

EXAMPLES = Path(__file__).parents[2] / "examples"


# peft 0.21 reads the older of two names that transformers 5.23 has for it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["lora.py", "--out", str(tmp_path), "--epochs", "1", "--steps", "2"])
    runpy.run_path(str(EXAMPLES / "lora.py"), run_name="__main__")
    printed = {line[:30].strip(): line[34:] for line in capsys.readouterr().out.splitlines()}
    assert printed["before"] == printed["adapter off"]
    assert printed["with the adapter"] == printed["merged"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "merged" / "model.safetensors").exists()
