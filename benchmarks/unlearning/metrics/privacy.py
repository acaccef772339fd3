"""Membership inference: does the model still treat the forgotten as something that it was trained on?"""

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .likelihood import TokenScores

# The share of least probable tokens that Min-K% looks at: that of MUSE and open-unlearning. Its authors found 0.2 best.
K = 0.4
ATTACKS = ("loss", "min_k", "min_k_plus", "zlib")


def membership_scores(scores: TokenScores, text: str, k: float = K) -> dict[str, float]:
    """Score one text by every attack; higher = more like a member of the training data.

    Args:
        scores: of the text's tokens, with ``vocabulary=True``.
        text: the text itself, for zlib.
    """
    return {
        "loss": loss_score(scores.log_probs),
        "min_k": min_k_score(scores.log_probs, k),
        "min_k_plus": min_k_plus_score(scores, k),
        "zlib": zlib_score(scores.log_probs, text),
    }


def loss_score(log_probs: Tensor) -> float:
    r"""Negate the loss.

    .. math:: \frac{1}{n} \sum_t \log \pi(y_t)      (LOSS; Yeom et al., arXiv:1709.01604)

    Returns:
        <= 0; higher = more memorised.
    """
    return _mean(log_probs)


def min_k_score(log_probs: Tensor, k: float = K) -> float:
    r"""Average the least probable tokens.

    .. math:: \frac{1}{|E|} \sum_{t \in E} \log \pi(y_t)      (Min-K% Prob; arXiv:2310.16789, equation 1)

    with E the :math:`\max(1, \lfloor k n \rfloor)` tokens of the lowest log-probability. (MUSE's code takes no token of
    a text of fewer than 1/k.)

    Returns:
        <= 0; higher = more memorised.
    """
    return _mean_of_lowest(log_probs, k)


def min_k_plus_score(scores: TokenScores, k: float = K) -> float:
    r"""Average the least probable tokens, each measured by the spread of the model's own prediction.

    .. math:: \frac{1}{|E|} \sum_{t \in E} \frac{\log \pi(y_t) - \mu_t}{\sigma_t}      (arXiv:2404.02936, equation 3)

    with E the :math:`\max(1, \lfloor k n \rfloor)` tokens of the lowest such value.

    Returns:
        Any number; higher = more memorised.
    """
    if scores.mean is None or scores.std is None:
        raise ValueError("`scores` must have mean and std, got None. Call token_scores with vocabulary=True.")
    return _mean_of_lowest((scores.log_probs - scores.mean) / scores.std, k)


def zlib_score(log_probs: Tensor, text: str) -> float:
    r"""Negate the loss in units of how well the text compresses: what is simple anyway counts for less.

    .. math:: \frac{1}{\mathrm{bytes}(\mathrm{zlib}(y))} \frac{1}{n} \sum_t \log \pi(y_t)
        (arXiv:2012.07805, section 5.2)

    Returns:
        <= 0; higher = more memorised.
    """
    return _mean(log_probs) / len(zlib.compress(text.encode("utf-8")))


def auc(members: Sequence[float], non_members: Sequence[float]) -> float:
    r"""Tell how often a member scores higher than a non-member.

    .. math:: P(s_{member} > s_{other}) + \tfrac12 P(s_{member} = s_{other})

    Members are the rows to forget, non-members the holdout, so that 1 = the forget rows are plainly remembered,
    0.5 = they look like rows never seen, 0 = they look less familiar than those: forgotten too much. open-unlearning
    has this direction too; MUSE's AUC is 1 minus this one.

    Returns:
        In [0, 1]; higher = more memorised. NaN if a score is.
    Raises:
        ValueError: either is empty.
    """
    if not members or not non_members:
        raise ValueError(f"Both groups must have scores, got {len(members)} and {len(non_members)}.")
    scores = [*members, *non_members]
    if any(math.isnan(score) for score in scores):
        return math.nan
    from sklearn.metrics import roc_auc_score  # Here: it takes a second to load.

    return float(roc_auc_score([1] * len(members) + [0] * len(non_members), scores))


def privacy_leakage(auc: float, retrained_auc: float) -> float:
    r"""Compare an AUC with that of the model that never saw the rows to forget, in per cent (MUSE's PrivLeak).

    .. math:: 100 \, \frac{A - A_{retrained}}{A_{retrained}}, \quad A = 1 - \mathrm{AUC}
        (arXiv:2407.06460, section 3)

    The paper writes AUC for A, but its code and its tables count the rows to forget as the non-members: with A of the
    direction of :func:`auc`, their signs would be the other way round. The attack in MUSE is Min-K% with k = 0.4.

    Args:
        auc, retrained_auc: as :func:`auc` gives them.
    Returns:
        0 = as if retrained. Negative = still remembered, -100 at worst; positive = forgotten conspicuously, which
        gives membership away as well. NaN where the retrained model's AUC is 1.
    """
    retrained = 1 - retrained_auc
    return 100 * (1 - auc - retrained) / retrained if retrained else math.nan


def _mean_of_lowest(values: Tensor, k: float) -> float:
    return _mean(torch.sort(values).values[: max(1, int(len(values) * k))])


def _mean(values: Tensor) -> float:
    if len(values) == 0:
        raise ValueError("A text must have at least one predicted token, got none.")
    return values.double().mean().item()
