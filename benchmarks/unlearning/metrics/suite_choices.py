"""Multiple-choice accuracies, as one flat dict."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from shared_lib.models import Model, Tokenizer

from .choices import Question, accuracy, letter_choices, text_choices
from .measure import Measure, SuiteProgress
from .suite_parts import Scores, mean


def choice_scores(
    model: Model,
    tokenizer: Tokenizer,
    questions: Mapping[str, Sequence[Question]],
    *,
    subjects: Mapping[str, str] | None = None,
    letters: bool = True,
    parts: Path | None = None,
    progress: SuiteProgress | None = None,
) -> Scores:
    """Return ``<name>_text_accuracy``, ``<name>_letter_accuracy`` and what guessing gives, ``<name>_chance``.

    Args:
        questions: by name, such as ``forget`` and ``retain``; empty lists are left out.
        subjects: what the questions of a name are about, for the letters' prompt.
        letters: whether to ask for letters too. Models that never saw such questions guess.
        parts, progress: as in :func:`tofu_scores`.
    """
    subjects = subjects or {}
    measure = Measure(model, tokenizer, parts, ("choices", dict(questions), dict(subjects)), progress)
    scores: Scores = {}
    for name, asked in questions.items():
        if not asked:
            continue
        scores[f"{name}_text_accuracy"] = accuracy(measure.chosen(f"{name}/texts", text_choices, asked), asked)
        if letters:
            chosen = measure.chosen(f"{name}/letters", letter_choices, asked, subjects.get(name, ""))
            scores[f"{name}_letter_accuracy"] = accuracy(chosen, asked)
        scores[f"{name}_chance"] = mean([1 / len(question.choices) for question in asked])
    return scores
