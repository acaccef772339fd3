"""The handler for open-unlearning, against a stand-in of that project's trainers (toy_project.py).

What runs in the project itself is in test_open_unlearning_project.py.
"""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from blur_trainer import arguments, assert_same
from blur_trainer import trainer as blur_trainer
from hand_written import train
from test_integrations_docs import blocks
from tiny import collate, parameters, rows, tiny_llama

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
yaml = pytest.importorskip("yaml", reason="yaml is not installed")

import toy_project  # noqa: E402

MODULE = "blur_optim.integrations.open_unlearning"
FOLDER = Path(__file__).parents[2] / "examples" / "open_unlearning"
YAMLS = sorted((FOLDER / "configs" / "trainer").glob("*.yaml"))
FORGET, RETAIN = rows(6, 1), rows(6, 2)
PAIRS = [{"forget": f, "retain": r} for f, r in zip(FORGET, RETAIN, strict=True)]


@pytest.fixture
def registry(monkeypatch):
    found = toy_project.install(monkeypatch)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    importlib.import_module(MODULE)
    yield found
    sys.modules.pop(MODULE, None)


def collate_pairs(items):
    return {side: collate([item[side] for item in items]) for side in ("forget", "retain")}


def load(registry, folder, method_args, *, handler="BLUR", pairs=PAIRS, accumulate=2, model=None, more=None, **kwargs):
    """As the project's loader does with a YAML file."""
    plain = arguments(folder)
    names = ("max_steps", "learning_rate", "weight_decay", "max_grad_norm")
    return registry[handler](
        model=model or tiny_llama(),
        train_dataset=pairs,
        data_collator=collate_pairs,
        args=transformers.TrainingArguments(
            str(folder),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulate,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            **{name: getattr(plain, name) for name in names},
            **(more or {}),
        ),
        **{"eval_dataset": None, "evaluators": None, "template_args": {}, **kwargs},
        **method_args,
    )


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


METHODS = {
    "a weighted sum": ({"forget_loss": "GradDiff", "gamma": 0.25, "alpha": 3.0}, 0.25, 3.0),
    "with a reference": ({"forget_loss": "Compared", "beta": 0.5, "gamma": 2.0}, 2.0, 1.0),
    "a multiplier": ({"forget_loss": "Dual", "gamma": 0.5, "alpha": 3.0}, 1.0, 3.0),
    "no compute_retain_loss": ({"forget_loss": "Inline", "gamma": 0.5, "alpha": 3.0}, 0.5, 3.0),
    "no weight of forgetting": ({"forget_loss": "GradDiff", "gamma": 0.0, "alpha": 3.0}, 0.0, 3.0),
    "activations": ({"forget_loss": "Steered", "gamma": 0.5}, 0.5, 1.0),
    "a product": ({"forget_loss": "Product"}, 1.0, None),
}


@pytest.mark.parametrize(("method_args", "gamma", "alpha"), METHODS.values(), ids=METHODS.keys())
def test_the_two_losses_add_up_to_the_methods(registry, tmp_path, method_args, gamma, alpha):
    ours = load(registry, tmp_path, method_args)
    options = {name: value for name, value in method_args.items() if name != "forget_loss"}
    theirs = load(registry, tmp_path, options, handler=method_args["forget_loss"])
    batch = collate_pairs(PAIRS[:3])
    split = ours._split
    forget_loss = ours._phase_loss(ours.model, "forget", batch)
    forget = gradient(ours.model, forget_loss)
    weight = alpha
    if split.has_own_weights:
        weight = split.retain_weight().item()
        assert alpha is None or weight == alpha
    retain = gradient(ours.model, split.retain(ours.model, batch, weight))
    expected_loss = theirs.compute_loss(theirs.model, batch)
    expected = gradient(theirs.model, expected_loss)
    assert any(g.any() for g in forget)
    for f, r, e in zip(forget, retain, expected, strict=True):
        torch.testing.assert_close(gamma * f + weight * r, e, rtol=1e-5, atol=1e-6)  # Two sums of float32.
    if method_args["forget_loss"] in ("GradDiff", "Compared", "Steered"):
        # One forward for each loss: the retain loss is not computed where only the other is wanted.
        assert ours.retain_passes == theirs.retain_passes == 1
        expected_forget = ours.forget(ours.model, batch).item()
        assert forget_loss.item() == pytest.approx(expected_forget, rel=1e-6)


