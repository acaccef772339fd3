"""The losses on models: references, adapters, and activations that are captured."""

import pytest
import torch
from loss_cases import ToyModel
from torch import nn

from blur_optim.losses import (
    capture_activations,
    nll_loss,
    npo_loss,
    reference_log_probs,
    reference_logits,
    rmu_forget_loss,
    sequence_log_probs,
    steering_vector,
    stored_reference_log_probs,
)


class TestSteeringVector:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_norm_is_the_coefficient_and_no_entry_negative(self, dtype):
        vector = steering_vector(512, 6.5, torch.Generator().manual_seed(0), dtype=dtype)
        assert vector.shape == (512,)
        assert vector.dtype == dtype
        assert not vector.requires_grad
        assert vector.double().norm().item() == pytest.approx(6.5, rel=torch.finfo(dtype).eps)
        assert vector.min() >= 0
        # Uniform on [0, 1) has mean / root mean square = sqrt(3) / 2; Gaussian or signed draws don't.
        assert (vector.double().mean() / (6.5 / 512**0.5)).item() == pytest.approx(3**0.5 / 2, abs=0.05)

    def test_a_seed_means_one_direction(self):
        first, second = (steering_vector(64, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        double = steering_vector(64, 13.0, torch.Generator().manual_seed(3), dtype=torch.float64)
        assert torch.equal(first, second)
        torch.testing.assert_close(2 * first.double(), double, rtol=1e-6, atol=0)
        assert not torch.equal(first, steering_vector(64, generator=torch.Generator().manual_seed(4)))

    def test_a_generator_leaves_the_global_one_alone(self):
        before = torch.get_rng_state()
        steering_vector(8, generator=torch.Generator().manual_seed(0))
        assert torch.equal(torch.get_rng_state(), before)
        steering_vector(8)
        assert not torch.equal(torch.get_rng_state(), before)

    def test_device(self):
        assert steering_vector(8, device="meta").device.type == "meta"


# One tiny Llama: 2 layers, 4 sequences of 7 tokens, prompts and one padded row.
INPUT_IDS = torch.randint(3, 40, (4, 7), generator=torch.Generator().manual_seed(1))
ATTENTION_MASK = torch.ones_like(INPUT_IDS)
ATTENTION_MASK[3, 5:] = 0
BATCH_LABELS = INPUT_IDS.masked_fill(ATTENTION_MASK == 0, -100)
BATCH_LABELS[:, :2] = -100
BATCH = {"input_ids": INPUT_IDS, "attention_mask": ATTENTION_MASK, "labels": BATCH_LABELS}
NEEDS_TRANSFORMERS = "transformers isn't installed: no Llama to compare with"
NEEDS_PEFT = "peft isn't installed: no adapter to switch off"


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers", reason=NEEDS_TRANSFORMERS)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        attention_dropout=0.3,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).train()


@pytest.fixture
def lora_llama(llama):
    peft = pytest.importorskip("peft", reason=NEEDS_PEFT)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama, config)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param)
    return model


TOY_MODES = {"": True, "table": True, "dropout": True, "frozen_norm": False, "head": True}


def modes_of(model):
    return {name: module.training for name, module in model.named_modules()}


