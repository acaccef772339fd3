"""The losses against cases worked out by hand, their limits, and the references that they compare with."""

import ast
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import blur_optim.losses
from blur_optim.losses import (
    IDK_ANSWERS,
    capture_activations,
    dpo_loss,
    ga_loss,
    kl_loss,
    nll_loss,
    npo_loss,
    reference_log_probs,
    reference_logits,
    rmu_forget_loss,
    rmu_retain_loss,
    sequence_log_probs,
    simnpo_loss,
    steering_vector,
    stored_reference_log_probs,
    token_counts,
)

LOG = math.log


def log_sigmoid(x: float) -> float:
    return -LOG(1 + math.exp(-x))


def grad_of(loss_fn, *inputs):
    """The gradients of ``loss_fn(*inputs)`` with respect to each input, which stay untouched."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(loss_fn(*leaves), leaves)


# Next-token probabilities over three words, written down so that every log-probability is a known logarithm.
# Row 0 predicts words 1 and 2 (its first label is given, its last position predicts nothing); row 1 only word 0.
PROBABILITIES = torch.tensor(
    [
        [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]],
        [[0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.2, 0.2, 0.6]],
    ],
    dtype=torch.float64,
)
LOGITS = PROBABILITIES.log() + torch.tensor([[[3.0], [-2.0], [0.0]]], dtype=torch.float64)  # any offset
LABELS = torch.tensor([[2, 1, 2], [1, -100, 0]])
ROW_LOG_PROBS = [LOG(0.25) + LOG(0.7), LOG(0.8)]
PREDICTS = torch.tensor([[True, True, False], [False, True, False]])  # the positions that count

REFERENCE_PROBABILITIES = torch.tensor(
    [
        [[0.25, 0.25, 0.5], [0.1, 0.2, 0.7], [1 / 3, 1 / 3, 1 / 3]],
        [[0.1, 0.1, 0.8], [0.4, 0.4, 0.2], [0.1, 0.8, 0.1]],
    ],
    dtype=torch.float64,
)
REFERENCE_LOGITS = REFERENCE_PROBABILITIES.log()

# Every loss on logits, with the rest of its arguments bound.
LOGIT_LOSSES = {
    "sequence_log_probs": lambda logits: sequence_log_probs(logits, LABELS).sum(),
    "nll": lambda logits: nll_loss(logits, LABELS),
    "ga": lambda logits: ga_loss(logits, LABELS),
    "kl": lambda logits: kl_loss(logits, REFERENCE_LOGITS, LABELS),
}
COUNTS = torch.tensor([2, 5])
LOG_PROBS = torch.tensor([-3.0, -0.5], dtype=torch.float64)
REFERENCE = torch.tensor([-2.0, -4.0], dtype=torch.float64)
CHOSEN = torch.tensor([-6.0, -7.0], dtype=torch.float64)
REFERENCE_CHOSEN = torch.tensor([-6.5, -5.0], dtype=torch.float64)
LOG_PROB_LOSSES = {
    "npo": lambda log_probs: npo_loss(log_probs, REFERENCE),
    "simnpo": lambda log_probs: simnpo_loss(log_probs, COUNTS),
    "dpo": lambda log_probs: dpo_loss(CHOSEN, log_probs, REFERENCE_CHOSEN, REFERENCE),
}
each_logit_loss = pytest.mark.parametrize("loss_fn", LOGIT_LOSSES.values(), ids=LOGIT_LOSSES.keys())
each_log_prob_loss = pytest.mark.parametrize("loss_fn", LOG_PROB_LOSSES.values(), ids=LOG_PROB_LOSSES.keys())


class TestHandComputed:
    def test_sequence_log_probs(self):
        torch.testing.assert_close(sequence_log_probs(LOGITS, LABELS).tolist(), ROW_LOG_PROBS)

    def test_token_counts_leave_out_the_first_label_and_the_ignored(self):
        assert token_counts(LABELS).tolist() == [2, 1]
        assert token_counts(torch.tensor([[7, -100, -100]])).tolist() == [0]
        assert token_counts(LABELS).dtype == torch.int64

    def test_nll_weighs_tokens_not_sequences(self):
        assert nll_loss(LOGITS, LABELS).item() == pytest.approx(-sum(ROW_LOG_PROBS) / 3)

    def test_ga_is_the_negated_nll(self):
        assert ga_loss(LOGITS, LABELS).item() == pytest.approx(sum(ROW_LOG_PROBS) / 3)

    def test_npo(self):
        # log ratios -3 - -2 = -1 and -0.5 - -4 = 3.5
        expected = -2 / 0.1 * (log_sigmoid(0.1) + log_sigmoid(-0.35)) / 2
        assert npo_loss(LOG_PROBS, REFERENCE).item() == pytest.approx(expected)
        expected = -2 / 0.7 * (log_sigmoid(0.7) + log_sigmoid(-2.45)) / 2
        assert npo_loss(LOG_PROBS, REFERENCE, beta=0.7).item() == pytest.approx(expected)

    def test_simnpo(self):
        # per token -3 / 2 and -0.5 / 5
        expected = -2 / 2.5 * (log_sigmoid(2.5 * 1.5) + log_sigmoid(2.5 * 0.1)) / 2
        assert simnpo_loss(LOG_PROBS, COUNTS).item() == pytest.approx(expected)
        expected = -2 / 4.5 * (log_sigmoid(4.5 * 1.5 - 0.3) + log_sigmoid(4.5 * 0.1 - 0.3)) / 2
        assert simnpo_loss(LOG_PROBS, COUNTS, beta=4.5, delta=0.3).item() == pytest.approx(expected)

    def test_dpo(self):
        # chosen 0.5 and -2 above the reference, rejected -1 and 3.5: margins 1.5 and -5.5
        expected = -2 / 0.1 * (log_sigmoid(0.15) + log_sigmoid(-0.55)) / 2
        loss = dpo_loss(CHOSEN, LOG_PROBS, REFERENCE_CHOSEN, REFERENCE)
        assert loss.item() == pytest.approx(expected)

    def test_kl_goes_from_the_reference_to_the_model(self):
        first = 0.25 * LOG(0.25 / 0.5) + 0.25 * LOG(0.25 / 0.25) + 0.5 * LOG(0.5 / 0.25)
        last = 0.4 * LOG(0.4 / 0.8) + 0.4 * LOG(0.4 / 0.1) + 0.2 * LOG(0.2 / 0.1)
        loss = kl_loss(LOGITS, REFERENCE_LOGITS, LABELS)
        assert loss.item() == pytest.approx((first + 0.0 + last) / 3)

    def test_rmu_forget(self):
        activations = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[3.0, 4.0], [-1.0, 1.0]]])
        target = torch.tensor([1.0, 1.0])
        # squared distances by token: 1, 2, 13, 4
        assert rmu_forget_loss(activations, target).item() == pytest.approx((1 + 2 + 13 + 4) / 8)
        mask = torch.tensor([[True, False], [True, False]])
        assert rmu_forget_loss(activations, target, mask).item() == pytest.approx((1 + 13) / 4)
        assert rmu_forget_loss(activations, target, 3 * mask.long()).item() == pytest.approx((1 + 13) / 4)

    def test_rmu_retain(self):
        activations = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
        frozen = torch.tensor([[[1.0, 0.0], [3.0, 1.0]]])
        assert rmu_retain_loss(activations, frozen).item() == pytest.approx((4 + 10) / 4)
        assert rmu_retain_loss(activations, frozen, torch.tensor([[0, 1]])).item() == pytest.approx(10 / 2)
        assert rmu_retain_loss(activations, activations).item() == 0.0


class TestLimits:
    @pytest.mark.parametrize("beta", [1e-3, 1e-5])
    def test_npo_becomes_gradient_ascent_as_beta_vanishes(self, beta):
        # Proposition 1 of arXiv:2404.05868; the next term of the series is beta * ratio^2 / 4, ratio <= 3.5.
        difference = npo_loss(LOG_PROBS, REFERENCE, beta).item() - 2 / beta * LOG(2)
        assert difference == pytest.approx((-1.0 + 3.5) / 2, abs=4 * beta)
        (grad,) = grad_of(lambda lp: npo_loss(lp, REFERENCE, beta), LOG_PROBS)
        assert grad.tolist() == pytest.approx([0.5, 0.5], abs=2 * beta)

    def test_npo_on_logits_becomes_gradient_ascent_as_beta_vanishes(self):
        (npo,) = grad_of(lambda x: npo_loss(sequence_log_probs(x, LABELS), REFERENCE, 1e-6), LOGITS)
        (ascent,) = grad_of(lambda x: ga_loss(x, LABELS), LOGITS)
        # NPO averages sequences of summed log-probabilities, GA averages tokens: 1 / 2 against 1 / 3.
        torch.testing.assert_close(npo, 1.5 * ascent, rtol=1e-5, atol=1e-9)

    @pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
    def test_npo_weighs_ascent_by_how_much_is_left_to_forget(self, beta):
        ratios = torch.tensor([-50.0, -1.0, 0.0, 2.0, 50.0], dtype=torch.float64)
        (grad,) = grad_of(lambda lp: npo_loss(lp, torch.zeros_like(lp), beta), ratios)
        weights = [2 / (1 + math.exp(-beta * ratio)) for ratio in ratios.tolist()]
        assert (5 * grad).tolist() == pytest.approx(weights)
        assert weights[2] == 1.0

    @pytest.mark.parametrize("beta", [1e-3, 1e-5])
    def test_simnpo_becomes_length_normalized_ascent_as_beta_vanishes(self, beta):
        difference = simnpo_loss(LOG_PROBS, COUNTS, beta).item() - 2 / beta * LOG(2)
        assert difference == pytest.approx((-3 / 2 - 0.5 / 5) / 2, abs=beta)
        (grad,) = grad_of(lambda lp: simnpo_loss(lp, COUNTS, beta), LOG_PROBS)
        assert grad.tolist() == pytest.approx([1 / 2 / 2, 1 / 5 / 2], abs=beta)

    def test_simnpo_takes_the_margin_of_the_authors_code_times_beta(self):
        beta, inner = 2.5, 0.4
        expected = -2 / beta * (log_sigmoid(beta * (1.5 - inner)) + log_sigmoid(beta * (0.1 - inner))) / 2
        assert simnpo_loss(LOG_PROBS, COUNTS, beta, delta=beta * inner).item() == pytest.approx(expected)

    @pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
    def test_dpo_at_the_reference_ascends_the_answer_and_descends_idk_whatever_beta(self, beta):
        chosen, rejected = grad_of(lambda c, r: dpo_loss(c, r, CHOSEN, LOG_PROBS, beta), CHOSEN, LOG_PROBS)
        assert chosen.tolist() == pytest.approx([-0.5, -0.5])
        assert rejected.tolist() == pytest.approx([0.5, 0.5])

    def test_dpo_without_a_move_of_the_chosen_is_npo(self):
        loss = dpo_loss(CHOSEN, LOG_PROBS, CHOSEN, REFERENCE, beta=0.3)
        assert loss.item() == pytest.approx(npo_loss(LOG_PROBS, REFERENCE, beta=0.3).item())

    def test_dpo_times_half_beta_is_the_paper_s(self):
        loss = dpo_loss(CHOSEN, LOG_PROBS, REFERENCE_CHOSEN, REFERENCE, beta=0.2)
        assert 0.1 * loss.item() == pytest.approx(-(log_sigmoid(0.3) + log_sigmoid(-1.1)) / 2)

    @pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
    def test_kl_is_zero_with_zero_gradient_at_the_reference_and_positive_elsewhere(self, scale):
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(11, (4, 6), generator=generator)
        logits, other = scale * torch.randn(2, 4, 6, 11, generator=generator, dtype=torch.float64)
        assert kl_loss(logits, logits, labels).item() == 0.0
        (grad,) = grad_of(lambda x: kl_loss(x, logits, labels), logits)
        assert grad.abs().max() < 1e-15
        assert kl_loss(other, logits, labels) > 0
        (grad,) = grad_of(lambda x: kl_loss(x, logits, labels), other)
        assert grad.abs().max() > 1e-4


class TestIgnoredLabels:
    @each_logit_loss
    def test_logits_at_ignored_positions_change_nothing(self, loss_fn):
        changed = torch.where(PREDICTS[..., None], LOGITS, 100 * LOGITS.flip(-1) + 1)
        assert torch.equal(loss_fn(changed), loss_fn(LOGITS))

    @each_logit_loss
    def test_gradient_is_zero_exactly_at_ignored_positions(self, loss_fn):
        # Position (0, 1) of the KL has none: there the reference agrees with the model.
        (grad,) = grad_of(loss_fn, LOGITS)
        assert torch.equal(grad[~PREDICTS], torch.zeros(3, 3, dtype=torch.float64))
        assert (grad[[0, 1], [0, 1]].abs().amax(dim=-1) > 1e-2).all()

    def test_kl_ignores_the_reference_there_too(self):
        changed = torch.where(PREDICTS[..., None], REFERENCE_LOGITS, 100 * REFERENCE_LOGITS + 1)
        assert torch.equal(kl_loss(LOGITS, changed, LABELS), kl_loss(LOGITS, REFERENCE_LOGITS, LABELS))

    @pytest.mark.parametrize("shape", [(2, 3), (2, 1), (2, 0), (0, 3)], ids=str)
    @pytest.mark.parametrize("loss", [nll_loss, ga_loss, lambda x, y: kl_loss(x, 2 * x, y)], ids=["nll", "ga", "kl"])
    def test_a_batch_without_labels_gives_zero_and_a_zero_gradient(self, loss, shape):
        logits, labels = torch.randn(*shape, 5), torch.full(shape, -100)
        assert loss(logits, labels).item() == 0.0
        (grad,) = grad_of(lambda x: loss(x, labels), logits)
        assert torch.equal(grad, torch.zeros_like(logits))

    def test_a_sequence_without_labels_has_no_gradient_and_harms_none(self):
        labels = torch.tensor([[2, 1, 2], [1, -100, -100]])
        log_probs, counts = sequence_log_probs(LOGITS, labels), token_counts(labels)
        assert log_probs.tolist() == pytest.approx([ROW_LOG_PROBS[0], 0.0])
        expected = -2 / 2.5 * (log_sigmoid(-2.5 / 2 * ROW_LOG_PROBS[0]) + log_sigmoid(0.0)) / 2
        assert simnpo_loss(log_probs, counts).item() == pytest.approx(expected)
        (grad,) = grad_of(lambda x: simnpo_loss(sequence_log_probs(x, labels), counts), LOGITS)
        assert torch.equal(grad[1], torch.zeros_like(grad[1]))
        assert grad[0].abs().max() > 1e-2
        assert grad.isfinite().all()

    def test_rmu_mask_stops_the_gradient(self):
        mask = torch.tensor([[1, 0, 1]])
        (grad,) = grad_of(lambda a: rmu_forget_loss(a, torch.ones(4), mask), torch.zeros(1, 3, 4))
        # d/dh of (h - 1)^2 / (2 tokens * 4 wide) at 0
        torch.testing.assert_close(grad, torch.tensor([[[-0.25] * 4, [0.0] * 4, [-0.25] * 4]]))

    @pytest.mark.parametrize(
        "loss",
        [lambda a, m: rmu_forget_loss(a, torch.ones(4), m), lambda a, m: rmu_retain_loss(a, 2 * a, m)],
        ids=["forget", "retain"],
    )
    def test_rmu_empty_mask_gives_zero_and_a_zero_gradient(self, loss):
        activations, mask = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)
        assert loss(activations, mask).item() == 0.0
        (grad,) = grad_of(lambda a: loss(a, mask), activations)
        assert torch.equal(grad, torch.zeros_like(grad))


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @each_logit_loss
    def test_low_precision_logits_are_computed_in_float32(self, loss_fn, dtype):
        # Against float64 on the same rounded logits: float32's error is 1e-7, bfloat16's would be 1e-2.
        logits = LOGITS.to(dtype)
        assert loss_fn(logits).item() == pytest.approx(loss_fn(logits.double()).item(), rel=2e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_results_are_float32_and_float64_stays(self, dtype):
        low = LOGITS.to(dtype)
        log_probs = sequence_log_probs(low, LABELS)
        losses = [log_probs, nll_loss(low, LABELS), kl_loss(low, low, LABELS), npo_loss(log_probs, log_probs)]
        losses += [npo_loss(LOG_PROBS.to(dtype), REFERENCE.to(dtype)), simnpo_loss(LOG_PROBS.to(dtype), COUNTS)]
        losses += [rmu_forget_loss(low, torch.ones(3, dtype=dtype)), rmu_retain_loss(low, low)]
        assert [loss.dtype for loss in losses] == [torch.float32] * 8
        assert nll_loss(LOGITS, LABELS).dtype == npo_loss(LOG_PROBS, REFERENCE).dtype == torch.float64

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @each_logit_loss
    def test_large_logits_stay_finite(self, loss_fn, dtype):
        logits = torch.tensor([1e4, -1e4, 0.0], dtype=dtype).expand(2, 3, 3).clone()
        logits[1] = logits[1].flip(-1)
        assert loss_fn(logits).isfinite()
        (grad,) = grad_of(loss_fn, logits)
        assert grad.isfinite().all()
        assert grad.abs().max() > 0.1

    def test_large_logits_give_the_exact_log_probability(self):
        logits = torch.tensor([[[1e4, -1e4, 0.0]] * 2], dtype=torch.bfloat16)
        top, bottom, _ = logits[0, 0].tolist()
        assert sequence_log_probs(logits, torch.tensor([[0, 0]])).item() == 0.0
        assert sequence_log_probs(logits, torch.tensor([[0, 1]])).item() == bottom - top

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @each_log_prob_loss
    def test_log_probabilities_of_minus_1e4_stay_finite(self, loss_fn, dtype):
        log_probs = torch.tensor([-1e4, 0.0], dtype=dtype)
        assert loss_fn(log_probs).isfinite()
        (grad,) = grad_of(loss_fn, log_probs)
        assert grad[0].item() == 0.0  # forgotten beyond doubt: no more ascent
        assert 0.05 < grad[1].item() <= 1.0

    def test_reference_of_minus_1e4_gives_npo_its_full_weight(self):
        reference = torch.full((2,), -1e4, dtype=torch.float64)
        assert npo_loss(LOG_PROBS, reference).item() == pytest.approx(2 * (1e4 - 1.75))
        (grad,) = grad_of(lambda lp: npo_loss(lp, reference), LOG_PROBS)
        assert grad.tolist() == pytest.approx([1.0, 1.0])

    def test_half_precision_activations_do_not_overflow(self):
        activations = torch.full((1, 2, 4), 1e4, dtype=torch.float16)  # squared: 1e8, beyond float16
        assert rmu_forget_loss(activations, torch.zeros(4)).item() == pytest.approx(1e8)


class TestGradients:
    @pytest.mark.parametrize(
        ("loss_fn", "inputs"),
        [
            (lambda x: sequence_log_probs(x, LABELS), [LOGITS]),
            (lambda x: nll_loss(x, LABELS), [LOGITS]),
            (lambda x: kl_loss(x, REFERENCE_LOGITS, LABELS), [LOGITS]),
            (lambda lp: npo_loss(lp, REFERENCE, 0.7), [LOG_PROBS]),
            (lambda lp: simnpo_loss(lp, COUNTS, 2.5, 0.1), [LOG_PROBS]),
            (lambda c, r: dpo_loss(c, r, REFERENCE_CHOSEN, REFERENCE, 0.7), [CHOSEN, LOG_PROBS]),
            (lambda a: rmu_forget_loss(a, torch.ones(3), PREDICTS), [LOGITS]),
            (lambda a: rmu_retain_loss(a, REFERENCE_LOGITS), [LOGITS]),
        ],
        ids=["sequence_log_probs", "nll", "kl", "npo", "simnpo", "dpo", "rmu_forget", "rmu_retain"],
    )
    def test_gradcheck(self, loss_fn, inputs):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        assert torch.autograd.gradcheck(loss_fn, leaves)

    @pytest.mark.parametrize(
        ("loss_fn", "reference"),
        [
            (lambda x, ref: kl_loss(x, ref, LABELS), LOGITS),
            (npo_loss, LOG_PROBS),
            (lambda x, ref: dpo_loss(x, x, ref, ref), LOG_PROBS),
            (rmu_retain_loss, LOGITS),
            (lambda x, ref: rmu_forget_loss(LOGITS * x.sum(), ref), LOGITS[0, 0]),
        ],
        ids=["kl", "npo", "dpo", "rmu_retain", "rmu_forget"],
    )
    def test_a_reference_gets_no_gradient(self, loss_fn, reference):
        policy, reference = (reference + 1).requires_grad_(), reference.clone().requires_grad_()
        loss_fn(policy, reference).backward()
        assert policy.grad is not None
        assert reference.grad is None


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


class ToyModel(nn.Module):
    """Bigram logits; a frozen layer that two parents share. Records its calls, and raises on demand."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(40, 40)
        self.dropout = nn.Dropout(0.5)
        self.frozen_norm = nn.LayerNorm(40).eval()
        self.head = nn.Sequential(self.frozen_norm)
        self.calls = []
        self.error = None

    def forward(self, input_ids, **inputs):
        self.calls.append({"input_ids": input_ids, **inputs})
        assert not any(module.training for module in self.modules())
        assert not torch.is_grad_enabled()
        if self.error is not None:
            raise self.error
        return SimpleNamespace(logits=self.head(self.dropout(self.table(input_ids))))


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


