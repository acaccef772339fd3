"""Losses on logits, labels and log-probabilities.

Position t of the logits predicts label t + 1, as in transformers; a label of -100 takes no part. Whatever the
model's dtype, they compute and return float32 (float64 stays float64).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from blur_optim.losses.checks import (
    check_floating,
    check_int64,
    check_labels,
    check_logits,
    check_per_example,
    check_positive,
    check_shape,
    masked_mean,
    upcast,
)

IGNORE_INDEX = -100


# The "I don't know" answers that DPO prefers to the answer to forget.
IDK_ANSWERS = (
    "I have no information about that.",
    "That is something I don't know.",
    "I'm afraid I can't answer this one.",
    "I never learned anything about this.",
    "Sorry, this is outside what I know.",
    "I couldn't tell you.",
)


def sequence_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Sum the log-probabilities of each sequence's answer tokens.

    .. math:: \log \pi(y \mid x) = \sum_{t : y_t \neq -100} \log \pi(y_t \mid x, y_{<t})

    Args:
        logits: [B, T, V], floating point; position t predicts label t + 1.
        labels: [B, T] int64; -100 marks what takes no part (prompt, padding).
    Returns:
        [B] float32, <= 0; 0 for a sequence without labels.
    Raises:
        TypeError: the logits aren't floating point or the labels aren't int64.
        ValueError: the shapes aren't [B, T, V] and [B, T].
    Cost: up to two float32 copies of the logits, one of which is kept for backward.
    """
    return -_token_nll(logits, labels).sum(dim=-1)


def token_counts(labels: Tensor) -> Tensor:
    r"""Count the answer tokens that each sequence predicts.

    .. math:: |y| = \#\{t \geq 1 : y_t \neq -100\}

    Args:
        labels: [B, T] int64. The first label is never counted: nothing predicts it.
    Returns:
        [B] int64.
    Raises:
        TypeError: the labels aren't int64.
        ValueError: the shape isn't [B, T].
    """
    return _predicted(labels).sum(dim=-1)


