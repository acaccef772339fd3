"""BLURTrainer against the loop that one would write by hand, and what it refuses."""

import copy

import pytest
import torch
from blur_trainer import FORGET, PREFERENCES, RETAIN, arguments, assert_same, trainer
from hand_written import retain_loss, train
from tiny import collate, tiny_llama
from torch.nn.utils import clip_grad_norm_

from blur_optim.integrations.transformers import BLURTrainer
from blur_optim.losses import nll_loss


@pytest.mark.parametrize(
    ("forget", "retain", "max_norm"),
    [
        ("ga", "nll", 0.5),
        ("npo", "nll", 0.5),
        ("simnpo", "kl", 0.005),
        ("dpo", "nll", 0.5),
        ("idk", "kl", 0.5),
        ("margin", "nll", 0.5),
    ],
)
def test_it_trains_as_the_loop_by_hand(tmp_path, forget, retain, max_norm):
    data = PREFERENCES if forget in ("dpo", "idk") else FORGET
    frozen, expected = tiny_llama(), tiny_llama()
    made = trainer(
        tmp_path,
        forget=data,
        forget_loss=forget,
        retain_loss=retain,
        max_grad_norm=max_norm,
        more={"reference": copy.deepcopy(frozen)} if retain == "kl" else {},
    )
    made.train()
    # Five batches in an epoch: the last step of the first has one micro-batch only.
    statistics = train(expected, frozen, data, RETAIN, (forget, retain), steps=4, accumulate=2, max_norm=max_norm)
    assert_same(made.model, expected)
    assert made.state.log_history[-2]["blur_cosine"] == pytest.approx(float(statistics.cosine), rel=1e-3, abs=1e-6)
    assert float(statistics.update_norm) > max_norm, "clipping has to matter"


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 0.3, "retain_weight": 2.0, "rule": "conflict", "normalize": True, "scope": "parameter"},
        {"gamma": 0.3, "metric": "retain", "damping": 0.05},
    ],
    ids=["rule", "metric"],
)
def test_options_reach_the_optimizer(tmp_path, options):
    made, expected = trainer(tmp_path, forget_loss="ga", **options), tiny_llama()
    made.train()
    train(expected, None, FORGET, RETAIN, ("ga", "nll"), steps=4, accumulate=2, max_norm=0.5, **options)
    assert_same(made.model, expected)


def test_a_rule_of_ones_own_a_stash_and_a_backend(tmp_path):
    made = trainer(tmp_path, stash="int8", backend="foreach", more={"rule": lambda dots, gamma, alpha: (gamma, alpha)})
    made.create_optimizer()
    assert made.blur.stash == "int8"
    assert callable(made.blur.rule)


def test_any_optimizer_of_the_trainer_is_the_base(tmp_path):
    made = trainer(tmp_path, optim="sgd", optim_args="momentum=0.5")
    made.create_optimizer()
    assert isinstance(made.blur.base, torch.optim.SGD)
    model = tiny_llama()
    made = trainer(tmp_path, model, more={"optimizers": (torch.optim.RAdam(model.parameters()), None)})
    made.create_optimizer()
    assert isinstance(made.blur.base, torch.optim.RAdam)
    assert len(made.blur.param_groups) == 1


def test_losses_of_ones_own(tmp_path):
    seen = []

    def forget(model, batch):
        seen.append(sorted(batch))
        return -nll_loss(model(input_ids=batch["input_ids"]).logits, batch["labels"])

    made = trainer(tmp_path, more={"forget_loss": forget, "retain_loss": lambda model, batch: model(**batch).loss})
    made.train()
    assert len(seen) == 7
    assert seen[0] == ["attention_mask", "input_ids", "labels"]
    assert not made.reference_path.exists()
    named = trainer(tmp_path, forget_loss="ga")
    named.train()
    assert_same(made.model, named.model, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget_loss": "ga", "beta": 0.1}, r"`beta` must be None with forget_loss='ga'.*got 0\.1\. It is for npo"),
        ({"forget_loss": "margin", "beta": 0.1}, r"`beta` must be None with forget_loss='margin'"),
        ({"simnpo_delta": 0.5}, r"`simnpo_delta` must be 0 with forget_loss='npo', got 0\.5\."),
    ],
    ids=["ga", "margin", "delta"],
)
def test_an_option_of_another_loss_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_an_option_is_that_of_the_loss_that_is_trained(tmp_path):
    """Which a name given to the trainer may be, in place of the arguments' own."""
    made = trainer(tmp_path, simnpo_delta=0.5, beta=1.0, more={"forget_loss": "simnpo"})
    assert made.chosen_losses[0] == "simnpo"
    with pytest.raises(ValueError, match=r"`beta` must be None with forget_loss='ga'"):
        trainer(tmp_path, beta=1.0, more={"forget_loss": "ga"})
    with pytest.raises(ValueError, match=r"`forget_loss` must be one of .*got 'simpno'"):
        trainer(tmp_path, beta=1.0, simnpo_delta=0.5, forget_loss="simpno")


