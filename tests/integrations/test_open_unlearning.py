"""The handler for open-unlearning, against a stand-in of that project's trainer interface (the project is not here).

The stand-in has what the handler relies on: a registry by name, a base trainer that takes evaluators and template
arguments, and a loader that passes ``method_args`` of a YAML file on.
"""

import importlib
import sys
import types

import pytest
import torch
from hand_written import train
from test_integrations_docs import blocks
from test_transformers import arguments, assert_same
from tiny import collate, rows, tiny_llama

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
yaml = pytest.importorskip("yaml", reason="yaml is not installed")


class FinetuneTrainer(transformers.Trainer):
    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)


class UnlearnTrainer(FinetuneTrainer):
    pass


@pytest.fixture(scope="module")
def registry():
    package, methods, base = (types.ModuleType(n) for n in ("trainer", "trainer.unlearn", "trainer.unlearn.base"))
    package.TRAINER_REGISTRY, base.UnlearnTrainer = {}, UnlearnTrainer
    before = {name: sys.modules.get(name) for name in ("trainer", "trainer.unlearn", "trainer.unlearn.base")}
    sys.modules.update(zip(before, (package, methods, base), strict=True))
    sys.modules.pop("blur_optim.integrations.open_unlearning", None)
    importlib.import_module("blur_optim.integrations.open_unlearning")
    yield package.TRAINER_REGISTRY
    for name, module in before.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module


def collate_pairs(items):
    return {side: collate([item[side] for item in items]) for side in ("forget", "retain")}


def load(registry, folder, model, pairs, changes, more=None, **options):
    """As the project's ``load_trainer`` does, from the YAML file of the documentation."""
    (text,) = blocks("open-unlearning")
    config = yaml.safe_load(text)
    plain = arguments(folder, per_device_train_batch_size=1, gradient_accumulation_steps=1, **options)
    names = {f.name for f in transformers.TrainingArguments.__dataclass_fields__.values() if f.init}
    args = {n: getattr(plain, n) for n in names & {"max_steps", "learning_rate", "weight_decay", "max_grad_norm"}}
    return registry[config["handler"]](
        model=model,
        train_dataset=pairs,
        eval_dataset=None,
        data_collator=collate_pairs,
        args=transformers.TrainingArguments(
            str(folder),
            per_device_train_batch_size=1,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            **args,
            **(more or {}),
        ),
        evaluators=None,
        template_args={},
        **{**config["method_args"], **changes},
    )


FORGET, RETAIN = rows(1, 1), rows(1, 2)
PAIRS = [{"forget": FORGET[0], "retain": RETAIN[0]}]


@pytest.mark.parametrize(
    ("method", "ours"),
    [
        ({}, ("npo", "nll")),
        ({"retain_loss_type": "KL"}, ("npo", "kl")),
        ({"forget_loss": "GradDiff"}, ("ga", "nll")),
        ({"forget_loss": "SimNPO", "beta": 2.5}, ("simnpo", "nll")),
    ],
    ids=["BLUR-NPO", "BLUR-NPO-KL", "BLUR-GradDiff", "BLUR-SimNPO"],
)
def test_it_trains_as_the_loop_by_hand(registry, tmp_path, method, ours):
    made = load(registry, tmp_path, tiny_llama(), PAIRS, method)
    made.train()
    expected = tiny_llama()
    train(expected, tiny_llama(), FORGET, RETAIN, ours, steps=4, accumulate=1, size=1, max_norm=0.5)
    assert_same(made.model, expected)
    assert made.template_args == {}
    assert "blur_cosine" in made.state.log_history[0]


RMU = {
    "forget_loss": "RMU",
    "retain_loss_type": "EMBED_DIFF",
    "module_regex": r"model\.layers\.0",
    "trainable_params_regex": [r"model\.layers\.0\.mlp\.down_proj\.weight"],
    "steering_coeff": 3.0,
}


