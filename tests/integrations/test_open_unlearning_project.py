"""The handler in a checkout of open-unlearning, where ``BLUR_OPEN_UNLEARNING`` names one, with its packages.

Its transformers is not the one of the other tests (docs/integrations.md says which), so this runs in its environment:

    BLUR_OPEN_UNLEARNING=path/to/open-unlearning python -m pytest tests/integrations/test_open_unlearning_project.py
"""

import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from test_integrations_docs import blocks
from tiny import collate, rows, tiny_llama

CHECKOUT = os.environ.get("BLUR_OPEN_UNLEARNING")
if not CHECKOUT:
    pytest.skip("BLUR_OPEN_UNLEARNING names no checkout of open-unlearning", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # The project's own are not ours to fail on.
EXAMPLES = Path(__file__).parents[2] / "examples" / "open_unlearning"
METHODS = sorted(path.stem.removeprefix("BLUR_") for path in (EXAMPLES / "configs" / "trainer").glob("BLUR_*.yaml"))
# What a method's own YAML, or the size of the model here, leaves open.
NEEDED = {
    "PDU": ["trainer.method_args.retain_loss_eps=0.5", "trainer.method_args.dual_warmup_epochs=0"],
    "RMU": [r"trainer.method_args.module_regex='model\.layers\.0'"],
}


@pytest.fixture(scope="module")
def project():
    sys.path.insert(0, str(Path(CHECKOUT) / "src"))
    package = importlib.import_module("trainer")
    importlib.import_module("blur_optim.integrations.open_unlearning")
    yield package
    sys.path.remove(str(Path(CHECKOUT) / "src"))


def compose(name, *overrides):
    hydra = pytest.importorskip("hydra")
    with hydra.initialize_config_dir(str((Path(CHECKOUT) / "configs").resolve()), version_base=None):
        config = hydra.compose(
            "unlearn.yaml",
            [
                "experiment=unlearn/tofu/default",
                f"trainer={name}",
                f"hydra.searchpath=[file://{EXAMPLES / 'configs'}]",
                "task_name=x",
                "trainer.args.output_dir=x",
                "trainer.args.logging_dir=x",
                *overrides,
            ],
        )
    return config.trainer


def load(project, folder, name, *overrides, **more):
    """As ``src/train.py`` does."""
    method = name.removeprefix("BLUR_")
    config = compose(
        name,
        *NEEDED.get(method, []),
        f"trainer.args.output_dir={folder}",
        "trainer.args.warmup_epochs=null",
        "+trainer.args.use_cpu=true",
        "trainer.args.bf16=false",
        "trainer.args.bf16_full_eval=false",
        "trainer.args.optim=adamw_torch",
        "trainer.args.report_to=none",
        "trainer.args.per_device_train_batch_size=2",
        "trainer.args.gradient_accumulation_steps=2",
        "+trainer.args.max_steps=2",
        *(["trainer.args.eval_strategy=no"] if "evaluators" not in more else []),
        *overrides,
    )
    made, _ = project.load_trainer(
        config,
        model=wide_llama(),
        train_dataset=pairs(method),
        data_collator=Collator(),
        **{"template_args": {}, **more},
    )
    return made


def wide_llama():
    model = tiny_llama()
    torch.manual_seed(0)
    # UNDIAL reads the logit of a label of -100, which smaller vocabularies do not have.
    model.resize_token_embeddings(128, mean_resizing=False)
    return model


def pairs(method, count=8):
    forget, retain, others = rows(count, 1), rows(count, 2), rows(count, 3)
    if method == "DPO":
        forget = [{"original": a, "alternate": b} for a, b in zip(forget, others, strict=True)]
    return [{"forget": f, "retain": r} for f, r in zip(forget, retain, strict=True)]


class Collator:
    def __call__(self, items):
        if "input_ids" in items[0]:
            return collate(items)
        return {key: self([item[key] for item in items]) for key in items[0]}


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_the_two_losses_are_the_projects(project, tmp_path, method):
    """Their weighted gradients add up to that of the project's own loss; retain rows are in one of them alone."""
    ours = load(project, tmp_path, f"BLUR_{method}")
    theirs = load(project, tmp_path, method)
    # Away from the reference, where RMU's and KL's retain gradients are 0.
    for made in (ours, theirs):
        torch.manual_seed(5)
        with torch.no_grad():
            for p in made.model.parameters():
                p.add_(torch.randn_like(p), alpha=0.02)
    batch, other = (Collator()(pairs(method)[i : i + 2]) for i in (0, 2))
    weights = {"gamma": getattr(theirs, "gamma", 1.0), "alpha": getattr(theirs, "alpha", 0.0)}
    if method == "UNDIAL":
        weights["alpha"] = theirs.alpha = 1.0
    torch.manual_seed(0)
    forget = gradient(ours.model, ours._phase_loss(ours.model, "forget", batch))
    if ours._split.has_own_weights:
        weights = {"gamma": 1.0, "alpha": ours._split.retain_weight().item()}
    retain_loss = ours._split.retain(ours.model, batch, weights["alpha"] or 1.0)
    retain = gradient(ours.model, retain_loss)
    torch.manual_seed(0)
    expected = gradient(theirs.model, theirs.compute_loss(theirs.model, batch))
    assert any(g.any() for g in forget)
    assert any(g.any() for g in retain)
    for f, r, e in zip(forget, retain, expected, strict=True):
        # One float32 sum in another order.
        torch.testing.assert_close(weights["gamma"] * f + weights["alpha"] * r, e, rtol=1e-4, atol=1e-6)
    ours._split.begin()
    mixed = {"forget": batch["forget"], "retain": other["retain"]}
    torch.manual_seed(0)
    again = gradient(ours.model, ours._phase_loss(ours.model, "forget", mixed))
    for f, g in zip(forget, again, strict=True):
        torch.testing.assert_close(f, g, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_it_trains(project, tmp_path, method):
    made = load(project, tmp_path, f"BLUR_{method}", "trainer.args.logging_steps=1")
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    made.train()
    logs = [log for log in made.state.log_history if "blur_cosine" in log]
    assert len(logs) == 2
    assert all(torch.isfinite(torch.tensor(log["blur_update_norm"])) and log["blur_update_norm"] > 0 for log in logs)
    assert any(not torch.equal(p, before[n]) for n, p in made.model.named_parameters())
    if method == "PDU":
        # As its own rule says, the retain weight rises by 1 x (loss - 0.5) in each of 4 micro-batches.
        steps = [log["retain_preference"] for log in made.state.log_history if "retain_preference" in log]
        losses = [log["retain_loss"] for log in made.state.log_history if "retain_preference" in log]
        assert steps == pytest.approx([1.0 + sum(losses[: i + 1]) - 0.5 * (i + 1) for i in range(4)])
        assert logs[1]["blur_retain_coefficient"] == pytest.approx((steps[1] + steps[2]) / 2)


def test_every_method_has_a_yaml(project):
    grad_diff = importlib.import_module("trainer.unlearn.grad_diff").GradDiff
    names = {name for name, c in project.TRAINER_REGISTRY.items() if isinstance(c, type) and issubclass(c, grad_diff)}
    assert names <= set(METHODS)


def test_settings_are_the_projects():
    theirs, ours = compose("SimNPO"), compose("BLUR_SimNPO")
    assert {**theirs.method_args} == {n: v for n, v in ours.method_args.items() if n in theirs.method_args}
    assert ours.args == theirs.args
    assert compose("BLUR_NPO", "trainer.method_args.rule=weighted_sum").method_args.rule == "weighted_sum"


def documented():
    text = "\n".join(blocks("open-unlearning")).replace("\\\n", " ")
    commands = (shlex.split(line) for line in text.splitlines() if "src/train.py" in line)
    return [words[words.index("src/train.py") + 1 :] for words in commands]


@pytest.mark.parametrize("words", documented(), ids=lambda words: words[-1])
def test_the_documented_commands_compose(words):
    hydra = pytest.importorskip("hydra")
    assert words[0] == "--config-name=unlearn.yaml"
    with hydra.initialize_config_dir(str((Path(CHECKOUT) / "configs").resolve()), version_base=None):
        path = f"hydra.searchpath=[file://{EXAMPLES / 'configs'}]"
        config = hydra.compose("unlearn.yaml", [*words[1:], path])
    assert config.trainer.handler == "BLUR"
    assert config.mode == "unlearn"
    assert config.task_name == config.trainer.method_args.forget_loss


def test_an_evaluation_that_leaves_gradients_is_survived(project, tmp_path):
    """And the one that newer Trainers ask a data set for, which the project has none of."""

    class Evaluator:
        calls = 0

        def evaluate(self, model, **_):
            self.calls += 1
            model.zero_grad()
            model(**collate(rows(2, 9))).loss.backward()
            return {"score": 1.0}

    evaluator = Evaluator()
    options = ("trainer.args.eval_strategy=steps", "+trainer.args.eval_steps=1")
    made = load(project, tmp_path, "BLUR_NPO", *options, evaluators={"x": evaluator})
    made.train()
    plain = load(project, tmp_path, "BLUR_NPO")
    plain.train()
    assert evaluator.calls >= 3  # One before the first step.
    for one, other in zip(made.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_is_refused(project, tmp_path):
    with pytest.raises(ValueError, match=r"`forget_loss` must be a method of the project, one of .*'NPO'.*, got 'npo'"):
        load(project, tmp_path, "BLUR_NPO", "trainer.method_args.forget_loss=npo")
    with pytest.raises(ValueError, match=re.escape("`rule` must be one of")):
        load(project, tmp_path, "BLUR_NPO", "trainer.method_args.rule=nonsense")
