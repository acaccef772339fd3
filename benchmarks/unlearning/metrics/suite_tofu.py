"""All metrics of TOFU, as one flat dict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from shared_lib.metrics import thin_out
from shared_lib.models import Model, Tokenizer
from shared_lib.rows import Row

from .measure import Measure, SuiteProgress
from .rouge import rouge_l
from .suite_parts import LIMIT_GENERATED, Scores, attack_aucs, finite, fluency, known, mean, membership, memorized
from .tofu import (
    ChoiceRow,
    choice_probability,
    forget_quality,
    log_truth_ratio,
    model_utility,
    truth_balance,
    truth_told,
)

UTILITY = [
    f"{part}_{metric}"
    for part in ("retain", "real_authors", "world_facts")
    for metric in ("probability", "rouge_l", "truth_ratio")
]


@dataclass(frozen=True)
class TofuEvaluation:
    """The rows that TOFU's metrics are taken on; any list may be short or empty.

    forget: to be forgotten; retain: to be kept; both with paraphrase and perturbed answers where the truth ratio is
    wanted. holdout: like ``forget``, but never trained on.
    """

    forget: Sequence[Row] = ()
    retain: Sequence[Row] = ()
    real_authors: Sequence[ChoiceRow] = ()
    world_facts: Sequence[ChoiceRow] = ()
    holdout: Sequence[Row] = ()


@dataclass(frozen=True)
class TofuReference:
    """What forget quality and privacy leakage need of the retrained model: log R of the forget rows, and the AUCs."""

    log_truth_ratios: list[float] = field(default_factory=list)
    aucs: dict[str, float | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "TofuReference":
        """Read what :meth:`to_json` wrote."""
        return cls(list(content["log_truth_ratios"]), dict(content["aucs"]))


class TofuScores(NamedTuple):
    """The metrics; what they are as a reference for other models; which terms the model utility was taken over."""

    scores: Scores
    reference: TofuReference
    utility_over: tuple[str, ...]


def tofu_scores(
    model: Model,
    tokenizer: Tokenizer,
    data: TofuEvaluation,
    retrained: TofuReference | None = None,
    *,
    limit_generated: int = LIMIT_GENERATED,
    judge: Model | None = None,
    parts: Path | None = None,
    progress: SuiteProgress | None = None,
) -> TofuScores:
    """Take all of TOFU's metrics, memorisation, membership inference and fluency.

    A metric whose rows are missing is left out; one that the model makes NaN or infinite is None.

    Args:
        retrained: ``reference`` of the retrained model; without it, there is no forget_quality and no privleak.
        limit_generated: answers are generated for at most so many rows of a kind, evenly spaced; 0 for none.
        judge: a model with the same tokenizer that finds answers strange or not; without it, no perplexity.
        parts: a file for finished parts: an interrupted suite goes on after the last that it finished.
        progress: called with part, rows done and rows in all.
    """
    measure = Measure(model, tokenizer, parts, ("tofu", data, limit_generated), progress)
    scores, reference = _forget(measure, data)
    scores |= _retain(measure, data.retain)
    if limit_generated:
        for name, rows in (("forget", data.forget), ("retain", data.retain)):
            scores |= _said(measure, name, thin_out(rows, limit_generated), judge)
    for name, choices in (("real_authors", data.real_authors), ("world_facts", data.world_facts)):
        scores |= _choices(measure, name, choices, limit_generated)
    scores |= membership(reference.aucs, retrained.aucs if retrained else None)
    if retrained and retrained.log_truth_ratios and reference.log_truth_ratios:
        scores["forget_quality"] = forget_quality(reference.log_truth_ratios, retrained.log_truth_ratios)
    utility = {name: scores[name] for name in UTILITY if name in scores}
    if utility:  # With terms missing it is another number, and has another name.
        name = "model_utility" if len(utility) == len(UTILITY) else "partial_utility"
        scores[name] = model_utility([math.nan if term is None else term for term in utility.values()])
    return TofuScores(finite(scores), reference, tuple(utility))


def _forget(measure: Measure, data: TofuEvaluation) -> tuple[Scores, TofuReference]:
    if not data.forget:
        return {}, TofuReference()
    members = measure.rows("forget", data.forget, membership=bool(data.holdout))
    scores = known("forget", members) | memorized("", members)
    ratios = _log_truth_ratios(measure, "forget", data.forget)
    if ratios:
        scores["forget_truth_ratio"] = truth_balance(ratios)
    if not data.holdout:
        return scores, TofuReference(ratios)
    others = measure.rows("holdout", data.holdout, membership=True)
    return scores, TofuReference(ratios, attack_aucs(members, others))


def _retain(measure: Measure, rows: Sequence[Row]) -> Scores:
    if not rows:
        return {}
    result = measure.rows("retain", rows, membership=False)
    scores = known("retain", result) | memorized("retain_", result)
    if ratios := _log_truth_ratios(measure, "retain", rows):
        scores["retain_truth_ratio"] = truth_told(ratios)
    return scores


def _log_truth_ratios(measure: Measure, name: str, rows: Sequence[Row]) -> list[float]:
    complete = [row for row in rows if row.paraphrased_answer and row.perturbed_answers]
    if not complete:
        return []
    choices = [ChoiceRow(row.question, row.paraphrased_answer, row.perturbed_answers) for row in complete]
    return [log_truth_ratio(answers) for answers in measure.answers(name, choices)]


def _said(measure: Measure, name: str, rows: Sequence[Row], judge: Model | None) -> Scores:
    if not rows:
        return {}
    said = measure.said(name, rows)
    scores = fluency(name, said, judge, measure.tokenizer)
    return scores | {f"{name}_rouge_l": mean(rouge_l([row.answer for row in rows], said, "recall", stem=True))}


def _choices(measure: Measure, name: str, rows: Sequence[ChoiceRow], limit_generated: int) -> Scores:
    if not rows:
        return {}
    answers = measure.answers(name, rows)
    scores: Scores = {
        f"{name}_probability": mean([choice_probability(a) for a in answers]),
        f"{name}_truth_ratio": truth_told([log_truth_ratio(a) for a in answers]),
    }
    if limit_generated:
        some = [Row(row.question, row.answer) for row in thin_out(rows, limit_generated)]
        recalls = rouge_l([row.answer for row in some], measure.said(name, some), "recall", stem=True)
        scores[f"{name}_rouge_l"] = mean(recalls)
    return scores
