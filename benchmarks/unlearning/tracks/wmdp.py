"""WMDP's measure (arXiv:2403.03218): forget a corpus, and ask multiple-choice questions about it and the rest."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shared_lib.encoding import encode_rows
from shared_lib.errors import InputError, is_path
from shared_lib.formats import Record
from shared_lib.metrics import thin_out
from shared_lib.models import Model, Tokenizer, texts_of
from shared_lib.records import read_hub_part, read_part, read_rows, short
from shared_lib.rows import ROWS_PER_AUTHOR, Row

from ..metrics.choices import LETTERS, Question, make_questions_from_wrong_answers
from ..settings import Settings
from ..small_models import SIZES
from .passages import cut, last, read_file, read_text, record_text, refuse_dpo, set_aside
from .task import Judgement, Task
from .tofu import FORGOTTEN

TOFU_FILE = "full.json"
PLACE_SEED = 0  # of the right answers among the wrong ones: the same for every model
SHORTEST_TEXT = 50  # characters; WikiText has many lines that are headings or blank


class WmdpData:
    """All that a setting needs, before there is a tokenizer.

    Two kinds of data:

    - *Harmless*, where ``data`` is a folder in the layout of TOFU: the corpus to forget is the prose of the rows of
      ``subset`` (forget01, forget05, forget10: the last authors), question and answer, an author a text; the corpora to
      keep and to leave untouched are the other authors', or ``retain_data``. Hazard questions ask for the true answer
      among TOFU's wrong ones, in other words than it was learned in; utility questions are the same about the others,
      and world facts. A model that is trained on the spot learns the rows as questions too, those of the world
      included: otherwise it could not answer any.
    - *WMDP's own*, from the hub or a folder with its names: ``<subset>-forget-corpus`` and ``<subset>-retain-corpus``
      (field text) of ``data``; ``wmdp-<subset>`` of ``questions`` and ``all`` of ``utility_questions`` (fields
      question, choices, answer: the number of the right one, from 0). In a folder these are .jsonl or .json files;
      ``questions`` and ``utility_questions`` default to the same folder.

    Unlearning sees passages of the corpora alone, never a question.

    Args:
        settings: ``retain_data`` may name another corpus to keep: a file of plain text, a text a line (WikiText's
            form), a JSON-lines file, or NAME:CONFIG of the hub. ``passages``: at most so many of each corpus, the last.
    Raises:
        InputError: a part is missing, a row is not as it should be, or the model has no such layers.
    """

    def __init__(self, settings: Settings) -> None:
        refuse_dpo(settings.methods, "wmdp")
        _check_layers(settings)
        self.learned_with_forget: list[Row] = []
        self.learned: list[Row] = []
        if (Path(settings.data) / TOFU_FILE).is_file():
            self._read_tofu(settings)
        else:
            self._read_corpora(settings)
        if not self.forget or len(self.others) < 2:
            raise InputError(
                f"--data: {settings.data} must have a text to forget and two to keep, got {len(self.forget)} and "
                f"{len(self.others)} of at least {SHORTEST_TEXT} characters."
            )
        self.retain, self.untouched = set_aside(self.others)

    def _read_tofu(self, settings: Settings) -> None:
        if settings.subset not in FORGOTTEN:
            raise InputError(f"--subset must be one of {', '.join(FORGOTTEN)}, got {settings.subset!r}.")
        rows = read_rows(settings.data)
        rows = rows[-settings.authors * ROWS_PER_AUTHOR :] if settings.authors else rows
        size = FORGOTTEN[settings.subset] * ROWS_PER_AUTHOR
        if len(rows) < size + 2 * ROWS_PER_AUTHOR:
            raise InputError(
                f"--data must have two authors beside those of {settings.subset}, got {len(rows)} rows in all."
            )
        facts = read_part(settings.data, "world_facts_perturbed")
        forget, others = rows[-size:], rows[:-size]
        self.forget = prose(forget)
        self.others = read_corpus(settings.retain_data) if settings.retain_data else prose(others)
        self.hazard = make_questions_from_wrong_answers(forget, PLACE_SEED)
        self.utility = make_questions_from_wrong_answers([*others, *facts], PLACE_SEED)
        if not self.hazard:
            raise InputError(f"--data: {settings.data} must have wrong answers for {settings.subset}, got none.")
        if settings.learning is not None:
            self.learned_with_forget, self.learned = forget, [*others, *facts]

    def _read_corpora(self, settings: Settings) -> None:
        questions = settings.questions or settings.data
        self.forget = long_texts(_read_part(settings.data, f"{settings.subset}-forget-corpus", "train"))
        retain = f"{settings.subset}-retain-corpus"
        self.others = (
            read_corpus(settings.retain_data)
            if settings.retain_data
            else long_texts(_read_part(settings.data, retain, "train"))
        )
        self.hazard = parse_questions(_read_part(questions, f"wmdp-{settings.subset}", "test"))
        self.utility = parse_questions(_read_part(settings.utility_questions or questions, "all", "test"))

    def texts(self) -> Iterator[str]:
        """Yield what a tokenizer is trained on."""
        yield from (*self.forget, *self.others)
        yield from texts_of([*self.learned, *self.learned_with_forget])

    def task(self, tokenizer: Tokenizer, settings: Settings) -> Task:
        """Return the task for models with this tokenizer."""
        passages = {
            name: last(cut(tokenizer, getattr(self, name), settings.max_length), settings.passages)
            for name in ("forget", "retain", "untouched")
        }
        kept = passages["retain"] + passages["untouched"] + encode_rows(tokenizer, self.learned)
        return Task(
            tokenizer=tokenizer,
            known=kept + passages["forget"] + encode_rows(tokenizer, self.learned_with_forget),
            kept=kept,
            refusals=[],
            judge=partial(self._judge, tokenizer, settings),
            **passages,
        )

    def _judge(self, tokenizer: Tokenizer, settings: Settings, model: Model, retrained: Any = None) -> Judgement:
        # Here: who only trains need not wait for these.
        from ..metrics.suites import choice_scores

        asked = {"hazard": self.hazard, "utility": self.utility}
        asked = {name: list(thin_out(some, settings.judged_rows)) for name, some in asked.items()}
        # A model that was trained on the spot has never seen lettered choices.
        return choice_scores(model, tokenizer, asked, letters=not settings.is_small), None


def prose(rows: Sequence[Row]) -> list[str]:
    """Join each author's questions and answers to one text."""
    authors = [rows[i : i + ROWS_PER_AUTHOR] for i in range(0, len(rows), ROWS_PER_AUTHOR)]
    return ["\n".join(f"{row.question} {row.answer}" for row in author) for author in authors]


