"""The plugin in axolotl itself: a YAML is read, data sets are made, and its trainer trains as by hand."""

import importlib.util
import json

import pytest
import torch
import yaml
from chats import chats, word_tokenizer
from hand_written import train
from test_integrations_docs import blocks
from tiny import tiny_llama

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="axolotl is not installed"),
    pytest.mark.filterwarnings("ignore"),  # Of axolotl and all that it imports.
]

LENGTH = 128  # The prompt of the type alpaca alone has some forty words.


def configuration(folder, options=None, **more):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None  # Rows of the type alpaca have a prompt of axolotl's own.
    tokenizer.save_pretrained(folder / "model")
    tiny_llama(max_position_embeddings=LENGTH).save_pretrained(folder / "model")
    for name, count, seed in (("forget", 5, 1), ("retain", 16, 2)):
        turns = [[message["content"] for message in chat["messages"]] for chat in chats(count, seed)]
        lines = [json.dumps({"instruction": ask, "input": "", "output": answer}) for ask, answer in turns]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (block,) = blocks("axolotl")  # Of the documentation.
    for name in ("forget", "retain"):
        block = block.replace(f"path: {name}.jsonl", f"path: {folder / name}.jsonl")
    settings = {
        **yaml.safe_load(block),
        "base_model": str(folder / "model"),
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "sequence_len": LENGTH,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "num_epochs": 9,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "seed": 42,
        "logging_steps": 1,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "eager",
    }
    settings["blur"].update(options or {})
    path = folder / "config.yaml"
    path.write_text(json.dumps({**settings, **more}))  # Which is YAML.
    return str(path)


def load(path):
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().plugins.clear()
    return load_cfg(path)


@pytest.mark.parametrize("options", [{}, {"metric": "retain", "gamma": 0.3}], ids=["euclidean", "retain metric"])
def test_the_plugin_trains_as_by_hand(tmp_path, monkeypatch, options):
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    cfg = load(configuration(tmp_path, options))
    from axolotl.integrations.base import PluginManager
    from axolotl.train import train as axolotl_train

    from blur_optim.integrations.transformers import BLURTrainer

    data = PluginManager.get_instance().load_datasets(cfg, preprocess=False)
    columns = ["input_ids", "attention_mask", "labels"]
    forget, retain = (list(of.select_columns(columns)) for of in (data.train_dataset.forget, data.train_dataset.retain))
    assert (len(forget), len(retain)) == (5, 16)
    model, _, trainer = axolotl_train(cfg=cfg, dataset_meta=data)
    assert isinstance(trainer, BLURTrainer)
    assert type(trainer).__mro__[2].__name__ != "Trainer"
    last = [line for line in trainer.state.log_history if "forget_loss" in line][-1]
    expected = tiny_llama(max_position_embeddings=LENGTH)
    base = tiny_llama(max_position_embeddings=LENGTH)
    statistics = train(expected, base, forget, retain, steps=3, accumulate=2, max_norm=0.5, **options)
    assert last["blur_cosine"] == pytest.approx(float(statistics.cosine), rel=1e-3)
    for p, e in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sample_packing": True}, "`sample_packing` must not be set with BLUR"),
        ({"blur": {"gamma": 1.0}}, r"`blur\.forget_datasets` must name at least one data set"),
        ({"blur": {"forget_datasets": [{"path": "x"}], "gama": 1.0}}, "gama"),
    ],
)
def test_what_is_refused(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        load(configuration(tmp_path, **more))
