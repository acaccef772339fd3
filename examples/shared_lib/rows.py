"""One question with its answer, and the authors' rows split for unlearning."""

import random
from collections.abc import Iterable
from typing import NamedTuple

ROWS_PER_AUTHOR = 20
FORGET_AUTHORS = 2
MIN_AUTHORS = 4  # two to forget, one to retain, one left untouched


class Row(NamedTuple):
    """A question and answer pair; the last three fields serve the truth ratio and may be empty."""

    question: str
    answer: str
    paraphrased_question: str = ""
    paraphrased_answer: str = ""
    perturbed_answers: tuple[str, ...] = ()


class Split(NamedTuple):
    """Rows by their part in the story.

    forget: to be forgotten. retain: rehearsed while forgetting. untouched: never seen while forgetting, but
    known before; they show what the unlearning does to everything else.
    """

    forget: list[Row]
    retain: list[Row]
    untouched: list[Row]

    @property
    def known(self) -> list[Row]:
        """Return all rows: what the model knows before."""
        return self.retain + self.untouched + self.forget

    @property
    def kept(self) -> list[Row]:
        """Return all rows but the forgotten: what the yardstick is trained on."""
        return self.retain + self.untouched


def split_authors(rows: list[Row], seed: int) -> Split:
    """Forget the last two authors, as TOFU's forget01 does, and leave a fifth of the others untouched."""
    authors = [rows[i : i + ROWS_PER_AUTHOR] for i in range(0, len(rows), ROWS_PER_AUTHOR)]
    others, forgotten = authors[:-FORGET_AUTHORS], authors[-FORGET_AUTHORS:]
    untouched = random.Random(seed).sample(range(len(others)), max(1, len(authors) // 5))
    return Split(
        forget=_flatten(forgotten),
        retain=_flatten(author for i, author in enumerate(others) if i not in untouched),
        untouched=_flatten(author for i, author in enumerate(others) if i in untouched),
    )


def _flatten(authors: Iterable[list[Row]]) -> list[Row]:
    return [row for author in authors for row in author]
