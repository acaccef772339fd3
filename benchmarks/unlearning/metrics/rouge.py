"""ROUGE-L: how much of a text's word order another text has."""

from collections.abc import Sequence
from typing import Literal


def rouge_l(
    references: Sequence[str], texts: Sequence[str], kind: Literal["recall", "f1"], *, stem: bool
) -> list[float]:
    r"""Score each text by its longest common subsequence of words with the reference.

    .. math:: R = \frac{LCS}{|reference|}, \quad P = \frac{LCS}{|text|}, \quad F_1 = \frac{2 P R}{P + R}

    TOFU takes the recall and compares stems; MUSE takes F1 of the words as they are. In [0, 1]; higher = more
    memorised; 0 if either has no word.
    """
    from rouge_score.rouge_scorer import RougeScorer  # Here: it takes a second to load, and not every process needs it.

    scorer = RougeScorer(["rougeL"], use_stemmer=stem)
    scores = [scorer.score(r, t)["rougeL"] for r, t in zip(references, texts, strict=True)]
    return [float(score.recall if kind == "recall" else score.fmeasure) for score in scores]
