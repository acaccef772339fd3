"""A run of BLURTrainer: resuming, references, precision, workers, and what may happen in between."""

import functools

import pytest
import torch
import transformers
from blur_trainer import FORGET, RETAIN, assert_same, trainer
from hand_written import train
from tiny import collate, parameters, tiny_llama

from blur_optim import BLUR
from blur_optim.losses import ReferenceLogProbs


@pytest.mark.parametrize(("at", "metric"), [(2, "euclidean"), (3, "euclidean"), (2, "retain")])
def test_resuming_is_as_if_never_interrupted(tmp_path, at, metric):
    """Three steps are one epoch: a checkpoint in the middle of one, and one at its end."""
    options = {"lr_scheduler_type": "linear", "max_steps": 5, "metric": metric, "max_grad_norm": 10.0}
    through = trainer(tmp_path / "through", **options)
    through.train()
    options |= {"save_strategy": "steps", "save_steps": at}
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
@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adamw_torch", "normalize": True},
        {"optim": "adamw_torch_fused", "normalize": True},
        {"optim": "adamw_torch_fused", "metric": "retain"},
    ],
    ids=["adamw_torch", "adamw_torch_fused", "metric"],
)
def test_a_loss_scale_changes_nothing(tmp_path, options, monkeypatch):
    """The update is made of scaled gradients, then unscaled, then clipped."""
    plain = trainer(tmp_path, **options)
    plain.train()
    made = scaled(trainer(tmp_path, **options), 1024.0)
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


def test_worker_processes_change_nothing(tmp_path):
    made, plain = trainer(tmp_path, dataloader_num_workers=1), trainer(tmp_path)
    made.train()
    plain.train()
    assert all(torch.equal(p, q) for p, q in zip(made.model.parameters(), plain.model.parameters(), strict=True))


def test_a_batch_that_a_callback_reads_takes_nothing_from_training(tmp_path):
    class Reader(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            next(iter(made.get_train_dataloader()))

    made, plain = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    made.add_callback(Reader())
    made.train()
    plain.train()
    assert_same(made.model, plain.model)
