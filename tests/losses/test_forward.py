"""What reaches a model, and that the reference is run as the model is: the values that were wrong without a word."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from blur_optim.losses import (
    ReferenceLogProbs,
    adapter_changes,
    model_logits,
    nll_loss,
    npo_loss,
    reference_log_probs,
    reference_logits,
    run_model,
    sequence_log_probs,
)
from blur_optim.losses.fingerprints import example_keys
from blur_optim.losses.forward import check_one_answer_a_row, positions_from, router_loss, takes_positions, unwrapped

AT_THE_REFERENCE = 2 / 0.1 * math.log(2)  # NPO of a model compared with itself, beta 0.1: 13.863
IDS = torch.tensor([[3, 5, 7, 2], [4, 6, 1, 8]])
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}


class Images(nn.Module):
    """A model of text and images: the image scales the logits of its row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 9)
        self.calls = []

    def forward(self, input_ids, attention_mask=None, pixel_values=None, use_cache=True):
        self.calls.append({"pixel_values": pixel_values, "use_cache": use_cache})
        logits = self.table(input_ids)
        return SimpleNamespace(logits=logits if pixel_values is None else logits * brightness(pixel_values))


def images():
    return torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2).float() / 10 + 1


def brightness(pixel_values):
    return pixel_values.mean((1, 2, 3))[:, None, None]


SHAPE = {
    "vocab_size": 9,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def small(config, **shape):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**SHAPE, **shape})).train()


def llama():
    return small("LlamaConfig", initializer_range=0.5)


class TestWhatReachesTheModel:
    def test_everything_that_forward_takes(self):
        model, batch = Images(), {**BATCH, "pixel_values": images(), "index": torch.arange(2), "text": ["a", "b"]}
        logits = model_logits(model, batch)
        torch.testing.assert_close(logits, model.table(IDS) * brightness(images()))
        (call,) = model.calls
        assert call["pixel_values"] is batch["pixel_values"]
        assert call["use_cache"] is False
        torch.testing.assert_close(reference_logits(model, batch), logits.detach())

    def test_what_no_part_of_it_reads_is_refused(self):
        message = r"`batch` must hold what the model's forward takes, got \['token_type_ids'\], which Images does not "
        with pytest.raises(ValueError, match=message):
            run_model(Images(), {**BATCH, "token_type_ids": torch.zeros_like(IDS)})

    def test_kwargs_are_read_if_a_part_names_them(self):
        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Images()

            def forward(self, input_ids, **kwargs):
                return self.inner(input_ids, **kwargs)

        batch = {**BATCH, "pixel_values": images()}
        torch.testing.assert_close(model_logits(Outer(), batch), model_logits(Images(), batch))
        with pytest.raises(ValueError, match=r"got \['token_type_ids'\], which Outer does not read"):
            run_model(Outer(), {**BATCH, "token_type_ids": torch.zeros_like(IDS)})

    def test_a_wrapper_is_looked_through(self):
        model = Images()
        assert unwrapped(nn.DataParallel(model)) is model
        with pytest.raises(ValueError, match="which Images does not read"):
            run_model(nn.DataParallel(model), {**BATCH, "token_type_ids": IDS})

    def test_embeddings_in_the_place_of_tokens(self):
        model = llama()
        by_tokens = model_logits(model, BATCH)
        embedded = {**BATCH, "inputs_embeds": model.get_input_embeddings()(IDS)}
        del embedded["input_ids"]
        torch.testing.assert_close(model_logits(model, embedded), by_tokens)
        torch.testing.assert_close(reference_log_probs(model, embedded), reference_log_probs(model, BATCH))

    @pytest.mark.parametrize(
        ("kind", "config", "shape", "what"),
        [
            ("T5ForConditionalGeneration", "T5Config", {"d_model": 8, "d_kv": 4, "num_layers": 1}, "an encoder-dec"),
            ("BertForMaskedLM", "BertConfig", {**SHAPE, "num_hidden_layers": 1}, "one of the kind ForMaskedLM"),
        ],
        ids=["encoder-decoder", "masked"],
    )
    def test_logits_that_mean_something_else_are_refused(self, kind, config, shape, what):
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        model = getattr(transformers, kind)(getattr(transformers, config)(**{"vocab_size": 9, **shape}))
        with pytest.raises(ValueError, match=rf"`model` must be a causal model.*{what}.*Pass losses of your own"):
            model_logits(model, BATCH)


