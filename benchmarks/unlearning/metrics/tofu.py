"""TOFU's metrics (arXiv:2401.06121): truth ratio, probability over choices, forget quality and model utility.

Probability and ROUGE-L recall of the answers are those of :mod:`.likelihood` and :mod:`.rouge`. Where the paper and
its code (locuslab/tofu, aggregate_eval_stat.py) differ, the code is taken, since all published numbers are its own:

=================================  ================================  ==========================================
what                               paper                             code, open-unlearning, and here
=================================  ================================  ==========================================
truth ratio over wrong answers     arithmetic mean of probabilities  geometric: exp of the mean log-probability
probability of a choice            not normalised for length         per token, as everywhere else
forget quality's test              on R                              on 1/R: the same p-value, as ranks decide
=================================  ================================  ==========================================
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from shared_lib.rows import Row


class ChoiceRow(NamedTuple):
    """A question with its true answer and wrong ones: real_authors and world_facts."""

    question: str
    answer: str
    wrong_answers: tuple[str, ...]

    @classmethod
    def from_row(cls, row: Row) -> "ChoiceRow":
        """Take the perturbed answers as the wrong ones."""
        return cls(row.question, row.answer, row.perturbed_answers)


class AnswerLogProbs(NamedTuple):
    """Mean log-probabilities per token of a true answer (or its paraphrase) and of wrong ones to one question."""

    true: float
    wrong: list[float]


def log_truth_ratio(answers: AnswerLogProbs, mean: Literal["geometric", "arithmetic"] = "geometric") -> float:
    r"""Tell how probable wrong answers are beside the true one, in other words than it was learned in.

    .. math:: R = \frac{\big(\prod_j \pi(\hat y_j \mid x)^{1/|\hat y_j|}\big)^{1/J}}
        {\pi(\tilde y \mid x)^{1/|\tilde y|}}      (arXiv:2401.06121, equation 1, with the code's geometric mean)

    with the paraphrased answer :math:`\tilde y` (real_authors and world_facts: the answer itself) and J wrong answers
    :math:`\hat y_j`. The equation has the arithmetic mean, which ``mean`` gives, and which is never lower.

    Returns:
        log R, which unlike R overflows for no model; lower = more memorised: < 0 if the model tells true from wrong.
    """
    if not answers.wrong:
        raise ValueError("`answers.wrong` must have at least one log-probability, got none.")
    wrong = answers.wrong
    if mean == "arithmetic":
        largest = max(wrong)
        if math.isinf(largest):
            return largest - answers.true
        return largest + math.log(sum(math.exp(x - largest) for x in wrong) / len(wrong)) - answers.true
    return sum(wrong) / len(wrong) - answers.true


def truth_told(log_ratios: Sequence[float]) -> float:
    r"""Average how well true answers are told from wrong ones: the truth ratio's part in the model utility.

    .. math:: \mathrm{mean}_i \max(0, 1 - R_i)      (arXiv:2401.06121, section 2.2.1)

    Returns:
        In [0, 1]; higher = more known.
    """
    return _mean([-math.expm1(min(0.0, x)) for x in log_ratios])


def truth_balance(log_ratios: Sequence[float]) -> float:
    r"""Average how close the true and the wrong answers are: the code's truth ratio of the rows to forget.

    .. math:: \mathrm{mean}_i \min(R_i, 1 / R_i)      (locuslab/tofu and open-unlearning; not in the paper)

    Returns:
        In [0, 1]; **lower** = more memorised; 1 = no answer is preferred.
    """
    return _mean([math.exp(-abs(x)) for x in log_ratios])


def forget_quality(log_ratios: Sequence[float], retrained_log_ratios: Sequence[float]) -> float:
    """Test whether the rows to forget look as they do to a model that never saw them.

    The p-value of the two-sided, two-sample Kolmogorov-Smirnov test between the truth ratios of the rows to forget
    under the unlearned and under the retrained model (arXiv:2401.06121, section 2.2.2). It depends on ranks alone:
    log R, R and 1/R give the same.

    Returns:
        In [0, 1]; higher = more like retrained. Both remembering and forgetting too much lower it. NaN if a ratio is.
    Raises:
        ValueError: either is empty.
    """
    if not len(log_ratios) or not len(retrained_log_ratios):
        raise ValueError(f"Both models must have ratios, got {len(log_ratios)} and {len(retrained_log_ratios)}.")
    if any(map(math.isnan, [*log_ratios, *retrained_log_ratios])):
        return math.nan
    from scipy.stats import ks_2samp  # Here: it takes a second to load.

    return float(ks_2samp(log_ratios, retrained_log_ratios).pvalue)


def choice_probability(answers: AnswerLogProbs) -> float:
    r"""Return the true answer's share of the choices' probability.

    .. math:: \frac{\pi(y \mid x)^{1/|y|}}{\sum_{y' \in \{y, \hat y_1, \dots\}} \pi(y' \mid x)^{1/|y'|}}
        (arXiv:2401.06121, section 2.2.1, per token as in its code)

    Returns:
        In [0, 1]; higher = more known; 1 / number of choices = guessing.
    """
    if math.isnan(answers.true) or any(map(math.isnan, answers.wrong)):
        return math.nan
    largest = max(answers.true, *answers.wrong)
    true, *wrong = (math.exp(x - largest) for x in (answers.true, *answers.wrong))
    return true / (true + sum(wrong))


def model_utility(terms: Mapping[str, float] | Sequence[float]) -> float:
    r"""Take the harmonic mean of probability, ROUGE-L recall and truth ratio on retain, real authors, world facts.

    .. math:: \frac{9}{\sum_{j=1}^9 1/u_j}      (arXiv:2401.06121, section 2.2.1)

    Args:
        terms: nine for TOFU, each in [0, 1]; with fewer, it is another utility, to be called so.
    Returns:
        In [0, 1]; higher = more useful; 0 if any term is. NaN if a term is.
    """
    values = list(terms.values() if isinstance(terms, Mapping) else terms)
    if not values:
        raise ValueError("`terms` must have at least one term, got none.")
    if any(map(math.isnan, values)):
        return math.nan
    from scipy.stats import hmean  # Here: it takes a second to load.

    return float(hmean(values))


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("`log_ratios` must have at least one row, got none.")
    return sum(values) / len(values)