@pytest.mark.parametrize("name", ["Suppress", "GradAscent"])
def test_a_method_that_only_forgets_gets_a_retain_loss(registry, tmp_path, name):
    options = {"Suppress": {"power": 2.0}, "GradAscent": {}}[name]
    ours = load(registry, tmp_path, {"forget_loss": name, "gamma": 0.5, "alpha": 3.0, **options})
    theirs = load(registry, tmp_path, options, handler=name)
    batch = collate_pairs(PAIRS[:3])
    forget = ours._phase_loss(ours.model, "forget", batch)
    assert forget.item() == pytest.approx(theirs.compute_loss(theirs.model, batch).item(), rel=1e-6)
    assert ours._split.retain(ours.model, batch).item() == pytest.approx(
        tiny_llama()(**batch["retain"]).loss.item(), rel=1e-6
    )
    ours.train()
    assert ours.blur.param_groups[0]["gamma"] == 0.5
    assert ours.blur.param_groups[0]["retain_weight"] == 3.0
    assert all("blur_cosine" in log for log in ours.state.log_history[:4])


@pytest.mark.parametrize("name", ["GradDiff", "Inline", "GradAscent"])
def test_it_trains_as_the_loop_by_hand(registry, tmp_path, name):
    pair = [PAIRS[0]]  # The project draws the retain row, so that orders cannot be compared with more.
    made = load(registry, tmp_path, {"forget_loss": name}, pairs=pair, accumulate=1)
    made.train()
    expected = tiny_llama()
    losses = ("ga", "nll")
    train(expected, tiny_llama(), FORGET[:1], RETAIN[:1], losses, steps=4, accumulate=1, size=1, max_norm=0.5)
    assert_same(made.model, expected)
    assert made.template_args == {}


def test_a_multiplier_of_the_methods_own_weighs_the_update(registry, tmp_path):
    """It changes within a step, with each micro-batch; what BLUR multiplies with is their mean."""
    made = load(registry, tmp_path, {"forget_loss": "Dual", "rule": "weighted_sum", "alpha": 2.0, "rate": 5.0})
    theirs = load(registry, tmp_path, {"alpha": 2.0, "rate": 5.0}, handler="Dual")
    made.train()
    theirs.train()
    assert made.weights[1] > 4.0
    assert made.weights == pytest.approx(theirs.weights, rel=1e-3)
    assert_same(made.model, theirs.model, rtol=1e-3)  # AdamW on two sums of float32.