def test_unused_columns(tmp_path):
    """The Trainer's default drops them before the collator; without it they reach the loss."""
    labelled = [{**row, "text": "words", "index": i} for i, row in enumerate(FORGET)]

    def with_index(items):
        batch = collate(items)
        if "index" in items[0]:
            batch["index"] = torch.tensor([item["index"] for item in items])
        return batch

    for keep in (False, True):
        seen = set()

        def forget(model, batch, seen=seen):
            seen.update(batch)
            return -retain_loss("nll", model, None, batch)

        made = trainer(
            tmp_path, forget=labelled, remove_unused_columns=not keep, max_steps=1, more={"forget_loss": forget}
        )
        made.data_collator = with_index
        made.train()
        assert ("index" in seen) is keep


def test_what_is_logged(tmp_path):
    made = trainer(tmp_path, logging_steps=2)
    made.train()
    entry = made.state.log_history[0]
    assert {"loss", "grad_norm", "learning_rate", "forget_loss", "retain_loss", "blur_cosine"} <= entry.keys()
    assert entry["loss"] == pytest.approx(entry["forget_loss"] + entry["retain_loss"], rel=1e-5)
    assert entry["grad_norm"] == pytest.approx(entry["blur_update_norm"], rel=1e-4)
    # NPO at the reference is -2/beta * log(1/2); of the two steps one is past it.
    assert entry["forget_loss"] == pytest.approx(13.863, abs=0.1)
    assert all(isinstance(value, float | int) for value in entry.values())
    assert "forget_loss" not in made.state.log_history[-1]
    assert made.state.total_flos > 0


def test_evaluation_is_the_trainers(tmp_path):
    made = trainer(tmp_path, more={"eval_dataset": {"forget": FORGET, "retain": RETAIN}}, max_steps=1)
    metrics = made.evaluate()
    batch = collate(FORGET)
    expected = tiny_llama()(**batch).loss.item()
    assert metrics["eval_forget_loss"] == pytest.approx(expected, rel=1e-5)
    assert "eval_retain_loss" in metrics


def test_values_are_checked_before_a_model_is_loaded(tmp_path):
    for options, error, match in [
        ({"gamma": -1.0}, ValueError, "`gamma` must be finite and >= 0, got -1.0"),
        ({"rule": "sum"}, ValueError, "`rule` must be one of"),
        (
            {"forget_loss": lambda model, batch: 0.0},
            TypeError,
            r"Pass a function to the trainer: BLURTrainer\(forget_l",
        ),
        ({"retain_loss": ["nll"]}, TypeError, r"`retain_loss` must be a name in these arguments.*got \['nll'\]"),
    ]:
        with pytest.raises(error, match=match):
            arguments(tmp_path, **options)
    with pytest.raises(TypeError, match=r"`train_dataset` must not be given. Pass forget_dataset and retain_dataset"):
        trainer(tmp_path, more={"train_dataset": FORGET})


def test_the_reference_must_be_another_model(tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"`reference` must be another model .* Pass copy.deepcopy\(model\)"):
        trainer(tmp_path, model, more={"reference": model})
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("loss", "got"),
    [(lambda model, batch: 1.0, "float"), (lambda model, batch: model(**batch).logits, r"a tensor of shape \(2, ")],
    ids=["float", "logits"],
)
def test_a_loss_must_be_a_scalar(tmp_path, loss, got):
    with pytest.raises(TypeError, match=rf"`retain_loss` must return the loss as a 0-d tensor, got {got}"):
        trainer(tmp_path, forget_loss="ga", more={"retain_loss": loss}).train()


@pytest.mark.parametrize("loss", ["npo", "simnpo"])
def test_a_loader_of_ones_own(tmp_path, loss):
    class Own(BLURTrainer):
        def get_train_dataloader(self):
            pairs = [self.train_dataset[i] for i in range(8)]
            return torch.utils.data.DataLoader(pairs, batch_size=2, collate_fn=self.pair_collator)

    made = trainer(tmp_path, forget_loss=loss, cls=Own)
    made.train()
    assert made.state.global_step == 4


