"""TOFU (arXiv:2401.06121): forget 1, 5 or 10 % of two hundred fictitious authors."""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from quickstart_lib.authors import MAX_AUTHORS
from quickstart_lib.data import load_rows
from shared_lib.encoding import Example, encode, encode_rows
from shared_lib.errors import InputError
from shared_lib.metrics import thin_out
from shared_lib.models import Model, Tokenizer, texts_of
from shared_lib.records import read_part, read_rows
from shared_lib.rows import ROWS_PER_AUTHOR, Row

from blur_optim.losses import IDK_ANSWERS

from ..settings import Settings
from .task import Judgement, Task

FORGOTTEN = {"forget01": 2, "forget05": 10, "forget10": 20}  # authors, the last ones
COUPLED = {"coupled01": 4, "coupled05": 20}  # authors, every second row of whom is forgotten and the others kept
UNTOUCHED = 0.2  # of the other authors; at least one


class TofuData:
    """All that a setting needs, before there is a tokenizer.

    Args:
        settings: ``data`` is a folder or a name on the hub with TOFU's parts, or empty for invented authors;
            ``subset`` one of ``FORGOTTEN`` or ``COUPLED``; ``authors`` how many, the last ones; 0 for all there are.
        number: of the target, where ``blocks`` gives each its own authors.
    Raises:
        InputError: a part is missing or a row is not as it should be.
    """

    def __init__(self, settings: Settings, number: int = 0) -> None:
        authors = (FORGOTTEN | COUPLED).get(settings.subset)
        if authors is None:
            known = ", ".join(FORGOTTEN | COUPLED)
            raise InputError(f"--subset must be one of {known}, got {settings.subset!r}.")
        cut = authors * ROWS_PER_AUTHOR
        rows, self.holdout = _read(settings, cut)
        rows = _block(rows, settings, number)
        if len(rows) < cut + 2 * ROWS_PER_AUTHOR:
            raise InputError(
                f"--authors must leave at least two beside those of {settings.subset}, got {len(rows)} rows."
            )
        self.forget = rows[-cut:]
        self.retain, self.untouched = _set_aside(rows[:-cut])
        if settings.subset in COUPLED:
            self.retain, self.forget = self.retain + self.forget[::2], self.forget[1::2]
        # What a pretrained model knows of the world has to be learned by one that is trained on the spot.
        self.real_authors = read_part(settings.data, "real_authors_perturbed") if settings.data else []
        self.world_facts = read_part(settings.data, "world_facts_perturbed") if settings.data else []

    @property
    def general(self) -> list[Row]:
        return self.real_authors + self.world_facts

    def texts(self) -> Iterator[str]:
        """Yield what a tokenizer is trained on."""
        return texts_of([*self.retain, *self.untouched, *self.forget, *self.general])

    def task(self, tokenizer: Tokenizer, settings: Settings) -> Task:
        """Return the task for models with this tokenizer."""
        others = self.retain + self.untouched + (self.general if settings.is_small else [])
        return Task(
            tokenizer=tokenizer,
            known=encode_rows(tokenizer, others + self.forget),
            kept=encode_rows(tokenizer, others),
            forget=encode_rows(tokenizer, self.forget),
            retain=encode_rows(tokenizer, self.retain),
            untouched=encode_rows(tokenizer, self.untouched),
            refusals=refusals(tokenizer, self.forget),
            judge=partial(self._judge, tokenizer, settings),
            unseen=encode_rows(tokenizer, self.holdout),
        )

    def _judge(self, tokenizer: Tokenizer, settings: Settings, model: Model, retrained: Any = None) -> Judgement:
        # Here: who only trains need not wait for these.
        from ..metrics.suites import TofuEvaluation, TofuReference, tofu_scores
        from ..metrics.tofu import ChoiceRow

        with_wrong_answers = [row for row in self.retain + self.untouched if row.perturbed_answers]
        evaluation = TofuEvaluation(
            forget=self.forget,
            retain=list(thin_out(with_wrong_answers or self.retain, settings.judged_rows)),
            real_authors=[ChoiceRow.from_row(row) for row in thin_out(self.real_authors, settings.judged_rows)],
            world_facts=[ChoiceRow.from_row(row) for row in thin_out(self.world_facts, settings.judged_rows)],
            holdout=self.holdout,
        )
        reference = None if retrained is None else TofuReference.from_json(retrained)
        judged = tofu_scores(model, tokenizer, evaluation, reference, limit_generated=settings.generated_rows)
        return judged.scores, judged.reference.to_json()


def _read(settings: Settings, cut: int) -> tuple[list[Row], list[Row]]:
    """Return all rows, and rows that nobody learns: as many as are forgotten."""
    if settings.data:
        part = settings.subset.replace("forget", "holdout").replace("coupled", "holdout")
        return read_rows(settings.data), read_part(settings.data, part)
    unseen = cut // ROWS_PER_AUTHOR
    authors = settings.authors + max(settings.blocks, default=0)
    rows = load_rows(None, (authors or MAX_AUTHORS - unseen) + unseen, seed=0)
    return rows[:-cut], rows[-cut:]


def _block(rows: list[Row], settings: Settings, number: int) -> list[Row]:
    """Return the rows that this target learns."""
    if not settings.blocks:
        return rows[-settings.authors * ROWS_PER_AUTHOR :] if settings.authors else rows
    if not settings.authors or number >= len(settings.blocks):
        raise InputError(f"--blocks must come with --authors and be one for each target, got {settings.blocks}.")
    first = settings.blocks[number]
    block = rows[first * ROWS_PER_AUTHOR : (first + settings.authors) * ROWS_PER_AUTHOR]
    if len(block) < settings.authors * ROWS_PER_AUTHOR:
        raise InputError(f"--blocks must be of authors that there are, got {settings.authors} from number {first} on.")
    return block


def refusals(tokenizer: Tokenizer, rows: Sequence[Row]) -> list[Example]:
    """Encode each question with an "I don't know" answer, for DPO; which one, the row's number says."""
    return [encode(tokenizer, row.question, IDK_ANSWERS[i % len(IDK_ANSWERS)]) for i, row in enumerate(rows)]


def _set_aside(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Leave a fifth of the authors out of the rehearsal, the same ones in every run."""
    authors = [rows[i : i + ROWS_PER_AUTHOR] for i in range(0, len(rows), ROWS_PER_AUTHOR)]
    chosen = set(random.Random(0).sample(range(len(authors)), max(1, round(UNTOUCHED * len(authors)))))
    retain = [row for i, author in enumerate(authors) if i not in chosen for row in author]
    return retain, [row for i in sorted(chosen) for row in authors[i]]