class TestRunAlike:
    def test_packed_documents_do_not_see_each_other_in_a_reference_either(self):
        """transformers makes a cache unless told not to, and with one it lets packed documents attend to each other."""
        model = llama()  # config.use_cache is on, as it is in every checkpoint.
        packed = {"input_ids": IDS.view(1, -1), "position_ids": torch.arange(4).repeat(1, 2), "labels": IDS.view(1, -1)}
        apart = torch.cat([reference_logits(model, {"input_ids": row[None]}) for row in IDS], dim=1)
        # Float32: two layers of matrices of 16 columns in another order.
        torch.testing.assert_close(reference_logits(model, packed), apart, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model_logits(model.eval(), packed).detach(), apart, rtol=1e-4, atol=1e-5)

    def test_positions_count_the_tokens_attended_to(self):
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
        assert positions_from(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]

    def test_which_models_take_positions(self):
        assert takes_positions(llama())
        assert not takes_positions(Images())

    @pytest.mark.parametrize("size", [2, 3], ids=["a batch of two", "a batch of three"])
    def test_rows_that_several_answers_were_flattened_into(self, size):
        ids = torch.ones(size, 6).long()
        labels = ids.clone()
        positions = torch.tensor([0, 1, 2, 0, 1, 2]).expand(size, 6)
        with pytest.raises(ValueError, match=r"`batch` must hold one answer in each row for NPO, SimNPO and DPO"):
            check_one_answer_a_row({"input_ids": ids, "labels": labels, "position_ids": positions})
        first_only = labels.clone()
        first_only[:, 3:] = -100  # A second sequence without labels, such as padding.
        check_one_answer_a_row({"input_ids": ids, "labels": first_only, "position_ids": positions})
        check_one_answer_a_row({"input_ids": ids, "labels": labels})  # Text that was joined and cut: one sequence.
        mask = torch.tensor([0, 0, 0, 1, 1, 1]).expand(size, 6)
        check_one_answer_a_row({"labels": labels, "attention_mask": mask, "position_ids": positions_from(mask)})

    def test_flattened_rows_are_refused_wherever_answers_are_summed(self):
        batch = {"input_ids": IDS.view(1, -1), "labels": IDS.view(1, -1), "position_ids": torch.arange(4).repeat(1, 2)}
        for use in (lambda: reference_log_probs(llama(), batch), lambda: example_keys(batch)):
            with pytest.raises(ValueError, match="one answer in each row"):
                use()
        lengths = torch.tensor([0, 4, 8], dtype=torch.int32)
        with pytest.raises(ValueError, match="one answer in each row"):
            check_one_answer_a_row({"labels": IDS.view(1, -1), "cu_seq_lens_q": lengths})


class TestKeys:
    def test_images_are_part_of_an_example(self):
        plain, shown = example_keys(BATCH), example_keys({**BATCH, "pixel_values": images()})
        other = example_keys({**BATCH, "pixel_values": images().flip(0)})
        assert len({*plain, *shown, *other}) == 6
        alone = [
            example_keys({**{n: v[i : i + 1] for n, v in BATCH.items()}, "pixel_values": images()[i : i + 1]})[0]
            for i in range(2)
        ]
        assert alone == shown

    def test_padding_changes_no_key_of_token_types(self):
        types = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
        pad = {n: nn.functional.pad(v, (2, 0), value=-100 if n == "labels" else 0) for n, v in BATCH.items()}
        pad["labels"][:, 2] = -100  # Nothing predicts it in the first column, so it must not count here either.
        expected = example_keys({**BATCH, "token_type_ids": types})
        assert example_keys({**pad, "token_type_ids": nn.functional.pad(types, (2, 0))}) == expected
        assert example_keys({**BATCH, "token_type_ids": 1 - types}) != expected

    def test_patches_of_unknown_rows_are_refused(self):
        patches = torch.zeros(7, 3)
        with pytest.raises(ValueError, match=r"`batch\['pixel_values'\]` must have one row for each of the batch's 2"):
            example_keys({**BATCH, "pixel_values": patches})
        one = {n: v[:1] for n, v in BATCH.items()}
        assert example_keys({**one, "pixel_values": patches}) != example_keys({**one, "pixel_values": patches + 1})

    def test_stored_ones_are_those_of_the_images(self, tmp_path):
        batch = {**BATCH, "pixel_values": images()}
        stored = ReferenceLogProbs.load_or_compute(tmp_path / "r", Images(), [batch], progress=False)
        expected = sequence_log_probs(model_logits(Images(), batch), IDS).detach()
        torch.testing.assert_close(stored(batch), expected)
        with pytest.raises(ValueError, match="that are not"):
            stored(BATCH)
        # One row known, the other new: only that one is computed, with its own image.
        changed = {**batch, "pixel_values": torch.cat([images()[:1], 2 * images()[1:]])}
        model = Images()
        stored = ReferenceLogProbs.load_or_compute(tmp_path / "r", model, [changed], progress=False)
        assert [len(call["pixel_values"]) for call in model.calls] == [1]
        torch.testing.assert_close(stored(changed), sequence_log_probs(model_logits(Images(), changed), IDS).detach())