class TestWithTransformers:
    def test_nll_is_the_model_s_own_loss(self, llama):
        llama.eval()
        theirs = llama(**BATCH).loss
        theirs.backward()
        expected = {name: param.grad.clone() for name, param in llama.named_parameters()}
        llama.zero_grad()
        ours = nll_loss(llama(INPUT_IDS, attention_mask=ATTENTION_MASK).logits, BATCH_LABELS)
        ours.backward()
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close({name: param.grad for name, param in llama.named_parameters()}, expected)

    def test_npo_ascends_on_a_model(self, llama):
        llama.eval()
        reference = reference_log_probs(llama, BATCH)
        inputs = {"input_ids": INPUT_IDS, "attention_mask": ATTENTION_MASK}
        npo_loss(sequence_log_probs(llama(**inputs).logits, BATCH_LABELS), reference).backward()
        with torch.no_grad():
            for param in llama.parameters():
                param -= 1e-4 * param.grad
        assert (reference_log_probs(llama, BATCH).mean() < reference.mean() - 1e-3).item()

    def test_capture_gives_gradients_to_the_layers_below_only(self, llama):
        with capture_activations(llama.model.layers[0]) as captured:
            llama(INPUT_IDS)
        rmu_forget_loss(captured.output, steering_vector(16)).backward()
        with_grad = {name for name, param in llama.named_parameters() if param.grad is not None}
        below = {name for name, _ in llama.named_parameters() if "embed" in name or "layers.0." in name}
        assert with_grad == below
        assert all(llama.get_parameter(name).grad.abs().max() > 0 for name in below)

    def test_captured_output_is_the_layer_s_hidden_state(self, llama):
        with capture_activations(llama.model.layers[0]) as captured, torch.no_grad():
            hidden_states = llama.eval()(INPUT_IDS, output_hidden_states=True).hidden_states
        assert torch.equal(captured.output, hidden_states[1])

    def test_capture_under_gradient_checkpointing_gives_the_same_gradients(self, llama):
        llama.config._attn_implementation = "eager"
        for layer in llama.model.layers:
            layer.self_attn.attention_dropout = 0.0  # checkpointing needs train mode

        def grads():
            with capture_activations(llama.model.layers[1]) as captured:
                llama(INPUT_IDS, use_cache=False)
                rmu_forget_loss(captured.output, torch.ones(16)).backward()
            found = {name: p.grad for name, p in llama.named_parameters() if p.grad is not None}
            llama.zero_grad()
            return found

        plain = grads()
        # transformers renamed it in the course of version 5.
        enable = getattr(llama, "activation_checkpointing_enable", None) or llama.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        torch.testing.assert_close(grads(), plain)

    def test_reference_is_the_model_in_eval_mode(self, llama):
        modes = modes_of(llama)
        found = reference_logits(llama, BATCH)
        assert modes_of(llama) == modes
        assert not found.requires_grad
        assert all(param.grad is None and param.requires_grad for param in llama.parameters())
        with torch.no_grad():
            expected = llama.eval()(INPUT_IDS, attention_mask=ATTENTION_MASK).logits
        assert torch.equal(found, expected)
        assert torch.equal(reference_log_probs(llama, BATCH), sequence_log_probs(expected, BATCH_LABELS))


def adapted_logits(model):
    with torch.no_grad():
        return model.eval()(INPUT_IDS, attention_mask=ATTENTION_MASK).logits


