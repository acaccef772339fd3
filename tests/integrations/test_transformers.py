"""BLURTrainer against the loop that one would write by hand, and what a Trainer owes to its users."""

import copy
import functools

import pytest
import torch
from hand_written import retain_loss, train
from tiny import collate, parameters, rows, tiny_llama
from torch.nn.utils import clip_grad_norm_

from blur_optim import BLUR
from blur_optim.losses import ReferenceLogProbs, nll_loss

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from blur_optim.integrations.transformers import BLURTrainer, BLURTrainingArguments  # noqa: E402

FORGET, RETAIN = rows(5, 1), rows(9, 2)
PREFERENCES = [{"chosen": c, "rejected": r} for c, r in zip(rows(5, 3), FORGET, strict=True)]


def arguments(folder, **changes):
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return BLURTrainingArguments(str(folder), **{**options, **changes})


def trainer(folder, model=None, forget=FORGET, retain=RETAIN, *, more=None, cls=BLURTrainer, **changes):
    return cls(
        tiny_llama() if model is None else model,
        arguments(folder, **changes),
        collate,
        forget_dataset=forget,
        retain_dataset=retain,
        **(more or {}),
    )


def assert_same(model, other, rtol=1e-5):
    # Two ways through the same float32 operations: fused or foreach AdamW, a padded batch or two.
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol * 1e-1)