INT = torch.ones(2, dtype=torch.int64)
THREE = torch.zeros(3)


def readable(value):
    """The id of a case: the function called, the error's name, the message without its regex marks."""
    if isinstance(value, str):
        return re.sub(r"[^\w ]+", "", value)
    return value.__name__ if isinstance(value, type) else value.__code__.co_names[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sequence_log_probs(LOGITS[0], LABELS), ValueError, r"`logits` .* \[B, T, V\], got \(3, 3\)\."),
        (lambda: sequence_log_probs(LOGITS, LABELS[0]), ValueError, r"`labels` .* \[B, T\], got \(3,\)\."),
        (lambda: nll_loss(LOGITS, LABELS[:, 1:]), ValueError, r"`labels` .* \(2, 3\) like `logits.*got \(2, 2\)\."),
        (lambda: ga_loss(LOGITS.long(), LABELS), TypeError, r"`logits` must be floating point, got torch.int64\."),
        (lambda: nll_loss(LOGITS, LABELS.int()), TypeError, r"`labels` .* torch.int64, got torch.int32\."),
        (lambda: token_counts(LABELS.float()), TypeError, r"`labels` .* torch.int64, got torch.float32\."),
        (lambda: token_counts(LABELS[0]), ValueError, r"`labels` .* \[B, T\], got \(3,\)\."),
        (lambda: kl_loss(LOGITS, LOGITS[:, 1:], LABELS), ValueError, r"`reference_logits` .*, got \(2, 2, 3\)\."),
        (lambda: kl_loss(LOGITS, LOGITS.long(), LABELS), TypeError, r"`reference_logits` must be floating"),
        (lambda: npo_loss(LOG_PROBS, THREE), ValueError, r"`reference_log_probs` .*\(2,\) .*, got \(3,\)\."),
        (lambda: npo_loss(LOG_PROBS[:, None], REFERENCE[:, None]), ValueError, r"\[B\] .*, got \(2, 1\)\."),
        (lambda: npo_loss(THREE[:0], THREE[:0]), ValueError, r"`log_probs` .* B >= 1, got \(0,\)\."),
        (lambda: npo_loss(LOG_PROBS, INT), TypeError, r"`reference_log_probs` must be floating point"),
        (lambda: npo_loss(LOG_PROBS, REFERENCE, 0.0), ValueError, r"`beta` must be positive, got 0\.0\."),
        (lambda: npo_loss(LOG_PROBS, REFERENCE, math.nan), ValueError, r"`beta` must be positive, got nan\."),
        (lambda: simnpo_loss(LOG_PROBS, COUNTS[:1]), ValueError, r"`token_counts` .*\(2,\) .*, got \(1,\)\."),
        (lambda: simnpo_loss(LOG_PROBS, LOG_PROBS), TypeError, r"`token_counts` .* torch.int64, got torch.float64"),
        (lambda: simnpo_loss(LOG_PROBS, COUNTS, -1.0), ValueError, r"`beta` must be positive, got -1\.0\."),
        (lambda: dpo_loss(CHOSEN, THREE, CHOSEN, CHOSEN), ValueError, r"`rejected_log_probs` .*, got \(3,\)\."),
        (lambda: dpo_loss(CHOSEN, CHOSEN, CHOSEN, INT), TypeError, r"`reference_rejected_log_probs` must be"),
        (lambda: dpo_loss(CHOSEN, CHOSEN, CHOSEN, CHOSEN, 0), ValueError, r"`beta` must be positive, got 0\."),
        (lambda: steering_vector(0), ValueError, r"`hidden_size` must be positive, got 0\."),
        (lambda: steering_vector(4, 0.0), ValueError, r"`coefficient` must be positive, got 0\.0\."),
        (lambda: rmu_forget_loss(LOGITS[0], THREE), ValueError, r"`activations` .*\[B, T, H\], got \(3, 3\)\."),
        (lambda: rmu_forget_loss(LOGITS, THREE[:2]), ValueError, r"`steering_vector` .*\(3,\) .*, got \(2,\)\."),
        (lambda: rmu_forget_loss(LOGITS, THREE.long()), TypeError, r"`steering_vector` must be floating point"),
        (lambda: rmu_forget_loss(LABELS[None], THREE), TypeError, r"`activations` must be floating point"),
        (lambda: rmu_forget_loss(LOGITS, THREE, PREDICTS[0]), ValueError, r"`mask` .*\(2, 3\) .*, got \(3,\)\."),
        (lambda: rmu_forget_loss(LOGITS, THREE, PREDICTS.float()), TypeError, r"`mask` .*, got torch.float32\."),
        (lambda: rmu_retain_loss(LOGITS, LOGITS[:1]), ValueError, r"`frozen_activations` .*, got \(1, 3, 3\)\."),
        (lambda: rmu_retain_loss(LOGITS, LOGITS.long()), TypeError, r"`frozen_activations` must be floating"),
        (lambda: reference_logits(ToyModel(), {"labels": LABELS}), ValueError, r"`batch` .*, got \['labels'\]\."),
        (lambda: reference_log_probs(ToyModel(), {"input_ids": LABELS}), ValueError, r"'labels'\], got \['input"),
    ],
    ids=readable,
)
def test_wrong_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_idk_answers_are_distinct_sentences():
    assert len(set(IDK_ANSWERS)) == len(IDK_ANSWERS) >= 5
    assert all(answer.endswith(".") and answer == answer.strip() for answer in IDK_ANSWERS)


@pytest.mark.parametrize("path", sorted(Path(blur_optim.losses.__file__).parent.glob("*.py")), ids=lambda p: p.stem)
def test_imports_are_torch_and_the_standard_library_only(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {node.module if isinstance(node, ast.ImportFrom) else alias.name for node in nodes for alias in node.names}
    allowed = {*sys.stdlib_module_names, "torch", "blur_optim"}
    assert {name.partition(".")[0] for name in names} <= allowed