# peft 0.21 asks transformers 5.23 for a property that is deprecated there.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
class TestAdapter:
    def test_reference_is_the_base_model(self, lora_llama):
        found = reference_log_probs(lora_llama, BATCH)
        adapted = adapted_logits(lora_llama)
        with lora_llama.disable_adapter(), torch.no_grad():
            base = lora_llama.eval()(INPUT_IDS, attention_mask=ATTENTION_MASK).logits
        torch.testing.assert_close(found, sequence_log_probs(base, BATCH_LABELS))
        assert (adapted - base).abs().max() > 0.1  # B isn't zero: the adapter does something

    def test_reference_is_the_model_before_the_adapter(self, llama):
        peft = pytest.importorskip("peft", reason=NEEDS_PEFT)
        before = reference_logits(llama, BATCH)
        model = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        torch.testing.assert_close(reference_logits(model, BATCH), before)

    def test_adapter_is_on_again_and_a_frozen_part_of_it_still_frozen(self, lora_llama):
        for name, param in lora_llama.named_parameters():
            param.requires_grad_("lora_B" in name)
        adapted, modes = adapted_logits(lora_llama), modes_of(lora_llama.train())
        reference_log_probs(lora_llama, BATCH)
        assert all(p.requires_grad == ("lora_B" in name) for name, p in lora_llama.named_parameters())
        assert modes_of(lora_llama) == modes
        assert torch.equal(adapted_logits(lora_llama), adapted)

    def test_adapter_is_off_behind_a_wrapper_as_ddp_s(self, lora_llama):
        class Wrapper(nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

            def forward(self, **inputs):
                return self.module(**inputs)

        torch.testing.assert_close(
            reference_logits(Wrapper(lora_llama), BATCH), reference_logits(lora_llama, BATCH), rtol=0, atol=0
        )


class TestReferenceMode:
    def test_only_the_model_s_inputs_reach_it(self):
        model, positions = ToyModel(), torch.arange(7).expand(4, 7)
        reference_log_probs(model, {**BATCH, "index": torch.arange(4), "position_ids": positions, "text": "?"})
        reference_logits(model, {"input_ids": INPUT_IDS})
        assert [set(call) for call in model.calls] == [
            {"input_ids", "attention_mask", "position_ids"},
            {"input_ids"},
        ]
        assert model.calls[0]["input_ids"] is INPUT_IDS
        assert model.calls[0]["position_ids"] is positions

    def test_modes_are_restored_for_every_submodule(self):
        model = ToyModel()
        reference_log_probs(model, BATCH)
        assert modes_of(model) == TOY_MODES
        reference_log_probs(model.eval(), BATCH)
        assert set(modes_of(model).values()) == {False}
        assert torch.is_grad_enabled()

    def test_modes_are_restored_after_an_exception(self):
        model = ToyModel()
        model.error = OSError("disk on fire")
        with pytest.raises(OSError, match="disk on fire"):
            reference_log_probs(model, BATCH)
        assert modes_of(model) == TOY_MODES
        assert torch.is_grad_enabled()


def toy_batches(*rows):
    return [{name: tensor[list(r)] for name, tensor in {**BATCH, "index": torch.arange(4)}.items()} for r in rows]


class TestStoredReferenceLogProbs:
    def test_rows_are_found_by_index_whatever_the_order(self):
        model = ToyModel()
        stored = stored_reference_log_probs(model, iter(toy_batches([3, 0], [2], [1])))
        assert stored.dtype == torch.float32
        assert stored.device.type == "cpu"
        torch.testing.assert_close(stored, reference_log_probs(model, BATCH), rtol=1e-6, atol=0)
        for batch in toy_batches([1, 3], [0, 2]):
            torch.testing.assert_close(stored[batch["index"]], reference_log_probs(model, batch))
        assert stored.unique().numel() == 4

    def test_progress_wraps_the_batches(self):
        seen = []

        def progress(batches):
            for batch in batches:
                seen.append(batch["index"].tolist())
                yield batch

        plain = stored_reference_log_probs(ToyModel(), toy_batches([0, 1], [2, 3]))
        wrapped = stored_reference_log_probs(ToyModel(), toy_batches([0, 1], [2, 3]), progress=progress)
        assert torch.equal(wrapped, plain)
        assert seen == [[0, 1], [2, 3]]

    @pytest.mark.parametrize(
        ("batches", "error", "message"),
        [
            ([], ValueError, r"`batches` must yield at least one example, got none\."),
            (toy_batches([0, 1], [3]), ValueError, r"every row from 0 to 3, got none for row 2\."),
            (toy_batches([1, 2, 3]), ValueError, r"every row from 0 to 3, got none for row 0\."),
            (toy_batches([0, 1], [2, 1]), ValueError, r"`batches\[1\]\['index'\]` .*, got 1\."),
            (toy_batches([0, 2, 2]), ValueError, r"`batches\[0\]\['index'\]` .*, got 2\."),
            ([{**BATCH, "index": torch.tensor([0, -1, 1, 2])}], ValueError, r"rows >= 0 .*, got -1\."),
            ([BATCH], ValueError, r"`batch` must have the keys \['index', .*got \['attention_mask', "),
            ([{**BATCH, "index": torch.arange(3)}], ValueError, r"must have shape \(4,\) .*, got \(3,\)\."),
            ([{**BATCH, "index": torch.arange(4.0)}], TypeError, r"must have dtype torch.int64, got torch.float32"),
        ],
        ids=["empty", "gap", "first", "twice", "twice in one", "negative", "no index", "too short", "float"],
    )
    def test_wrong_rows_are_refused(self, batches, error, message):
        with pytest.raises(error, match=message):
            stored_reference_log_probs(ToyModel(), batches)


class TestCapture:
    def test_last_forward_counts_and_keeps_its_graph(self):
        layer, x = nn.Linear(3, 3), torch.randn(2, 4, 3)
        with capture_activations(layer) as captured:
            layer(2 * x)
            expected = layer(x)
        assert captured.output is expected
        assert captured.output.grad_fn is not None

    def test_a_tuple_gives_its_first_element(self):
        class Layer(nn.Module):
            def forward(self, x):
                return x + 1, "cache"

        with capture_activations(layer := Layer()) as captured:
            layer(torch.zeros(1, 1, 2))
        assert torch.equal(captured.output, torch.ones(1, 1, 2))

    def test_the_hook_is_gone_after_the_block(self):
        layer, x = nn.Linear(3, 3), torch.randn(1, 1, 3)
        with capture_activations(layer) as captured:
            first = layer(x)
        layer(x)
        assert captured.output is first
        assert not layer._forward_hooks

    def test_the_hook_is_gone_after_an_exception(self):
        def interrupted(layer):
            with capture_activations(layer):
                assert layer._forward_hooks
                raise KeyError("interrupted")

        layer = nn.Linear(3, 3)
        with pytest.raises(KeyError, match="interrupted"):
            interrupted(layer)
        assert not layer._forward_hooks

    def test_reading_before_a_forward_is_refused(self):
        message = r"`output` must be read after a forward .*, got none so far\."
        with capture_activations(nn.Linear(3, 3)) as captured, pytest.raises(RuntimeError, match=message):
            _ = captured.output

    def test_a_module_without_a_tensor_is_refused(self):
        class Layer(nn.Module):
            def forward(self, x):
                return {"hidden": x}

        with capture_activations(layer := Layer()), pytest.raises(TypeError, match=r"got dict from Layer\."):
            layer(torch.zeros(1))
