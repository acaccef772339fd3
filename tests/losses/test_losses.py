"""The losses against cases worked out by hand, and their limits."""

import ast
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from loss_cases import (
    CHOSEN,
    COUNTS,
    LABELS,
    LOG,
    LOG_PROBS,
    LOGITS,
    PREDICTS,
    REFERENCE,
    REFERENCE_CHOSEN,
    REFERENCE_LOGITS,
    ROW_LOG_PROBS,
    ToyModel,
    grad_of,
    log_sigmoid,
)

import blur_optim.losses
from blur_optim.losses import (
    IDK_ANSWERS,
    dpo_loss,
    ga_loss,
    kl_loss,
    logit_margin_loss,
    nll_loss,
    npo_loss,
    reference_log_probs,
    reference_logits,
    rmu_forget_loss,
    rmu_retain_loss,
    sequence_log_probs,
    simnpo_loss,
    steering_vector,
    token_counts,
)


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

    def test_logit_margin(self):
        # The largest probability by that to the power of the mean of the logs: the offset of the logits cancels.
        rows = [(0.5, (0.5, 0.25, 0.25)), (0.7, (0.1, 0.2, 0.7)), (0.8, (0.8, 0.1, 0.1))]
        margins = [LOG(top) - sum(map(LOG, row)) / 3 for top, row in rows]
        assert logit_margin_loss(LOGITS, LABELS).item() == pytest.approx(sum(m**2 for m in margins) / 3)

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

    def test_the_logit_margin_ends_where_the_prediction_is_flat(self):
        flat = 7.0 * torch.ones_like(LOGITS)
        assert logit_margin_loss(flat, LABELS).item() == 0.0
        (grad,) = grad_of(lambda x: logit_margin_loss(x, LABELS), flat)
        assert torch.equal(grad, torch.zeros_like(LOGITS))
        (grad,) = grad_of(lambda x: logit_margin_loss(x, LABELS), LOGITS)
        assert logit_margin_loss(LOGITS - 0.1 * grad, LABELS) < logit_margin_loss(LOGITS, LABELS)

    def test_the_logit_margin_asks_where_labels_are_not_which(self):
        others = torch.where(LABELS == -100, LABELS, (LABELS + 1) % 3)
        assert torch.equal(logit_margin_loss(LOGITS, others), logit_margin_loss(LOGITS, LABELS))


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
        (lambda: logit_margin_loss(LOGITS, LABELS[:, 1:]), ValueError, r"`labels` .* like `logits.*got \(2, 2\)\."),
        (lambda: logit_margin_loss(LOGITS.long(), LABELS), TypeError, r"`logits` must be floating point"),
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
