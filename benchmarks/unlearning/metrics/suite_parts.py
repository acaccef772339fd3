"""What the suites share: means, fluency, AUCs, and None in place of what is no number."""

import math
from collections.abc import Mapping, Sequence

from shared_lib.models import Model, Tokenizer

from .fluency import ngram_entropy, perplexity, repetition_rate
from .measure import PerRow
from .privacy import ATTACKS, auc, privacy_leakage

Scores = dict[str, float | None]
LIMIT_GENERATED = 80  # rows of a kind: generating costs far more than probabilities


def mean(values: Sequence[float]) -> float:
    """Average at least one value."""
    return sum(values) / len(values)


def finite(scores: Scores) -> Scores:
    """Replace NaN and infinity, which JSON has no word for, by None."""
    return {name: finite_or_none(value) for name, value in scores.items()}


def finite_or_none(value: float | None) -> float | None:
    """Return the value if it is a finite number."""
    return value if value is not None and math.isfinite(value) else None


def known(name: str, rows: PerRow) -> Scores:
    """Average log-probability and probability per token."""
    return {
        f"{name}_log_prob": mean(rows["log_prob"]),
        f"{name}_probability": mean([math.exp(x) for x in rows["log_prob"]]),
    }


def memorized(prefix: str, rows: PerRow) -> Scores:
    """Average extraction strength and exact memorisation."""
    return {f"{prefix}{metric}": mean(rows[metric]) for metric in ("extraction_strength", "exact_memorization")}


def fluency(name: str, texts: Sequence[str], judge: Model | None, tokenizer: Tokenizer) -> Scores:
    """Say how varied, repetitive and, given a judge, surprising the texts are."""
    scores: Scores = {
        f"{name}_fluency_entropy": mean([ngram_entropy(text) for text in texts]),
        f"{name}_repetition": mean([repetition_rate(text) for text in texts]),
    }
    if judge is not None:
        scores[f"{name}_fluency_perplexity"] = perplexity(judge, tokenizer, texts)
    return scores


def attack_aucs(members: PerRow, others: PerRow) -> dict[str, float | None]:
    """Return each attack's AUC."""
    return {attack: finite_or_none(auc(members[attack], others[attack])) for attack in ATTACKS}


def membership(aucs: Mapping[str, float | None], retrained: Mapping[str, float | None] | None) -> Scores:
    """Name the AUCs, and compare Min-K% with the retrained model's."""
    scores: Scores = {f"mia_{attack}_auc": value for attack, value in aucs.items()}
    if aucs and retrained:
        own, reference = aucs["min_k"], retrained.get("min_k")
        scores["privleak"] = None if own is None or reference is None else privacy_leakage(own, reference)
    return scores
