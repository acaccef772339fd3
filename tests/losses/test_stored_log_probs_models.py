"""Stored log-probabilities of a Llama, and of one with an adapter."""

import copy

import pytest
import torch
from stored_rows import ALL, EXAMPLES, NEEDS_SAFETENSORS, PATH_NAME, VOCABULARY, Wrapper, collate, compute

from blur_optim.losses import reference_log_probs, sequence_log_probs
from blur_optim.losses.fingerprints import model_fingerprint

pytest.importorskip("safetensors", reason=NEEDS_SAFETENSORS)
NEEDS_TRANSFORMERS = "transformers isn't installed: no Llama to compare with"
NEEDS_PEFT = "peft isn't installed: no adapter to switch off"


@pytest.fixture
def path(tmp_path):
    return tmp_path / PATH_NAME


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers", reason=NEEDS_TRANSFORMERS)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.5, attention_dropout=0.3, **sizes)
    return transformers.LlamaForCausalLM(config).train()


class TestLlama:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_numbers_do_not_depend_on_the_padding_that_the_key_ignores(self, llama, path, side):
        stored = compute(path, llama)
        batch = collate(EXAMPLES, side=side, extra=2)
        torch.testing.assert_close(stored(batch), reference_log_probs(llama, batch))

    def test_it_is_found_again_after_saving_and_loading(self, llama, path, tmp_path):
        compute(path, llama)
        llama.save_pretrained(tmp_path / "model")
        loaded = type(llama).from_pretrained(tmp_path / "model")
        assert compute(path, loaded).computed == 0


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


# peft 0.21 asks transformers 5.23 for a property that is deprecated there.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
class TestAdapter:
    @staticmethod
    def adapt(llama, fresh=True):
        peft = pytest.importorskip("peft", reason=NEEDS_PEFT)
        config = peft.LoraConfig(
            r=2,
            target_modules=["q_proj"],
            modules_to_save=["lm_head"],
            init_lora_weights=fresh,
            task_type="CAUSAL_LM",
        )
        return peft.get_peft_model(llama, config)

    def test_the_file_of_the_plain_model_is_that_of_one_with_a_fresh_adapter(self, llama, path):
        stored = compute(path, llama)
        adapted = self.adapt(copy.deepcopy(llama))
        assert compute(path, adapted).computed == 0
        assert compute(path, Wrapper(adapted)).computed == 0
        assert torch.equal(stored(ALL[0]), reference_log_probs(llama, ALL[0]))

    def test_an_adapter_that_was_trained_is_part_of_the_model(self, llama, path, tmp_path):
        adapted = self.adapt(copy.deepcopy(llama), fresh=False)
        stored = compute(path, adapted)
        with torch.no_grad():
            expected = sequence_log_probs(adapted.eval()(**inputs_of(ALL[0])).logits, ALL[0]["labels"])
        torch.testing.assert_close(stored(ALL[0]), expected)
        assert (stored(ALL[0]) - reference_log_probs(llama, ALL[0])).abs().max() > 0.1, "the adapter has to matter"
        compute(tmp_path / "plain", llama)
        with pytest.raises(ValueError, match="with the log-probabilities of the model"):
            compute(tmp_path / "plain", adapted)
        with torch.no_grad():
            adapted.get_base_model().lm_head.modules_to_save["default"].weight[0, 0] += 1.0
        with pytest.raises(
            ValueError, match=r"If `model` was trained since, read the file with ReferenceLogProbs\.load"
        ):
            compute(path, adapted)

    def test_a_changed_base_is_another_model(self, llama, path):
        adapted = self.adapt(llama)
        compute(path, adapted)
        with torch.no_grad():
            adapted.get_base_model().model.layers[1].self_attn.q_proj.base_layer.weight[0, 0] += 1e-3
        with pytest.raises(ValueError, match="with the log-probabilities of the model"):
            compute(path, adapted)

    def test_an_adapter_that_stays_on_counts(self, llama):
        peft = pytest.importorskip("peft", reason=NEEDS_PEFT)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.inject_adapter_in_model(config, llama)  # offers no disable_adapter()
        before = model_fingerprint(model)
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.lora_A["default"].weight[0, 0] += 1.0
        assert model_fingerprint(model) != before
