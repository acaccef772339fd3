"""What a track asks for: what is known, what is to be forgotten and kept, and how a model is judged."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shared_lib.encoding import Example
from shared_lib.models import Model, Tokenizer

Scores = Mapping[str, float | None]
#: The scores of a model, and what the scores of others need of it if it is the retrained one (JSON-able).
Judgement = tuple[Scores, Any]
#: ``(model, what was kept of the retrained model, or None)``
Judge = Callable[[Model, Any], Judgement]


@dataclass(frozen=True)
class Task:
    """One setting of a track, ready to train and to unlearn.

    Args:
        tokenizer: of the models.
        known: what the target learns; ``kept`` is what the retrained model learns, all of it but the forgotten.
        forget, retain: what the two losses see.
        untouched: known, but in neither loss: what unlearning does to everything else.
        refusals: for each of ``forget`` the same prompt with an "I don't know" answer, for DPO; may be empty.
        judge: the benchmark's own scores.
        unseen: like ``forget``, but nobody ever learned it; may be empty.
        watch: scores cheap enough for every look along the way; empty where there are none.
    """

    tokenizer: Tokenizer
    known: list[Example]
    kept: list[Example]
    forget: list[Example]
    retain: list[Example]
    untouched: list[Example]
    refusals: list[Example]
    judge: Judge
    unseen: list[Example] = field(default_factory=list)
    watch: Callable[[Model], dict[str, float]] = field(default=lambda model: {})
