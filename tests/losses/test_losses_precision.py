"""What the losses leave out, in which dtype they compute, and their gradients."""

import pytest
import torch
from loss_cases import (
    CHOSEN,
    COUNTS,
    LABELS,
    LOG_PROBS,
    LOGITS,
    PREDICTS,
    REFERENCE,
    REFERENCE_CHOSEN,
    REFERENCE_LOGITS,
    ROW_LOG_PROBS,
    grad_of,
    log_sigmoid,
)

from blur_optim.losses import (
    dpo_loss,
    ga_loss,
    kl_loss,
    logit_margin_loss,
    nll_loss,
    npo_loss,
    rmu_forget_loss,
    rmu_retain_loss,
    sequence_log_probs,
    simnpo_loss,
    token_counts,
)

# Every loss on logits, with the rest of its arguments bound.
LOGIT_LOSSES = {
    "sequence_log_probs": lambda logits: sequence_log_probs(logits, LABELS).sum(),
    "nll": lambda logits: nll_loss(logits, LABELS),
    "ga": lambda logits: ga_loss(logits, LABELS),
    "kl": lambda logits: kl_loss(logits, REFERENCE_LOGITS, LABELS),
    "margin": lambda logits: logit_margin_loss(logits, LABELS),
}
LOG_PROB_LOSSES = {
    "npo": lambda log_probs: npo_loss(log_probs, REFERENCE),
    "simnpo": lambda log_probs: simnpo_loss(log_probs, COUNTS),
    "dpo": lambda log_probs: dpo_loss(CHOSEN, log_probs, REFERENCE_CHOSEN, REFERENCE),
}
each_logit_loss = pytest.mark.parametrize("loss_fn", LOGIT_LOSSES.values(), ids=LOGIT_LOSSES.keys())
each_log_prob_loss = pytest.mark.parametrize("loss_fn", LOG_PROB_LOSSES.values(), ids=LOG_PROB_LOSSES.keys())


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
    @pytest.mark.parametrize(
        "loss",
        [nll_loss, ga_loss, logit_margin_loss, lambda x, y: kl_loss(x, 2 * x, y)],
        ids=["nll", "ga", "margin", "kl"],
    )
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
        losses += [logit_margin_loss(low, LABELS)]
        assert [loss.dtype for loss in losses] == [torch.float32] * 9
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
            (lambda x: logit_margin_loss(x, LABELS), [LOGITS]),
            (lambda lp: npo_loss(lp, REFERENCE, 0.7), [LOG_PROBS]),
            (lambda lp: simnpo_loss(lp, COUNTS, 2.5, 0.1), [LOG_PROBS]),
            (lambda c, r: dpo_loss(c, r, REFERENCE_CHOSEN, REFERENCE, 0.7), [CHOSEN, LOG_PROBS]),
            (lambda a: rmu_forget_loss(a, torch.ones(3), PREDICTS), [LOGITS]),
            (lambda a: rmu_retain_loss(a, REFERENCE_LOGITS), [LOGITS]),
        ],
        ids=["sequence_log_probs", "nll", "kl", "margin", "npo", "simnpo", "dpo", "rmu_forget", "rmu_retain"],
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
