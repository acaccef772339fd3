"""BLURTrainer under DeepSpeed: two processes against the loop by hand on one."""

import importlib.util
import json

import pytest
from deepspeed_trainer_script import WAYS
from hand_written import train
from test_processes import assert_trained_as, launch
from tiny import rows, tiny_llama

FORGET, RETAIN = rows(5, 1), rows(16, 2)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_trainer(tmp_path):
    launch("deepspeed_trainer_script.py", tmp_path)
    # Batches go to the processes in turn: two micro-batches of two processes are the four of one.
    expected = tiny_llama()
    statistics = train(expected, tiny_llama(), FORGET, RETAIN, steps=3, accumulate=4, max_norm=0.5)
    for way in WAYS:
        folder = tmp_path / way
        assert_trained_as(expected, folder)
        result = json.loads((folder / "result.json").read_text())
        assert result["resumed_to_the_bit"]
        assert result["engine_steps"] == 3
        assert result["stored"] == len(FORGET)
        last = result["logs"][-2]
        assert last["blur_cosine"] == pytest.approx(float(statistics.cosine), rel=1e-4)
        # The engine's own, of what it stepped on.
        assert last["grad_norm"] == pytest.approx(last["blur_update_norm"], rel=1e-5)
        lines = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "step" in line] == [1, 2, 3]