@pytest.mark.parametrize(
    ("forget", "retain", "max_norm"),
    [("ga", "nll", 0.5), ("npo", "nll", 0.5), ("simnpo", "kl", 0.005), ("dpo", "nll", 0.5), ("idk", "kl", 0.5)],
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


def test_options_reach_the_optimizer(tmp_path):
    options = {"gamma": 0.3, "retain_weight": 2.0, "rule": "conflict", "normalize": True, "scope": "parameter"}
    made, expected = trainer(tmp_path, forget_loss="ga", **options), tiny_llama()
    made.train()
    train(expected, None, FORGET, RETAIN, ("ga", "nll"), steps=4, accumulate=2, max_norm=0.5, **options)
    assert_same(made.model, expected)
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


@pytest.mark.parametrize("at", [2, 3])
def test_resuming_is_as_if_never_interrupted(tmp_path, at):
    """Three steps are one epoch: a checkpoint in the middle of one, and one at its end."""
    through = trainer(tmp_path / "through", max_steps=5, lr_scheduler_type="linear")
    through.train()
    options = {"save_strategy": "steps", "save_steps": at, "lr_scheduler_type": "linear", "max_steps": 5}
    first = trainer(tmp_path / "parts", **options)
    first.train()
    again = trainer(tmp_path / "parts", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{at}"))
    assert again.state.global_step == 5
    assert again.reference_log_probs.computed == 0
    for p, q in zip(again.model.parameters(), through.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_resuming_from_the_trained_model(tmp_path):
    """Some load the checkpoint as the model; what it is compared with is still the model before."""
    first = trainer(tmp_path, save_strategy="steps", save_steps=2)
    first.train()
    checkpoint = tmp_path / "checkpoint-2"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    again = trainer(tmp_path, model)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert_same(again.model, first.model)
    (tmp_path / "reference.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"`reference_file` must be the file of the run that is resumed"):
        trainer(tmp_path, model).train(resume_from_checkpoint=str(checkpoint))


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


def test_a_batch_that_a_callback_reads_takes_nothing_from_training(tmp_path):
    class Reader(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            next(iter(made.get_train_dataloader()))

    made, plain = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    made.add_callback(Reader())
    made.train()
    plain.train()
    assert_same(made.model, plain.model)


def test_the_reference_is_computed_once(tmp_path):
    first = trainer(tmp_path, max_steps=1)
    first.train()
    assert first.reference_log_probs.computed == len(FORGET)
    second = trainer(tmp_path, max_steps=1)
    second.train()
    assert second.reference_log_probs.computed == 0
    with pytest.raises(ValueError, match=r"must name a file with the log-probabilities of the model"):
        trainer(tmp_path, tiny_llama(seed=1), max_steps=1).train()


def test_references_that_are_given(tmp_path):
    stored = ReferenceLogProbs.load_or_compute(tmp_path / "mine", tiny_llama(), [collate(FORGET)], progress=False)
    models = []
    for reference in (None, stored, tiny_llama()):
        made = trainer(tmp_path / "out", more={"reference": reference})
        made.train()
        models.append(made.model)
    assert_same(models[0], models[1])
    assert_same(models[0], models[2])


def test_gradient_checkpointing(tmp_path):
    def counted():
        model, calls = tiny_llama(), []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
        return model, calls

    model, once = counted()
    plain = trainer(tmp_path, model, forget_loss="ga")
    plain.train()
    # Renamed on the way to transformers 6.
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(plain.args, n))
    model, twice = counted()
    saving = trainer(tmp_path, model, forget_loss="ga", **{name: True, f"{name}_kwargs": {"use_reentrant": False}})
    saving.train()
    assert len(twice) == 2 * len(once)
    assert_same(saving.model, plain.model)


def test_bfloat16_autocast(tmp_path):
    made, expected = trainer(tmp_path, bf16=True), tiny_llama()
    made.train()

    class Autocast(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        @functools.wraps(torch.nn.Module.forward)
        def forward(self, **inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(**inputs)

    frozen = Autocast(tiny_llama())
    train(Autocast(expected), frozen, FORGET, RETAIN, steps=4, accumulate=2, max_norm=0.5)
    # Log-probabilities of batches that are padded otherwise differ in bfloat16's rounding, 2^-8.
    assert_same(made.model, expected, rtol=2e-3)
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert made.state.log_history[0]["forget_loss"] == pytest.approx(13.863, abs=0.05)


def scaled(made, scale):
    """Give an accelerator of a CPU the loss scaling that it has for float16 on a GPU."""
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
    made.accelerator.native_amp = True
    made.accelerator.state._mixed_precision = "fp16"
    return made


@pytest.fixture
def unscaled_state():
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("unscaled_state")
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_loss_scale_changes_nothing(tmp_path, optim, monkeypatch):
    """The update is made of scaled gradients, then unscaled, then clipped."""
    plain = trainer(tmp_path, optim=optim, normalize=True)
    plain.train()
    made = scaled(trainer(tmp_path, optim=optim, normalize=True), 1024.0)
    # Autocast to float16 is not what is tested, nor are its roundings.
    monkeypatch.setattr("accelerate.accelerator.get_mixed_precision_context_manager", _no_autocast)
    made.train()
    assert_same(made.model, plain.model)
    for entry, expected in zip(made.state.log_history[:-1], plain.state.log_history[:-1], strict=True):
        assert entry["blur_forget_norm"] == pytest.approx(expected["blur_forget_norm"], rel=1e-4)
        assert entry["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.usefixtures("unscaled_state")
def test_an_overflow_skips_the_step_and_lowers_the_scale(tmp_path, monkeypatch):
    made = scaled(trainer(tmp_path, forget_loss="ga", max_steps=1, optim="adamw_torch"), 2.0**120)
    monkeypatch.setattr("accelerate.accelerator.get_mixed_precision_context_manager", _no_autocast)
    before = parameters(made.model)
    made.train()
    assert all(torch.equal(p, b) for p, b in zip(made.model.parameters(), before, strict=True))
    assert made.accelerator.scaler.get_scale() == 2.0**119
    assert made.blur.statistics.skipped == 1


def _no_autocast(*args, **kwargs):
    return torch.autocast("cpu", enabled=False)


def test_training_twice_goes_on(tmp_path):
    made = trainer(tmp_path, max_steps=2)
    made.train()
    optimizer, reference = made.blur, made.reference_log_probs
    made.train()
    assert isinstance(made.blur, BLUR)
    assert not isinstance(made.blur.base, BLUR)
    assert made.blur is optimizer
    assert made.reference_log_probs is reference


def test_a_run_that_was_interrupted_between_micro_batches(tmp_path):
    made = trainer(tmp_path, max_steps=1)
    made._pending.append({"forget": "stale"})
    made.train()
    assert made.state.global_step == 1


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


def test_worker_processes_change_nothing(tmp_path):
    made, plain = trainer(tmp_path, dataloader_num_workers=1), trainer(tmp_path)
    made.train()
    plain.train()
    assert all(torch.equal(p, q) for p, q in zip(made.model.parameters(), plain.model.parameters(), strict=True))


def test_without_clipping(tmp_path):
    made, expected = trainer(tmp_path, max_grad_norm=0.0, forget_loss="ga"), tiny_llama()
    made.train()
    train(expected, None, FORGET, RETAIN, ("ga", "nll"), steps=4, accumulate=2, max_norm=1e9)
    assert_same(made.model, expected)
    assert clip_grad_norm_(expected.parameters(), 1.0) == 0
