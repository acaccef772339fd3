"""BLURModule against the loop that one would write by hand."""

import pytest
import torch
from hand_written import forget_loss, pairs_of_batches, retain_loss, train
from tiny import rows, tiny_llama
from torch.utils.data import DataLoader

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from blur_optim.integrations.lightning import BLURModule, LightningBLUR, RecordCallback
from blur_optim.record import read_record

FORGET, RETAIN = rows(6, 1), rows(8, 2)
# Lightning recommends workers for the loader, and uses an older spelling of torch's pytrees.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec:FutureWarning"),
]


class Unlearn(BLURModule):
    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options, self.seen = model, options, []

    def configure_optimizers(self):
        groups = [
            {"params": [p for p in self.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        return LightningBLUR(groups, torch.optim.AdamW, lr=1e-3, **self.options)

    def training_step(self, batch, index):
        self.blur_step(forget=[f for f, _ in batch], retain=[r for _, r in batch])

    def forget_loss(self, batch):
        return forget_loss("ga", self.model, None, batch)

    def retain_loss(self, batch):
        return retain_loss("nll", self.model, None, batch)

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item())


def two_steps():
    (batches,) = pairs_of_batches(FORGET, RETAIN, 2, 42, 1)
    return [batches[:2], batches[2:]]


def fit(module, folder, steps=None, ckpt_path=None, **options):
    made = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"max_epochs": 1, **options},
    )
    made.fit(module, DataLoader(two_steps() if steps is None else steps, batch_size=None), ckpt_path=ckpt_path)
    return made


@pytest.mark.parametrize(
    ("precision", "options"),
    [("32-true", {}), ("bf16-mixed", {}), ("32-true", {"metric": "retain", "damping": 0.05, "gamma": 0.3})],
    ids=["float32", "bfloat16", "metric"],
)
def test_it_trains_as_the_loop_by_hand(tmp_path, precision, options):
    module, expected = Unlearn(tiny_llama(), max_grad_norm=0.5, **options), tiny_llama()
    made = fit(module, tmp_path, precision=precision)
    if precision == "32-true":
        train(expected, None, FORGET, RETAIN, ("ga", "nll"), steps=2, accumulate=2, max_norm=0.5, **options)
        for p, q in zip(module.model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert made.global_step == 2
    assert made.callback_metrics["forget_loss"] < 0 < made.callback_metrics["retain_loss"]
    assert -1 <= made.callback_metrics["blur_cosine"] <= 1
    # Hooks see the clipped update.
    assert module.seen == pytest.approx([0.5, 0.5], rel=1e-4)


def test_a_loss_scale_changes_nothing(tmp_path):
    from lightning.pytorch.plugins import MixedPrecision

    plain, module = Unlearn(tiny_llama(), max_grad_norm=0.5), Unlearn(tiny_llama(), max_grad_norm=0.5)
    fit(plain, tmp_path, precision="bf16-mixed")
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fit(module, tmp_path, plugins=plugin)
    for p, q in zip(module.model.parameters(), plain.model.parameters(), strict=True):
        # Scaling by a power of two is exact, so only what is summed in another order differs.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"forget": {"input_ids": 1}}, TypeError, r"`forget` must be a list of batches, got dict. Wrap one batch"),
        ({"retain": []}, ValueError, r"`retain` must hold at least one batch, got none"),
    ],
)
def test_lists_of_batches(tmp_path, changes, error, match):
    class Wrong(Unlearn):
        def training_step(self, batch, index):
            self.blur_step(**{"forget": [f for f, _ in batch], "retain": [r for _, r in batch], **changes})

    with pytest.raises(error, match=match):
        fit(Wrong(tiny_llama()), tmp_path)


def test_a_loss_must_be_a_scalar(tmp_path):
    class Wrong(Unlearn):
        def retain_loss(self, batch):
            return None

    with pytest.raises(TypeError, match=r"`retain_loss` must return the loss as a 0-d tensor, got NoneType"):
        fit(Wrong(tiny_llama()), tmp_path)


def test_another_optimizer_is_refused(tmp_path):
    class Wrong(Unlearn):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(TypeError, match=r"`configure_optimizers` must give one LightningBLUR, got SGD"):
        fit(Wrong(tiny_llama()), tmp_path)


def test_a_line_for_each_step(tmp_path):
    class Scheduled(Unlearn):
        def training_step(self, batch, index):
            super().training_step(batch, index)
            for group in self.optimizers().param_groups:
                group["lr"] *= 0.5

    module, plain, path = Scheduled(tiny_llama()), Scheduled(tiny_llama()), tmp_path / "run.jsonl"
    made = fit(module, tmp_path, callbacks=[RecordCallback(path, alignment=True)])
    fit(plain, tmp_path)
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    record = read_record(path)
    assert [line["step"] for line in record.steps] == [1, 2]
    last = record.steps[-1]
    for name in ("forget_loss", "retain_loss"):
        assert last[name] == pytest.approx(made.callback_metrics[name].item(), rel=1e-6)
    assert last["cosine"] == pytest.approx(made.callback_metrics["blur_cosine"].item(), rel=1e-6)
    # The rate that the step was taken with, not the next one.
    assert [line["lr"] for line in record.steps] == [1e-3, 5e-4]
    assert set(record.metadata["parameters"]) == {name for name, _ in module.named_parameters()}
    assert len(last["alignment"]["cosine"]) == len(record.metadata["parameters"])
    assert module.recorder is None


def test_a_record_goes_on_where_a_checkpoint_was_taken(tmp_path):
    path, steps = tmp_path / "run.jsonl", two_steps()
    made = fit(Unlearn(tiny_llama()), tmp_path, steps[:1], callbacks=[RecordCallback(path)])
    made.save_checkpoint(tmp_path / "at-1.ckpt")
    made.fit_loop.max_epochs = 2
    made.fit(made.lightning_module, DataLoader(steps[1:], batch_size=None))
    before = read_record(path).steps
    again = [RecordCallback(path)]
    fit(Unlearn(tiny_llama()), tmp_path, steps[1:], tmp_path / "at-1.ckpt", max_epochs=2, callbacks=again)
    after = read_record(path).steps
    assert [line["step"] for line in before] == [line["step"] for line in after] == [1, 2]
    assert after[0] == before[0]
    assert after[1]["time"] > before[1]["time"]


def test_a_failed_run_closes_its_record(tmp_path):
    class Failing(Unlearn):
        def retain_loss(self, batch):
            raise ZeroDivisionError

    module = Failing(tiny_llama())
    with pytest.raises(ZeroDivisionError):
        fit(module, tmp_path, callbacks=[RecordCallback(tmp_path / "run.jsonl")])
    assert module.recorder is None
    with pytest.raises(TypeError, match=r"RecordCallback needs a BLURModule, got BoringModel"):
        fit(BoringModel(), tmp_path, callbacks=[RecordCallback(tmp_path / "run.jsonl")])
