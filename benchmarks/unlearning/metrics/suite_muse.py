"""All metrics of MUSE, as one flat dict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from shared_lib.encoding import Example
from shared_lib.metrics import thin_out
from shared_lib.models import Model, Tokenizer
from shared_lib.rows import Row

from .measure import Measure, PerRow, SuiteProgress
from .memorization import VERBATIM_TOKENS
from .rouge import rouge_l
from .suite_parts import LIMIT_GENERATED, Scores, attack_aucs, finite, fluency, known, mean, membership, memorized


@dataclass(frozen=True)
class MuseEvaluation:
    """The passages and questions that MUSE's metrics are taken on; any list may be short or empty.

    Passages are ``Example([], ids)``; what the tokenizer begins every text with may be their prompt. holdout: like
    ``forget``, but never trained on.
    """

    forget: Sequence[Example] = ()
    retain: Sequence[Example] = ()
    holdout: Sequence[Example] = ()
    forget_questions: Sequence[Row] = ()
    retain_questions: Sequence[Row] = ()


class MuseScores(NamedTuple):
    """The metrics, and the AUCs by which other models' privacy leakage is measured if this one is the retrained."""

    scores: Scores
    aucs: dict[str, float | None]


def muse_scores(
    model: Model,
    tokenizer: Tokenizer,
    data: MuseEvaluation,
    retrained_aucs: Mapping[str, float | None] | None = None,
    *,
    prefix: int,
    room: int = VERBATIM_TOKENS,
    limit_generated: int = LIMIT_GENERATED,
    judge: Model | None = None,
    parts: Path | None = None,
    progress: SuiteProgress | None = None,
) -> MuseScores:
    """Take MUSE's metrics (arXiv:2407.06460) of passages and of questions about them, and those of memorisation.

    A metric whose rows are missing is left out; one that the model makes NaN or infinite is None.

    Args:
        retrained_aucs: ``aucs`` of the retrained model; without it, there is no privleak.
        prefix: tokens of a passage that the model is shown.
        room: tokens of its continuation that are compared.
        limit_generated: passages and questions of a kind that texts are generated for, at most; 0 for none.
        judge: a model with the same tokenizer that finds answers strange or not; without it, no perplexity.
        parts, progress: as in :func:`tofu_scores`.
    """
    measure = Measure(model, tokenizer, parts, ("muse", data, prefix, room, limit_generated), progress)
    scores, aucs = _texts(measure, data)
    scores |= membership(aucs, retrained_aucs)
    if limit_generated:
        for name, passages in (("forget", data.forget), ("retain", data.retain)):
            if passages:
                some = thin_out(passages, limit_generated)
                scores[f"{name}_verbmem"] = mean(measure.verbatim(name, some, prefix, room))
        for name, questions in (("forget", data.forget_questions), ("retain", data.retain_questions)):
            if questions:
                scores |= _knowledge(measure, name, thin_out(questions, limit_generated), judge)
    return MuseScores(finite(scores), aucs)


def _texts(measure: Measure, data: MuseEvaluation) -> tuple[Scores, dict[str, float | None]]:
    scores: Scores = {}
    results: dict[str, PerRow] = {}
    private = bool(data.forget and data.holdout)
    for name, passages in (("forget", data.forget), ("retain", data.retain), ("holdout", data.holdout)):
        if passages:
            words = [measure.tokenizer.decode(p.answer, skip_special_tokens=True) for p in passages]
            results[name] = measure.texts(name, passages, words, membership=private and name != "retain")
            scores |= known(name, results[name])
    for name, prefix in (("forget", ""), ("retain", "retain_")):
        if name in results:
            scores |= memorized(prefix, results[name])
    return scores, attack_aucs(results["forget"], results["holdout"]) if private else {}


def _knowledge(measure: Measure, name: str, questions: Sequence[Row], judge: Model | None) -> Scores:
    said = measure.said(f"{name}_questions", questions)
    scores = fluency(name, said, judge, measure.tokenizer)
    return scores | {f"{name}_knowmem": mean(rouge_l([q.answer for q in questions], said, "f1", stem=False))}
