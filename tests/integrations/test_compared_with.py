"""What BLURTrainer compares with, and what it gives to a model: the numbers that a run has to begin with."""

import copy
import math

import pytest
import torch
from blur_trainer import FORGET, PREFERENCES, RETAIN, trainer
from tiny import VOCABULARY, collate, tiny_llama
from torch import nn

from blur_optim.losses import nll_loss

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from transformers.utils import ModelOutput  # noqa: E402

# peft 0.21 reads the older of two names that transformers 5.23 has for it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_gradient_checkpointing|past_key_values)` is deprecated:FutureWarning"
)

AT_THE_REFERENCE = 2 / 0.1 * math.log(2)  # NPO and DPO of a model compared with itself, beta 0.1: 13.863


def first_losses(folder, model, *, more=None, cls=None, **changes):
    options = {"max_steps": 1, "gradient_accumulation_steps": 1, **changes}
    made = trainer(folder, model, more=more, **options, **({} if cls is None else {"cls": cls}))
    made.train()
    log = made.state.log_history[0]
    return log["forget_loss"], log["retain_loss"]


def adapted(config, **options):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(
        tiny_llama(initializer_range=0.3), getattr(peft, config)(task_type="CAUSAL_LM", **options)
    )


def lora(**options):
    return adapted("LoraConfig", r=4, target_modules=["q_proj", "v_proj"], **options)


def trained_lora():
    model = lora()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return model


def two_adapters():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = trained_lora()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    for name, p in model.named_parameters():
        p.requires_grad_("second" in name)
    return model


ADAPTERS = {
    "trained": trained_lora,
    "second on a frozen first": two_adapters,
    "PiSSA": lambda: lora(init_lora_weights="pissa"),
    "OLoRA": lambda: lora(init_lora_weights="olora"),
    "prompt tuning": lambda: adapted("PromptTuningConfig", num_virtual_tokens=3),
    "p-tuning": lambda: adapted("PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=8),
}


class TestAdapters:
    @pytest.mark.parametrize("make", ADAPTERS.values(), ids=ADAPTERS.keys())
    def test_npo_begins_at_the_model_as_it_is(self, tmp_path, make):
        forget, _ = first_losses(tmp_path, make(), forget_loss="npo")
        assert forget == pytest.approx(AT_THE_REFERENCE, rel=1e-5)

    def test_dpo_too(self, tmp_path):
        forget, _ = first_losses(tmp_path, trained_lora(), forget=PREFERENCES, forget_loss="dpo")
        assert forget == pytest.approx(AT_THE_REFERENCE, rel=1e-5)

    @pytest.mark.parametrize("make", ADAPTERS.values(), ids=ADAPTERS.keys())
    def test_kl_asks_for_the_reference(self, tmp_path, make):
        model = make()
        with pytest.raises(
            ValueError, match=r"`reference` must be given for the loss 'kl' with a PEFT adapter that does"
        ):
            first_losses(tmp_path, model, forget_loss="ga", retain_loss="kl")
        _, retain = first_losses(
            tmp_path, model, forget_loss="ga", retain_loss="kl", more={"reference": copy.deepcopy(model)}
        )
        assert retain == pytest.approx(0, abs=1e-6)  # Rounding of probabilities of about 1/29, summed over 29.

    def test_kl_of_a_fresh_adapter_needs_none(self, tmp_path):
        _, retain = first_losses(tmp_path, lora(), forget_loss="ga", retain_loss="kl")
        assert retain == pytest.approx(0, abs=1e-6)

    def test_the_bare_base_where_it_is_asked_for(self, tmp_path):
        forget, retain = first_losses(
            tmp_path, trained_lora(), forget_loss="npo", retain_loss="kl", more={"reference": "adapter"}
        )
        assert abs(forget - AT_THE_REFERENCE) > 1
        assert retain > 0.01

    def test_kl_of_a_run_that_is_resumed_or_goes_on(self, tmp_path):
        options = {"forget_loss": "ga", "retain_loss": "kl", "save_strategy": "steps", "save_steps": 2}
        made = trainer(tmp_path, lora(), **options)
        made.train()
        made.train()  # The adapter is trained by now, by this very run.
        again = trainer(tmp_path, lora(), **options)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert again.state.global_step == 4


def gpt2():
    """Positions are learned: where a row begins matters."""
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, **shape, **dropouts)
    return transformers.GPT2LMHeadModel(config)


def pad_left(items):
    width = max(len(item["input_ids"]) for item in items)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {n: torch.tensor([[v] * (width - len(i[n])) + i[n] for i in items]) for n, v in fill.items()}


class TestPaddingOnTheLeft:
    def test_positions_are_those_of_the_reference(self, tmp_path):
        made = trainer(tmp_path, gpt2(), max_steps=1, gradient_accumulation_steps=1, forget_loss="npo")
        made.data_collator = pad_left
        made.train()
        # Rows of a reference batch of five are not as wide as in a batch of two.
        assert made.state.log_history[0]["forget_loss"] == pytest.approx(AT_THE_REFERENCE, rel=1e-5)

    def test_evaluation_has_them_too(self, tmp_path):
        made = trainer(tmp_path, gpt2(), more={"eval_dataset": FORGET}, per_device_eval_batch_size=5)
        expected = made.evaluate()["eval_loss"]
        made.data_collator = pad_left
        assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