@pytest.mark.parametrize(
    ("changes", "more", "error", "match"),
    [
        ({"stash": "recompute"}, {}, ValueError, r"`stash` must not be 'recompute' in a Trainer"),
        ({"optim": "lomo"}, {}, ValueError, r"`optim` must step after backward, got 'lomo'"),
        ({"label_smoothing_factor": 0.1}, {}, ValueError, r"`label_smoothing_factor` must be 0, got 0\.1"),
        ({"forget_loss": "nop"}, {}, ValueError, r"`forget_loss` must be one of .*'npo'.* got 'nop'"),
        ({"retain_loss": "nop"}, {}, ValueError, r"`retain_loss` must be one of .*'nll'.* got 'nop'"),
        ({"retain_loss": "kl"}, {}, ValueError, r"`reference` must be a frozen model for the loss 'kl'"),
        ({}, {"reference": "adapter"}, ValueError, r"or 'adapter' with a PEFT model, got 'adapter'"),
        ({"epoch_over": "none"}, {}, ValueError, r"`epoch_over` must be one of"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_is_refused(tmp_path, changes, more, error, match):
    with pytest.raises(error, match=match):
        trainer(tmp_path, more=more, **changes)


def test_what_is_refused_later(tmp_path):
    with pytest.raises(RuntimeError, match=r"no BLUR optimizer before trainer\.train"):
        _ = trainer(tmp_path).blur
    with pytest.raises(ValueError, match=r"forget batch for DPO must have the keys \['chosen', 'rejected'\]"):
        trainer(tmp_path, forget_loss="dpo").train()
    with pytest.raises(TypeError, match=r"`args` must be BLURTrainingArguments, got NoneType"):
        BLURTrainer(tiny_llama(), forget_dataset=FORGET, retain_dataset=RETAIN)
    with pytest.raises(ValueError, match=r"`gamma` must be finite and >= 0"):
        trainer(tmp_path, gamma=-1.0).create_optimizer()


def test_without_clipping(tmp_path):
    made, expected = trainer(tmp_path, max_grad_norm=0.0, forget_loss="ga"), tiny_llama()
    made.train()
    train(expected, None, FORGET, RETAIN, ("ga", "nll"), steps=4, accumulate=2, max_norm=1e9)
    assert_same(made.model, expected)
    assert clip_grad_norm_(expected.parameters(), 1.0) == 0


class TestMetric:
    """What a user is told who comes from plain gradients."""

    def test_clipping_that_has_become_a_smaller_learning_rate_is_said_once(self, tmp_path):
        options = {"forget_loss": "ga", "metric": "retain", "max_grad_norm": 1e-3, "max_steps": 7}
        with pytest.warns(
            UserWarning, match=r"The last 5 updates .* to max_grad_norm=0\.001\..*metric='retain'"
        ) as told:
            trainer(tmp_path, **options).train()
        assert len(told) == 1

    def test_it_is_not_said_again_after_an_update_that_was_not_clipped(self, tmp_path):
        made = trainer(tmp_path, metric="retain", max_grad_norm=1.0)
        made.create_optimizer()
        with pytest.warns(UserWarning, match="were all clipped") as told:
            list(map(made._watch_clipping, (*[2.0] * 5, 0.5, *[2.0] * 5)))
        assert len(told) == 1

    @pytest.mark.parametrize("changes", [{"metric": "euclidean"}, {"max_grad_norm": 0.0}, {"max_grad_norm": 1e6}])
    def test_where_it_is_none_nothing_is_said(self, tmp_path, changes):
        options = {"forget_loss": "ga", "metric": "retain", "max_grad_norm": 1e-3, "max_steps": 6}
        trainer(tmp_path, **{**options, **changes}).train()

    def test_a_weight_that_was_tuned_without_it(self, tmp_path):
        made = trainer(tmp_path, metric="retain", retain_weight=800.0)  # Its arguments alone say nothing.
        with pytest.warns(UserWarning, match=r"`retain_weight` is 800.*in units of lr") as told:
            made.create_optimizer()
        assert len(told) == 1

    def test_an_engine_is_refused_before_it_is_made(self, tmp_path):
        made = trainer(tmp_path)
        made.is_deepspeed_enabled, made.args.metric = True, "retain"
        with pytest.raises(ValueError, match=r"`metric` must be 'euclidean' with an engine, got 'retain'.*FSDP2"):
            made.read_arguments()

    def test_another_optimizer_is_refused(self, tmp_path):
        with pytest.raises(TypeError, match=r"must be AdamW, Adam or SGD with metric='retain', got torch's Adagrad"):
            trainer(tmp_path, metric="retain", optim="adagrad").create_optimizer()

    def test_its_statistics_are_logged(self, tmp_path):
        made = trainer(tmp_path, metric="retain", max_steps=1, max_grad_norm=0.0)
        made.train()
        names = {"blur_metric_cosine", "blur_metric_forget_norm", "blur_metric_retain_norm", "blur_effective_share"}
        assert {"blur_cosine", *names} <= made.state.log_history[0].keys()