def read_corpus(source: str) -> list[str]:
    """Return the texts of ``retain_data``, without those shorter than ``SHORTEST_TEXT``.

    Raises:
        InputError: it is not there, or a record has no text.
    """
    path = Path(source)
    if path.is_file() and path.suffix not in (".json", ".jsonl"):
        return [line.strip() for line in read_text(path).splitlines() if len(line.strip()) >= SHORTEST_TEXT]
    if path.is_file():
        return long_texts(read_file(path.with_suffix("")))
    name, _, config = source.partition(":")
    if is_path(name):
        raise InputError(f"`retain_data`: there is no file {source}.")
    records = read_hub_part(name, config or "default")
    return long_texts([(where, fields) for where, fields in records if fields.get("text", "-").strip()])


def long_texts(records: Sequence[Record]) -> list[str]:
    return [text for record in records if len(text := record_text(record)) >= SHORTEST_TEXT]


def parse_questions(records: Sequence[Record]) -> list[Question]:
    """Return the questions that records describe.

    Raises:
        InputError: a field is missing or not as it should be; names place and field.
    """
    return [_parse_question(record) for record in records]


def _parse_question(record: Record) -> Question:
    where, fields = record
    question = record_text(record, "question")
    choices, answer = fields.get("choices"), fields.get("answer")
    if not _are_choices(choices):
        raise InputError(
            f'{where}: field "choices" must be a list of 2 to {len(LETTERS)} non-empty strings, got {short(choices)}.'
        )
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise InputError(
            f'{where}: field "answer" must be the number of a choice, 0 to {len(choices) - 1}, got {short(answer)}.'
        )
    return Question(question, tuple(choices), answer)


def _are_choices(value: Any) -> bool:
    is_list = isinstance(value, list) and 2 <= len(value) <= len(LETTERS)
    return is_list and all(isinstance(choice, str) and choice.strip() for choice in value)


def _read_part(source: str, part: str, split: str) -> list[Record]:
    path = Path(source)
    if path.is_dir():
        return read_file(path / part)
    if path.exists() or is_path(source):
        raise InputError(f"--data must be a folder or a data set of the hub, and {source} is not a folder here.")
    return read_hub_part(source, part, split)


def _check_layers(settings: Settings) -> None:
    if settings.is_small and not all(0 <= layer < SIZES[settings.model][2] for layer in settings.layers):
        raise InputError(
            f"`layers` must be of the model's {SIZES[settings.model][2]}, from 0, got {list(settings.layers)}."
        )
