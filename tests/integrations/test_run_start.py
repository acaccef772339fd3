"""When arguments are read: at the beginning of each run; and what a resumed run is told of its own beginning."""

import copy
from types import SimpleNamespace

import pytest
import torch
from blur_trainer import FORGET, RETAIN, arguments, assert_same, trainer
from tiny import tiny_llama

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from transformers.trainer_utils import HPSearchBackend  # noqa: E402


def same(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


#: An argument of the method, another value, and the losses that let it matter.
ARGUMENTS = {
    "gamma": (0.3, {}),
    "retain_weight": (3.0, {}),
    "beta": (5.0, {}),
    "simnpo_delta": (4.0, {"forget_loss": "simnpo"}),
    "rule": ("weighted_sum", {}),
    "normalize": (True, {}),
    "scope": ("parameter", {}),
    "stash": ("bfloat16", {}),
    "forget_loss": ("ga", {}),
    "epoch_over": ("forget", {}),
    "metric": ("retain", {}),
}


def trained(folder, **options):
    made = trainer(folder, max_steps=2, **options)
    made.train()
    return made


_UNTOUCHED = []


@pytest.fixture
def untouched(tmp_path):
    """The model after one run of two steps, and after two such runs, with nothing changed; made once."""
    if not _UNTOUCHED:
        made = trained(tmp_path / "untouched")
        _UNTOUCHED.append(copy.deepcopy(made.model))
        made.train()
        _UNTOUCHED.append(made.model)
    return _UNTOUCHED


@pytest.mark.parametrize("name", ARGUMENTS)
def test_changed_before_the_run(tmp_path, untouched, name):
    value, options = ARGUMENTS[name]
    made = trainer(tmp_path / "a", max_steps=2, **options)
    setattr(made.args, name, value)
    made.train()
    assert same(made.model, trained(tmp_path / "b", **{**options, name: value}).model)
    assert not same(made.model, untouched[0]), "the argument has to matter"


@pytest.mark.parametrize("name", ["gamma", "beta", "rule", "scope", "stash", "forget_loss"])
def test_changed_between_two_runs(tmp_path, untouched, name):
    value, options = ARGUMENTS[name]
    made = trained(tmp_path, **options)
    assert same(made.model, untouched[0])
    optimizer = made.blur
    setattr(made.args, name, value)
    made.train()
    assert made.blur is optimizer
    assert not same(made.model, untouched[1]), "the argument has to matter"


def test_another_metric_needs_another_trainer(tmp_path):
    made = trained(tmp_path)
    made.args.metric = "retain"
    with pytest.raises(ValueError, match=r"`metric` must be 'euclidean' in a second run of one trainer.*got 'retain'"):
        made.train()


def test_what_a_scheduler_did_to_gamma_stays(tmp_path):
    made = trainer(tmp_path, max_steps=1)
    made.train()
    made.blur.param_groups[0]["gamma"] = 0.5
    made.train()
    assert made.blur.param_groups[0]["gamma"] == 0.5
    made.args.gamma = 0.25
    made.train()
    assert made.blur.param_groups[0]["gamma"] == 0.25


def without_model(model, *args, **kwargs):
    from blur_optim.integrations.transformers import BLURTrainer

    return BLURTrainer(None, *args, **kwargs)


def search(made, trials):
    """What ``hyperparameter_search`` does with each trial, without a library that proposes them."""
    made.hp_search_backend = HPSearchBackend.OPTUNA
    made.objective = made.hp_name = None
    made.compute_objective = lambda metrics: 0.0
    made.hp_space = lambda trial: trial.params
    for params in trials:
        made.train(trial=SimpleNamespace(params=params, number=0))
        yield made.model


@pytest.fixture
def _no_search_library(monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)


@pytest.mark.usefixtures("_no_search_library")
def test_each_trial_of_a_search_has_its_arguments(tmp_path):
    trials = [{"gamma": 0.3}, {"beta": 5.0, "scope": "parameter", "rule": "weighted_sum"}]
    made = trainer(tmp_path / "a", max_steps=2, beta=0.1, more={"model_init": lambda: tiny_llama()}, cls=without_model)
    arguments_so_far = {"beta": 0.1}
    for i, model in enumerate(search(made, trials)):
        arguments_so_far |= trials[i]
        expected = trainer(tmp_path / str(i), max_steps=2, **arguments_so_far)
        expected.train()
        assert_same(model, expected.model)
    assert made.reference_log_probs.computed == 0, "the same model each time: what it is compared with is found again"


@pytest.mark.usefixtures("_no_search_library")
def test_a_model_for_each_trial_has_a_reference_of_its_own(tmp_path):
    def init(trial=None):
        return tiny_llama(seed=0 if trial is None else trial.params["seed"])

    made = trainer(tmp_path, max_steps=1, gradient_accumulation_steps=1, more={"model_init": init}, cls=without_model)
    paths = set()
    for _ in search(made, [{"seed": 1}, {"seed": 2}, {"seed": 1}]):
        # NPO of a model compared with itself, beta 0.1.
        assert made.state.log_history[0]["forget_loss"] == pytest.approx(13.8629, abs=1e-3)
        paths.add(made.reference_path)
        assert made.reference_path.exists()
    assert len(paths) == 2


def resumed(folder, more=None, data=FORGET, **changes):
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    trainer(folder, **options).train()
    again = trainer(folder, forget=data, more=more, **{**options, **changes})
    return again, lambda: again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_a_run_that_is_resumed_as_it_was_begun_says_nothing(tmp_path):
    again, go_on = resumed(tmp_path)
    go_on()  # pytest makes an error of a warning.
    assert again.state.stateful_callbacks["BLURTrainer"]["gamma"] == 1.0


def test_a_run_that_is_resumed_with_other_arguments_says_what_differs(tmp_path):
    again, go_on = resumed(tmp_path, gamma=0.25, rule="conflict", learning_rate=5e-3, beta=0.2, seed=7)
    with pytest.warns(UserWarning, match="resumed with other arguments") as caught:
        go_on()
    (message,) = {str(w.message) for w in caught if "resumed" in str(w.message)}
    new, kept = message.partition("The run is resumed with other arguments than it was begun with. ")[2].split("; ")
    assert new == (
        "beta 0.2 (begun with None), gamma 0.25 (begun with 1.0), rule 'conflict' (begun with 'blur'), "
        "seed 7 (begun with 42): the new hold from here on"
    )
    assert kept == "learning_rate 0.005 (begun with 0.001): the checkpoint's stay."
    # And so it is.
    assert again.blur.rule == "conflict"
    assert {group["gamma"] for group in again.blur.param_groups} == {0.25}
    assert {group["lr"] for group in again.blur.param_groups} == {1e-3}


def test_other_losses_and_data_are_told_too(tmp_path):
    def ascent(model, batch):
        return -model(**batch).loss

    _, go_on = resumed(tmp_path, more={"forget_loss": ascent}, data=FORGET[:3])
    with pytest.warns(
        UserWarning, match=r"forget_loss '.*ascent' \(begun with 'npo'\), forget_rows 3 \(begun with 5\)"
    ):
        go_on()


class TestTheBestCheckpoint:
    both = staticmethod(lambda: {"eval_dataset": {"forget": FORGET, "retain": RETAIN}})
    options = staticmethod(
        lambda **changes: {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "save_strategy": "steps",
            **changes,
        }
    )

    def test_the_default_metric_does_not_exist(self, tmp_path):
        message = r"`metric_for_best_model` must be one of \['eval_forget_loss', 'eval_retain_loss'\].*got 'loss'"
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, more=self.both(), **self.options())

    @pytest.mark.parametrize("name", ["forget_loss", "eval_forget_loss"])
    def test_what_forgot_least_is_not_the_best(self, tmp_path, name):
        with pytest.raises(ValueError, match=r"`greater_is_better` must be True for the loss on the forget data"):
            trainer(tmp_path, more=self.both(), **self.options(metric_for_best_model=name))
        with pytest.raises(ValueError, match=r"the checkpoint that forgot least would be the best"):
            trainer(tmp_path, more={"eval_dataset": FORGET}, **self.options())
        with pytest.raises(ValueError, match=r"`greater_is_better` must be True"):
            trainer(tmp_path, more={"eval_dataset": {"f": FORGET}}, **self.options(metric_for_best_model="f_loss"))

    def test_what_forgot_most_is_kept(self, tmp_path):
        options = self.options(
            metric_for_best_model="eval_forget_loss", greater_is_better=True, eval_steps=1, save_steps=1
        )
        made = trainer(tmp_path, more=self.both(), max_steps=3, forget_loss="ga", learning_rate=1e-2, **options)
        made.train()
        losses = {log["step"]: log["eval_forget_loss"] for log in made.state.log_history if "eval_forget_loss" in log}
        assert made.state.best_model_checkpoint.endswith(f"checkpoint-{max(losses, key=losses.get)}")
        trainer(tmp_path, more=self.both(), **self.options(metric_for_best_model="eval_retain_loss"))


@pytest.mark.parametrize("beta", [0.0, -1.0, 0])
def test_beta_is_checked_before_anything_is_loaded(tmp_path, beta):
    with pytest.raises(ValueError, match=r"`beta` must be positive, got"):
        arguments(tmp_path, beta=beta)


def test_a_search_may_not_pass_by_the_checks(tmp_path):
    made = trainer(tmp_path, beta=0.1)
    made.args.beta = 0.0
    with pytest.raises(ValueError, match=r"`beta` must be positive, got 0\.0"):
        made.train()
    made.args.beta, made.args.rule = 0.1, "sum"
    with pytest.raises(ValueError, match=r"`rule` must be one of"):
        made.train()
    assert not made.reference_path.exists()


def test_recording_is_an_argument_too(tmp_path):
    made = trainer(tmp_path, max_steps=1, forget_loss="ga")
    made.train()
    made.args.record = str(tmp_path / "run.jsonl")
    made.train()
    assert (tmp_path / "run.jsonl").exists()