class Images(nn.Module):
    """Text and one image a row, which shifts the row's logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids, attention_mask=None, pixel_values=None, labels=None):
        logits = self.table(input_ids) * pixel_values[:, :1, None]
        loss = None if labels is None else nll_loss(logits, labels)
        return ModelOutput(loss=loss, logits=logits)


def with_images(rows):
    return [{**row, "pixel_values": [float(i + 1), 0.5]} for i, row in enumerate(rows)]


def collate_images(items):
    return {**collate(items), "pixel_values": torch.tensor([item["pixel_values"] for item in items])}


def test_images_reach_the_model_in_training_and_the_stored_reference(tmp_path):
    rows = with_images(RETAIN)
    made = trainer(
        tmp_path, Images(), with_images(FORGET), rows, max_steps=1, gradient_accumulation_steps=1,
        per_device_train_batch_size=9, per_device_eval_batch_size=9, more={"eval_dataset": rows},
    )  # fmt: skip
    made.data_collator = collate_images
    in_evaluation = made.evaluate()["eval_loss"]
    made.train()
    log = made.state.log_history[0]
    assert log["forget_loss"] == pytest.approx(AT_THE_REFERENCE, rel=1e-5)
    assert log["retain_loss"] == pytest.approx(in_evaluation, rel=1e-5)


def flatten(items):
    """As transformers' DataCollatorWithFlattening does."""
    return {
        "input_ids": torch.tensor([[token for item in items for token in item["input_ids"]]]),
        "labels": torch.tensor([[label for item in items for label in [-100, *item["labels"][1:]]]]),
        "position_ids": torch.tensor([[i for item in items for i in range(len(item["input_ids"]))]]),
    }


class TestFlattenedRows:
    @pytest.mark.parametrize("loss", ["npo", "simnpo"])
    def test_losses_that_are_means_over_answers_refuse_them(self, tmp_path, loss):
        made = trainer(tmp_path, forget_loss=loss, max_steps=1)
        made.data_collator = flatten
        with pytest.raises(
            ValueError, match=r"one answer in each row for NPO, SimNPO and DPO.*'ga', 'margin', 'nll', 'kl'"
        ):
            made.train()

    def test_means_over_tokens_are_those_of_padded_rows(self, tmp_path):
        losses = []
        for collator in (collate, flatten):
            made = trainer(
                tmp_path,
                forget_loss="ga",
                retain_loss="kl",
                max_steps=2,
                more={"reference": tiny_llama()},
                learning_rate=0.1,
            )
            made.data_collator = collator
            made.train()
            losses.append([log[name] for log in made.state.log_history[:2] for name in ("forget_loss", "retain_loss")])
        assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)
        assert losses[0][3] > 0.01, "the second KL has to say something"


def test_the_router_s_loss_is_trained_with(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, **shape, num_key_value_heads=2, num_local_experts=4, output_router_logits=True,
        router_aux_loss_coef=0.5,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    batch = collate(RETAIN)
    with torch.no_grad():
        expected = model(**batch).loss.item()
        bare = nll_loss(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
        )
    assert expected - bare.item() > 0.4, "it has to matter"
    forget, retain = first_losses(tmp_path, model, forget_loss="ga", per_device_train_batch_size=9)
    assert retain == pytest.approx(expected, rel=1e-5)
    assert forget < 0, "it is no part of the forget loss"


class TestLossesThatWouldNeverBeCalled:
    def test_compute_loss_func(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"`compute_loss_func` must not be given.*Pass forget_loss= and retain_loss="
        ):
            trainer(tmp_path, more={"compute_loss_func": lambda outputs, labels, **_: outputs.logits.sum()})

    def test_compute_loss(self, tmp_path):
        from blur_optim.integrations.transformers import BLURTrainer

        class Own(BLURTrainer):
            def compute_loss(self, model, inputs, **kwargs):
                return super().compute_loss(model, inputs, **kwargs)

        with pytest.raises(
            ValueError, match=r"`compute_loss` must not be overridden, got Own's own.*compute_forget_loss"
        ):
            trainer(tmp_path, cls=Own)

    def test_an_encoder_decoder(self, tmp_path):
        torch.manual_seed(0)
        shape = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        config = transformers.BartConfig(
            vocab_size=VOCABULARY, d_model=16, **shape, encoder_ffn_dim=16, decoder_ffn_dim=16,
            max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
            forced_eos_token_id=2,
        )  # fmt: skip
        model = transformers.BartForConditionalGeneration(config)
        with pytest.raises(
            ValueError, match=r"must be a causal model.*an encoder-decoder model.*forget_loss=, retain_loss="
        ):
            trainer(tmp_path, model, forget_loss="ga").train()
        own = {
            "forget_loss": lambda model, batch: -model(**batch).loss,
            "retain_loss": lambda model, batch: model(**batch).loss,
        }
        trainer(tmp_path, model, more=own, max_steps=1).train()

    def test_nothing_to_train(self, tmp_path):
        model = tiny_llama().requires_grad_(False)
        with pytest.raises(ValueError, match=r"`model` must have parameters to train.*is_trainable=True"):
            trainer(tmp_path, model)