def nll_loss(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Average the negative log-likelihood over all answer tokens of the batch: the usual retain loss.

    .. math:: L_{NLL} = -\frac{1}{\sum_i |y_i|} \sum_i \log \pi(y_i \mid x_i)

    The same number as ``model(**batch).loss`` in transformers, except that a batch without any label gives 0
    and a zero gradient, not NaN.

    Args:
        logits: [B, T, V], floating point.
        labels: [B, T] int64; -100 marks what takes no part.
    Returns:
        0-d float32.
    Raises:
        TypeError, ValueError: as :func:`sequence_log_probs`.
    """
    return masked_mean(_token_nll(logits, labels), _predicted(labels))


def ga_loss(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Negate :func:`nll_loss`, so that descending it is gradient ascent on the answers to forget.

    .. math:: L_{GA} = -L_{NLL}      (arXiv:2210.01504)

    It has no lower bound: alone, it destroys the model (arXiv:2404.05868, section 2.1).

    Args:
        logits: [B, T, V], floating point.
        labels: [B, T] int64; -100 marks what takes no part.
    Returns:
        0-d float32, <= 0.
    Raises:
        TypeError, ValueError: as :func:`sequence_log_probs`.
    """
    return -nll_loss(logits, labels)


def npo_loss(log_probs: Tensor, reference_log_probs: Tensor, beta: float = 0.1) -> Tensor:
    r"""Push answers below their reference probability, ever more gently (negative preference optimization).

    .. math:: L_{NPO} = -\frac{2}{\beta} \, \mathrm{mean}_i \, \log \sigma\Big(
        -\beta \log \frac{\pi(y_i \mid x_i)}{\pi_{ref}(y_i \mid x_i)}\Big)      (arXiv:2404.05868)

    Its gradient is that of ascent on the answers' summed NLL, each example weighted by
    :math:`2 \pi^\beta / (\pi^\beta + \pi_{ref}^\beta)`: 1 at the reference or for beta -> 0, 0 if forgotten.

    Args:
        log_probs: [B], the model's :func:`sequence_log_probs` on the answers to forget.
        reference_log_probs: [B], the same of the model before unlearning, such as :class:`ReferenceLogProbs`
            keeps; gets no gradient.
        beta: inverse temperature, > 0; the larger, the sooner a forgotten example is left alone.
    Returns:
        0-d float32, >= 0.
    Raises:
        TypeError: an input isn't floating point.
        ValueError: the shapes aren't one and the same [B] with B >= 1, or beta isn't positive.
    """
    check_per_example(log_probs=log_probs, reference_log_probs=reference_log_probs)
    check_positive("beta", beta)
    return _preference_loss(-beta * (upcast(log_probs) - upcast(reference_log_probs.detach())), beta)


def simnpo_loss(log_probs: Tensor, token_counts: Tensor, beta: float = 2.5, delta: float = 0.0) -> Tensor:
    r"""Push answers to a low probability per token, without a reference (simple NPO).

    .. math:: L_{SimNPO} = -\frac{2}{\beta} \, \mathrm{mean}_i \,
        \log \sigma\Big(-\frac{\beta}{|y_i|} \log \pi(y_i \mid x_i) - \delta\Big)      (arXiv:2410.07163)

    For beta -> 0 (and delta = 0) it is gradient ascent on the mean log-probability per token.

    Args:
        log_probs: [B], the model's :func:`sequence_log_probs` on the answers to forget.
        token_counts: [B] integers, :func:`token_counts` of the same labels. 0 is taken as 1: no gradient.
        beta: inverse temperature, > 0; 2.5 is the authors' choice for TOFU forget05 (4.5 for forget10).
        delta: reward margin, the paper's gamma (0 there), outside beta. The authors' code and open-unlearning
            put theirs inside, log sigma(beta * (-log pi / |y| - d)): delta = beta * d.
    Returns:
        0-d float32, >= 0.
    Raises:
        TypeError: the log-probabilities aren't floating point or the counts aren't integers.
        ValueError: the shapes aren't one and the same [B] with B >= 1, or beta isn't positive.
    """
    check_per_example(log_probs=log_probs)
    check_int64("token_counts", token_counts)
    check_shape("token_counts", token_counts, log_probs.shape, "log_probs")
    check_positive("beta", beta)
    return _preference_loss(-beta * upcast(log_probs) / token_counts.clamp(min=1) - delta, beta)


def logit_margin_loss(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Flatten the prediction of the answers to forget, and stop where it is flat (logit margin flattening).

    .. math:: L_{margin} = \frac{1}{\sum_i |y_i|} \sum_{i,t}
        \Big(\max_v z_{i,t,v} - \frac{1}{V} \sum_v z_{i,t,v}\Big)^2      (PDU, arXiv:2506.05314)

    z: the logits that predict an answer token; the paper's code takes the prompt's and the padding's too. NPO and
    SimNPO only come near their least value, 0, the further the less likely an answer is; this one reaches it, at the
    uniform prediction, so a run ends by itself. It needs no reference. What was likely instead of the answer is
    flattened too. As a square of logits its gradient is large at first: in the Euclidean step and the weighted sum γ is
    about 0.01, with ``metric="retain"``, which rescales it, of the size it has for the other losses.

    Args:
        logits: [B, T, V], floating point, of the vocabulary alone: padding that is masked with -inf or a large negative
            number would be in the mean.
        labels: [B, T] int64; -100 marks what takes no part. Only where they are counts, not which.
    Returns:
        0-d float32, >= 0; 0 for a batch without labels.
    Raises:
        TypeError, ValueError: as :func:`sequence_log_probs`.
    Cost: keeps no float32 copy of the logits for backward; backward makes one, on the CPU forward too.
    """
    check_logits(logits, labels)
    predicted = _predicted(labels)
    largest = upcast(logits.max(dim=-1).values)
    margins = (largest - logits.mean(dim=-1, dtype=largest.dtype)).masked_fill(~predicted, 0.0)
    return masked_mean(margins.square(), predicted)


def dpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    reference_chosen_log_probs: Tensor,
    reference_rejected_log_probs: Tensor,
    beta: float = 0.1,
) -> Tensor:
    r"""Prefer an "I don't know" answer y+ to the answer y- to forget (direct preference optimization).

    .. math:: L_{DPO} = -\frac{2}{\beta} \, \mathrm{mean}_i \, \log \sigma\Big(
        \beta \log \frac{\pi(y^+_i \mid x_i)}{\pi_{ref}(y^+_i \mid x_i)}
        - \beta \log \frac{\pi(y^-_i \mid x_i)}{\pi_{ref}(y^-_i \mid x_i)}\Big)      (arXiv:2305.18290)

    The DPO paper has no factor 2/beta; unlearning code has (that of NPO, arXiv:2404.05868, open-unlearning).
    With it the gradient at the reference is grad log pi(y-) - grad log pi(y+) for any beta, and NPO is this
    loss without y+, on the same scale, so that gamma keeps its meaning. Times beta/2 it is the paper's loss.

    Args:
        chosen_log_probs: [B], :func:`sequence_log_probs` of "I don't know" answers (:data:`IDK_ANSWERS`).
        rejected_log_probs: [B], the same on the answers to forget.
        reference_chosen_log_probs: [B], those of the model before unlearning; get no gradient.
        reference_rejected_log_probs: [B], likewise.
        beta: inverse temperature, > 0.
    Returns:
        0-d float32, >= 0.
    Raises:
        TypeError: an input isn't floating point.
        ValueError: the shapes aren't one and the same [B] with B >= 1, or beta isn't positive.
    """
    check_per_example(
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
        reference_chosen_log_probs=reference_chosen_log_probs,
        reference_rejected_log_probs=reference_rejected_log_probs,
    )
    check_positive("beta", beta)
    chosen = upcast(chosen_log_probs) - upcast(reference_chosen_log_probs.detach())
    rejected = upcast(rejected_log_probs) - upcast(reference_rejected_log_probs.detach())
    return _preference_loss(beta * (chosen - rejected), beta)


def kl_loss(logits: Tensor, reference_logits: Tensor, labels: Tensor) -> Tensor:
    r"""Average the forward KL divergence from the reference over all answer tokens: a retain loss.

    .. math:: L_{KL} = \frac{1}{\sum_i |y_i|} \sum_{i,t} \sum_v \pi_{ref}(v \mid x_i, y_{i,<t})
        \log \frac{\pi_{ref}(v \mid x_i, y_{i,<t})}{\pi(v \mid x_i, y_{i,<t})}      (arXiv:2401.06121)

    Args:
        logits: [B, T, V], floating point.
        reference_logits: [B, T, V], those of the model before unlearning; get no gradient.
        labels: [B, T] int64; only positions that predict a label other than -100 count.
    Returns:
        0-d float32, >= 0 up to rounding; 0 for a batch without labels.
    Raises:
        TypeError: the logits aren't floating point or the labels aren't int64.
        ValueError: the shapes aren't [B, T, V], the same, and [B, T].
    """
    check_logits(logits, labels)
    check_floating("reference_logits", reference_logits)
    check_shape("reference_logits", reference_logits, logits.shape, "logits")
    log_probs = F.log_softmax(upcast(logits), dim=-1)
    reference = F.log_softmax(upcast(reference_logits.detach()), dim=-1)
    divergence = F.kl_div(log_probs, reference, reduction="none", log_target=True).sum(dim=-1)
    return masked_mean(divergence, _predicted(labels))


def _targets(labels: Tensor) -> Tensor:
    # What position t predicts. The labels are shifted, not the logits: a slice of those would be copied.
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]


def _predicted(labels: Tensor) -> Tensor:
    check_labels(labels)
    return _targets(labels) != IGNORE_INDEX


def _token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    check_logits(logits, labels)
    flat = upcast(logits).reshape(-1, logits.shape[-1])
    nll = F.cross_entropy(flat, _targets(labels).reshape(-1), ignore_index=IGNORE_INDEX, reduction="none")
    return nll.view(labels.shape)


def _preference_loss(margins: Tensor, beta: float) -> Tensor:
    return -2.0 / beta * F.logsigmoid(margins).mean()