# peft 0.21 asks transformers 5.23 for names that are deprecated there.
@pytest.mark.filterwarnings("ignore:`(is_gradient_checkpointing|past_key_values)` is deprecated:FutureWarning")
class TestAdapters:
    @staticmethod
    def adapt(config, **options):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        if config == "LoraConfig":
            options = {"target_modules": ["q_proj", "down_proj"], "r": 2, **options}
        return peft.get_peft_model(llama(), getattr(peft, config)(task_type="CAUSAL_LM", **options))

    @pytest.mark.parametrize(
        ("config", "options", "changes"),
        [
            ("LoraConfig", {}, False),
            ("LoraConfig", {"use_dora": True}, False),
            ("LoraConfig", {"init_lora_weights": False}, True),
            ("LoraConfig", {"init_lora_weights": "pissa"}, True),
            ("IA3Config", {"target_modules": ["k_proj"], "feedforward_modules": []}, False),
            ("PromptTuningConfig", {"num_virtual_tokens": 3}, True),
            ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}, True),
            ("PrefixTuningConfig", {"num_virtual_tokens": 3}, True),
        ],
        ids=["fresh", "DoRA", "trained", "PiSSA", "IA3", "prompt", "p-tuning", "prefix"],
    )
    def test_whether_switching_it_off_changes_the_model(self, tmp_path, config, options, changes):
        model = self.adapt(config, **options)
        modes = {name: module.training for name, module in model.named_modules()}
        assert adapter_changes(model, BATCH) is changes
        assert {name: module.training for name, module in model.named_modules()} == modes
        # Whatever it is: stored before the first step, NPO begins where it has to.
        stored = ReferenceLogProbs.load_or_compute(tmp_path / "r", model, [BATCH], progress=False)
        logits = model_logits(model.eval(), BATCH)
        assert logits.shape == (2, 4, 9)
        loss = npo_loss(sequence_log_probs(logits, IDS), stored(BATCH), beta=0.1)
        assert loss.item() == pytest.approx(AT_THE_REFERENCE, rel=1e-5)
        loss.backward()
        assert any(p.grad is not None and p.grad.any() for p in model.parameters())
        assert reference_logits(model, BATCH).shape == (2, 4, 9)

    def test_a_second_adapter_on_a_frozen_first(self):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model = self.adapt("LoraConfig", init_lora_weights=False)
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
        model.base_model.set_adapter(["default", "second"])
        assert adapter_changes(model, BATCH)
        model.set_adapter("second")
        assert not adapter_changes(model, BATCH)

    def test_no_adapter_changes_nothing(self):
        assert not adapter_changes(llama(), BATCH)


class TestRouter:
    shape = staticmethod(lambda: {"num_key_value_heads": 2, "num_local_experts": 4})

    def test_its_loss_is_the_model_s_own(self):
        model = small("MixtralConfig", **self.shape(), output_router_logits=True, router_aux_loss_coef=0.5).eval()
        output = run_model(model, BATCH)
        balancing = router_loss(model, output)
        assert balancing > 0.1, "it has to matter"
        torch.testing.assert_close(nll_loss(output.logits, IDS) + balancing, model(**BATCH).loss)

    def test_none_unless_the_config_asks(self):
        model = small("MixtralConfig", **self.shape())
        assert router_loss(model, run_model(model, BATCH)) is None
        assert router_loss(llama(), run_model(llama(), BATCH)) is None

    def test_a_loss_without_a_coefficient_is_refused(self):
        with pytest.raises(ValueError, match=r"`model` must say by how much its router's loss counts"):
            router_loss(Images(), SimpleNamespace(aux_loss=torch.ones(())))