def test_where_there_is_nothing_but_one_of_the_two(registry, tmp_path):
    """What is captured, trained and frozen is the method's; a gradient is computed for nothing else."""
    plain = load(registry, tmp_path, {"forget_loss": "Steered"})
    before = {n: p.detach().clone() for n, p in plain.model.named_parameters()}
    plain.train()
    moved = {n for n, p in plain.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {toy_project.Steered.trained}
    assert {n for n, p in plain.model.named_parameters() if p.requires_grad} == moved
    # The reentrant kind, the default of older versions, would run the layer without gradients.
    names = ("activation_checkpointing", "gradient_checkpointing")  # The older one is an alias since transformers 5.
    name = next(name for name in names if name in transformers.TrainingArguments.__dataclass_fields__)
    more = {name: True, f"{name}_kwargs": {"use_reentrant": True}}
    checkpointed = load(registry, tmp_path, {"forget_loss": "Steered"}, more=more)
    checkpointed.train()
    assert_same(checkpointed.model, plain.model)


def test_options_are_blurs(registry, tmp_path):
    options = {"rule": "normalized", "normalize": True, "scope": "parameter", "stash": "int8", "gamma": 0.5}
    made = load(registry, tmp_path, {"forget_loss": "GradDiff", **options})
    made.train()
    blur = made.blur
    assert (blur.rule, blur.normalize, blur.scope, blur.stash) == ("normalized", True, "parameter", "int8")
    assert {group["gamma"] for group in blur.param_groups} == {0.5}


def test_the_metric_of_the_retain_loss(registry, tmp_path):
    """By the project's own loss, as by hand."""
    options = {"metric": "retain", "damping": 0.05, "gamma": 0.5}
    made = load(registry, tmp_path, {"forget_loss": "GradDiff", **options}, pairs=PAIRS[:1], accumulate=1)
    made.train()
    assert (made.blur.metric, made.blur.damping) == ("retain", 0.05)
    expected, losses = tiny_llama(), ("ga", "nll")
    train(expected, None, FORGET[:1], RETAIN[:1], losses, steps=4, accumulate=1, size=1, max_norm=0.5, **options)
    assert_same(made.model, expected)
    with pytest.raises(TypeError, match=r"must be AdamW, Adam or SGD with metric='retain', got torch's Adagrad"):
        load(registry, tmp_path, {"forget_loss": "GradDiff", **options}, more={"optim": "adagrad"}).train()


@pytest.mark.parametrize(
    ("method_args", "kind", "match"),
    [
        ({"forget_loss": "nothing"}, ValueError, r"`forget_loss` must be a method of the project, one of .*'GradDiff'"),
        ({"forget_loss": "OwnStep"}, TypeError, r"without a training_step of its own.* got OwnStep"),
        ({"forget_loss": "GradDiff", "rule": "x"}, ValueError, r"`rule` must be one of"),
        (
            {"forget_loss": "GradDiff", "stash": "recompute"},
            ValueError,
            r"`stash` must not be 'recompute'",
        ),
        ({"forget_loss": "GradDiff", "gamma": -1.0}, ValueError, r"`gamma` must be"),
        ({"forget_loss": "GradDiff", "colour": 1}, TypeError, r"colour"),
    ],
    ids=["method", "step", "rule", "stash", "gamma", "unknown"],
)
def test_what_is_refused(registry, tmp_path, method_args, kind, match):
    with pytest.raises(kind, match=match):
        load(registry, tmp_path, method_args)


def test_a_loss_that_cannot_be_taken_apart(registry, tmp_path):
    made = load(registry, tmp_path, {"forget_loss": "Mixed"})
    before = parameters(made.model)
    with pytest.raises(RuntimeError, match=r"Mixed\.compute_loss cannot be taken apart"):
        made.train()
    assert all(torch.equal(p, b) for p, b in zip(made.model.parameters(), before, strict=True))


def leave_gradients(model):
    """What a score that is a gradient's norm does."""
    model.zero_grad()
    model(**collate(rows(2, 9))).loss.backward()
    return {"score": 1.0}


def test_an_evaluation_that_leaves_gradients_is_survived(registry, tmp_path):
    """Evaluators take the place of a data set, which newer Trainers ask for all the same."""
    more = {"eval_strategy": "steps", "eval_steps": 1}
    scored = load(registry, tmp_path, {"forget_loss": "GradDiff"}, more=more, evaluators={"toy": leave_gradients})
    plain = load(registry, tmp_path, {"forget_loss": "GradDiff"})
    scored.train()
    plain.train()
    for p, q in zip(scored.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_evaluation_that_leaves_gradients_in_blur_trainer(tmp_path):
    class Scored(type(blur_trainer(tmp_path))):
        def evaluation_loop(self, *args, **kwargs):
            result = super().evaluation_loop(*args, **kwargs)
            with torch.enable_grad():
                leave_gradients(self.model)
            return result

    options = {"eval_strategy": "steps", "eval_steps": 1, "forget_loss": "ga"}
    scored = blur_trainer(tmp_path, cls=Scored, more={"eval_dataset": RETAIN}, **options)
    plain = blur_trainer(tmp_path, forget_loss="ga")
    scored.train()
    plain.train()
    for p, q in zip(scored.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("version", "refused"), [("4.45.1", True), ("4.51.3", False)])
def test_transformers_that_divide_twice_are_refused(registry, tmp_path, monkeypatch, version, refused):
    monkeypatch.setattr(transformers, "__version__", version)
    if refused:
        with pytest.raises(ImportError, match=r"`transformers` must be at least 4\.51\.3 .*, got 4\.45\.1.*twice"):
            load(registry, tmp_path, {"forget_loss": "GradDiff"})
    else:
        load(registry, tmp_path, {"forget_loss": "GradDiff"})
    with pytest.raises(ImportError, match=r"`transformers` must be at least 4\.57\.6"):
        blur_trainer(tmp_path)


def test_without_the_project(monkeypatch):
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "trainer"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"open-unlearning must be on the path"):
        importlib.import_module(MODULE)


def test_the_documented_yaml_is_that_of_the_examples():
    (config,) = (yaml.safe_load(block) for block in blocks("open-unlearning") if block.startswith("defaults:"))
    theirs = yaml.safe_load((FOLDER / "configs" / "trainer" / "BLUR_SimNPO.yaml").read_text())
    assert {**theirs, "method_args": {n: theirs["method_args"][n] for n in config["method_args"]}} == config


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_the_yaml_files_inherit_the_projects_settings(registry, path):
    config = yaml.safe_load(path.read_text())
    method = path.stem.removeprefix("BLUR_")
    assert config["defaults"] == [method]
    assert config["handler"] == "BLUR"
    options = sys.modules[MODULE].OPTIONS
    assert config["method_args"].pop("forget_loss") == method
    assert {n: v for n, v in config["method_args"].items() if n in options}.keys() >= {
        "rule",
        "scope",
        "stash",
        "metric",
    }
    assert config["method_args"].keys() - set(options) <= {"gamma", "alpha", "retain_loss_type"}


def test_the_documented_commands_name_what_there_is():
    """Whether the project takes them is tried where there is a checkout: test_open_unlearning_project.py."""
    text = "\n".join(blocks("open-unlearning")) + (FOLDER / "community" / "methods" / "BLUR" / "run.sh").read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if "src/train.py" in line]
    assert len(lines) >= 6
    names = {path.stem for path in YAMLS}
    for line in lines:
        words = shlex.split(re.sub(r"\$\{?(\w+)\}?", "NPO", line))
        chosen = next(word for word in words if word.startswith("trainer="))
        assert chosen.removeprefix("trainer=") in names
        assert "--config-name=unlearn.yaml" in words
        assert any(word.startswith("task_name=") for word in words)
