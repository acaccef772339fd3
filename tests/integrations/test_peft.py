"""LoRA with BLURTrainer: only the adapter moves, and the model without it is what is compared with."""

import copy

import pytest
import torch
from blur_trainer import FORGET, RETAIN, assert_same, trainer
from hand_written import train
from tiny import collate, tiny_llama, tiny_lora

peft = pytest.importorskip("peft", reason="peft is not installed")

# peft 0.21 reads the older of two names that transformers 5.23 has for it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def frozen_parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("losses", "reference", "compared"),
    [
        (("npo", "nll"), None, tiny_lora),
        (("npo", "nll"), "adapter", tiny_llama),
        (("ga", "kl"), "adapter", tiny_llama),
        (("npo", "kl"), "copy", tiny_lora),
    ],
    ids=["stored", "adapter off", "kl, adapter off", "copy"],
)
def test_only_the_adapter_is_trained(tmp_path, losses, reference, compared):
    model, expected = tiny_lora(), tiny_lora()
    before = frozen_parameters(model)
    given = copy.deepcopy(model) if reference == "copy" else reference
    made = trainer(
        tmp_path, model, forget_loss=losses[0], retain_loss=losses[1], max_grad_norm=0.1, more={"reference": given}
    )
    made.train()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    trained = {id(p) for group in made.blur.param_groups for p in group["params"]}
    assert trained == {id(p) for n, p in model.named_parameters() if "lora_" in n}
    assert made.reference_path.exists() is (losses[0] == "npo" and reference is None)
    train(expected, compared(), FORGET, RETAIN, losses, steps=4, accumulate=2, max_norm=0.1)
    assert_same(model, expected)


def test_a_fresh_adapter_in_the_metric_of_the_retain_loss(tmp_path):
    """B begins at zero, so g_r of A does too, and A moves by what the damping allows."""
    model, expected = tiny_lora(fresh=True), tiny_lora(fresh=True)
    first = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}
    options = {"metric": "retain", "gamma": 0.3}
    trainer(tmp_path, model, max_steps=1, **options).train()
    # Weight decay alone: 0.1 of the rate.
    assert all(
        torch.allclose(p, first[n] * (1 - 1e-4), rtol=1e-6, atol=0) for n, p in model.named_parameters() if n in first
    )
    model = tiny_lora(fresh=True)
    trainer(tmp_path, model, max_grad_norm=0.1, **options).train()
    train(expected, tiny_llama(), FORGET, RETAIN, steps=4, accumulate=2, max_norm=0.1, **options)
    assert_same(model, expected)
    # Then A moves, slowly: its second moments are below the damping while B is small.
    moved = {
        n: (p - first.get(n, torch.zeros(())) * (1 - 1e-4) ** 4).abs().max()
        for n, p in model.named_parameters()
        if "lora_" in n
    }
    of_a, of_b = ([v for n, v in moved.items() if part in n] for part in ("lora_A", "lora_B"))
    assert 1e-7 < min(of_a) <= max(of_a) < max(of_b) / 4


def with_embeddings(seed=0):
    """A fresh adapter beside which the token embeddings are trained, which are the output layer too."""
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(1)
    return peft.get_peft_model(tiny_llama(seed, tie_word_embeddings=True), config)


def test_token_embeddings_beside_the_adapter_in_the_metric_of_the_retain_loss(tmp_path):
    """The reference has the embeddings as they were: the adapter that is switched off takes its copy of them along."""
    model, expected = with_embeddings(), with_embeddings()
    options = {"metric": "retain", "gamma": 0.3}
    made = trainer(
        tmp_path,
        model,
        forget_loss="npo",
        retain_loss="kl",
        more={"reference": "adapter"},
        max_grad_norm=0.1,
        **options,
    )
    made.train()
    base = tiny_llama(tie_word_embeddings=True)
    train(expected, base, FORGET, RETAIN, ("npo", "kl"), steps=4, accumulate=2, max_norm=0.1, **options)
    assert_same(model, expected)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert len(trained) == 1
    merged = model.merge_and_unload()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert not torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_merged_and_saved(tmp_path):
    from transformers import AutoModelForCausalLM

    made = trainer(tmp_path, tiny_lora())
    made.train()
    batch = collate(FORGET)
    made.save_model(str(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    made.model.eval()
    again.eval()
    with torch.no_grad():
        expected = made.model(**batch).logits
        torch.testing.assert_close(again(**batch).logits, expected)
        made.model.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_with_gradient_checkpointing(tmp_path):
    plain = trainer(tmp_path, tiny_lora())
    plain.train()
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(plain.args, n))
    saving = trainer(tmp_path, tiny_lora(), **{name: True, f"{name}_kwargs": {"use_reentrant": False}})
    saving.train()
    assert_same(saving.model, plain.model)


def test_resumes(tmp_path):
    through = trainer(tmp_path / "through", tiny_lora())
    through.train()
    trainer(tmp_path / "parts", tiny_lora(), save_strategy="steps", save_steps=2).train()
    again = trainer(tmp_path / "parts", tiny_lora(), save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert_same(again.model, through.model)


class QuantizedLinear(torch.nn.Linear):
    """An int8 base as quantisation libraries make it: weights that take no gradient, and a scale."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_a_base_of_integers(tmp_path):
    model = tiny_lora()
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer = QuantizedLinear(module.base_layer)
    before = copy.deepcopy(frozen_parameters(model))
    made = trainer(tmp_path, model)
    made.train()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert any(p.dtype == torch.int8 for p in before.values())
    assert made.state.log_history[0]["blur_forget_norm"] > 0


def test_four_bits_on_a_cpu_are_refused(tmp_path):
    """bitsandbytes 0.50 repacks such layers for inference in eval mode, and backward passes them by in silence."""
    model = tiny_lora()
    model.get_base_model().is_loaded_in_4bit = True
    with pytest.raises(ValueError, match=r"must not have bitsandbytes' 4-bit layers on a CPU"):
        trainer(tmp_path, model)