def test_rmu(registry, tmp_path):
    model = tiny_llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    made = load(registry, tmp_path, model, PAIRS, RMU)
    made.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"model.layers.0.mlp.down_proj.weight"}
    logs = made.state.log_history
    # At first the activations are the frozen model's; a steering vector of norm 3 over 16 entries is about 9/16 away.
    assert logs[0]["retain_loss"] == 0.0
    assert logs[0]["forget_loss"] == pytest.approx(9 / 16, rel=0.2)
    assert logs[3]["forget_loss"] < logs[0]["forget_loss"]


def test_rmu_with_checkpointing(registry, tmp_path):
    """The project's default. In its reentrant kind a layer runs without gradients, and so would what is captured."""
    names = ("activation_checkpointing", "gradient_checkpointing")  # The older one is an alias since transformers 5.
    name = next(name for name in names if name in transformers.TrainingArguments.__dataclass_fields__)
    plain, checkpointed = tiny_llama(), tiny_llama()
    method = {**RMU, "module_regex": r"model\.layers\.0\.mlp"}  # transformers 5 runs hooks of a whole layer outside.
    load(registry, tmp_path, plain, PAIRS, method).train()
    more = {name: True, f"{name}_kwargs": {"use_reentrant": True}}
    load(registry, tmp_path, checkpointed, PAIRS, method, more).train()
    assert_same(checkpointed, plain)


def test_the_margin_of_simnpo_is_the_projects(registry, tmp_path):
    """``log sigma(beta * (nll - delta))``, where ours is ``log sigma(beta * nll - delta)``."""
    made = load(registry, tmp_path, tiny_llama(), PAIRS, {"forget_loss": "SimNPO", "beta": 2.0, "delta": 1.5})
    batch = collate(FORGET)
    nll = tiny_llama()(**batch).loss
    expected = -2 / 2.0 * torch.nn.functional.logsigmoid(2.0 * (nll - 1.5))
    torch.testing.assert_close(made.compute_forget_loss(made.model, batch), expected, rtol=1e-5, atol=1e-7)


def test_alternate_answers(registry, tmp_path):
    """The project's DPO batches: ``{"forget": {"original": ..., "alternate": ...}}``."""
    made = load(registry, tmp_path, tiny_llama(), PAIRS, {"forget_loss": "DPO"})
    batch = {"original": collate(FORGET), "alternate": collate(rows(1, 5))}
    # At the reference: -2/beta * log(1/2).
    assert made.compute_forget_loss(made.model, batch).item() == pytest.approx(13.863, abs=1e-3)
    assert made.compute_loss(made.model, {"forget": batch, "retain": collate(RETAIN)}).item() > 13.863


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ({"forget_loss": "npo"}, r"`forget_loss` must be one of .*'NPO'.*, got 'npo'"),
        ({"retain_loss_type": "EMBED_DIFF"}, r"`retain_loss_type` must be one of \['KL', 'NLL'\], got 'EMBED_DIFF'"),
        ({"forget_loss": "RMU", "module_regex": "nothing"}, r"pattern 'nothing' must fit the name of one module"),
        (
            {"forget_loss": "RMU", "module_regex": r"model\.layers\.0", "trainable_params_regex": ["nothing"]},
            r"`trainable_params_regex` must fit the names of parameters, got none",
        ),
    ],
    ids=["forget", "retain", "module", "parameters"],
)
def test_what_is_refused(registry, tmp_path, method, match):
    with pytest.raises(ValueError, match=match):
        load(registry, tmp_path, tiny_llama(), PAIRS, method)


def test_without_the_project():
    code = "blur_optim.integrations.open_unlearning"
    before = sys.modules.pop(code, None)
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "trainer"}
    try:
        with pytest.raises(ImportError, match=r"open-unlearning must be on the path"):
            importlib.import_module(code)
    finally:
        sys.modules.update(saved)
        if before is not None:
            sys.modules[code] = before
