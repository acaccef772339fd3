"""MUSE (arXiv:2407.06460): forget a book or news, word for word and in substance, and keep another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from shared_lib.encoding import PROMPT, Example, encode_rows
from shared_lib.errors import InputError
from shared_lib.metrics import thin_out
from shared_lib.models import Model, Tokenizer, texts_of
from shared_lib.records import parse_row
from shared_lib.rows import Row

from ..settings import Settings
from .passages import beginning, cut, has_split, last, read_split, record_text, refuse_dpo
from .task import Judgement, Task

ROOM = 128  # tokens of a continuation that are compared, as in MUSE's code
WATCHED, WATCHED_ROOM = 10, 48  # rows of a kind, and tokens of a continuation, at every look


@dataclass(frozen=True)
class Opening:
    """How a text begins, and how it goes on: a row of the part verbmem."""

    prompt: str
    rest: str


class MuseData:
    """All that a setting needs, before there is a tokenizer.

    The layout is that of the hub's ``muse-bench/MUSE-News`` and ``MUSE-Books``, a folder a configuration and a file a
    split (``.json``, ``.jsonl`` or ``.txt``, see ``passages.read_split``):

    ====================================================  ================  ==========================================
    file                                                  fields            used as
    ====================================================  ================  ==========================================
    raw/forget, raw/retain1, raw/retain2, raw/holdout     text              forget loss, retain loss, untouched, unseen
    verbmem/forget                                        prompt, gt        VerbMem
    knowmem/forget_qa, retain_qa                          question, answer  KnowMem; on retain_qa, utility
    knowmem/forget_qa_icl, retain_qa_icl (optional)       question, answer  solved questions shown to pretrained models
    privleak/forget, retain, holdout (optional: raw)      text              membership inference
    ====================================================  ================  ==========================================

    A model that is trained on the spot learns the questions about both books beside the books themselves: it has not
    read enough to answer questions otherwise, and KnowMem would be nil before anything is forgotten. The retrained
    model learns neither the book to forget nor its questions. Unlearning sees passages alone, as in MUSE.

    Args:
        settings: ``data`` is a folder or a name of the hub; ``passages`` at most so many of each kind, the last ones
            (the questions stay as they are); ``prefix`` the tokens of a retain passage that are shown for VerbMem.
    Raises:
        InputError: a part is missing or a row is not as it should be.
    """

    def __init__(self, settings: Settings) -> None:
        refuse_dpo(settings.methods, "muse")
        if settings.prefix + 1 >= settings.max_length:
            raise InputError(
                f"`prefix` must leave tokens of a passage to be said, got {settings.prefix} of {settings.max_length}."
            )
        self.source, self.learns = settings.data, settings.learning is not None
        self.forget, self.retain = self._texts("raw", "forget"), self._texts("raw", "retain1")
        self.untouched, self.holdout = self._texts("raw", "retain2"), self._texts("raw", "holdout")
        self.judged = {
            name: self._texts("privleak", name) if has_split(self.source, "privleak", name) else texts
            for name, texts in (("forget", self.forget), ("retain", self.untouched), ("holdout", self.holdout))
        }
        self.openings = [
            Opening(record_text(record, "prompt"), record_text(record, "gt"))
            for record in read_split(self.source, "verbmem", "forget")
        ]
        self.forget_questions = self._questions("forget_qa")
        self.retain_questions = self._questions("retain_qa")

    def _texts(self, part: str, split: str) -> list[str]:
        return [record_text(record) for record in read_split(self.source, part, split)]

    def _questions(self, split: str) -> list[Row]:
        rows = [parse_row(record) for record in read_split(self.source, "knowmem", split)]
        solved = f"{split}_icl"
        if self.learns or not has_split(self.source, "knowmem", solved):
            return rows
        return show_solved(rows, [parse_row(record) for record in read_split(self.source, "knowmem", solved)])

    def texts(self) -> Iterator[str]:
        """Yield what a tokenizer is trained on."""
        yield from (*self.forget, *self.retain, *self.untouched)
        yield from texts_of([*self.forget_questions, *self.retain_questions])

    def task(self, tokenizer: Tokenizer, settings: Settings) -> Task:
        """Return the task for models with this tokenizer."""
        passages = {
            name: last(cut(tokenizer, getattr(self, name), settings.max_length), settings.passages)
            for name in ("forget", "retain", "untouched")
        }
        kept = passages["retain"] + passages["untouched"]
        forgotten = list(passages["forget"])
        if self.learns:
            kept += encode_rows(tokenizer, self.retain_questions)
            forgotten += encode_rows(tokenizer, self.forget_questions)
        return Task(
            tokenizer=tokenizer,
            known=kept + forgotten,
            kept=kept,
            refusals=[],
            judge=partial(self._judge, tokenizer, settings),
            watch=partial(self._watch, tokenizer),
            **passages,
        )

    def _judge(self, tokenizer: Tokenizer, settings: Settings, model: Model, retrained: Any = None) -> Judgement:
        # Here: who only trains need not wait for these.
        from ..metrics.suites import MuseEvaluation, muse_scores

        passages = {name: cut(tokenizer, texts, settings.max_length) for name, texts in self.judged.items()}
        passages = {name: last(some, settings.passages) for name, some in passages.items()}
        texts = {name: thin_out(some, settings.judged_rows) for name, some in passages.items()}
        # No generation here: VerbMem is taken on rows of its own below.
        scores, aucs = muse_scores(
            model, tokenizer, MuseEvaluation(**texts), retrained, prefix=settings.prefix, limit_generated=0
        )
        asked = MuseEvaluation(forget_questions=self.forget_questions, retain_questions=self.retain_questions)
        limit = settings.generated_rows
        if limit:
            scores |= muse_scores(model, tokenizer, asked, prefix=settings.prefix, limit_generated=limit).scores
            long = [text for text in passages["retain"] if len(text.prompt + text.answer) > settings.prefix]
            begun = {
                "forget": self._begun(tokenizer),
                "retain": [split_at(text, settings.prefix) for text in long],
            }
            for name, some in begun.items():
                if some:
                    said = say_rest(model, tokenizer, thin_out(some, limit), ROOM)
                    scores[f"{name}_verbmem"] = sum(said) / len(said)
        return scores, aucs

    def _begun(self, tokenizer: Tokenizer) -> list[Example]:
        return [begin(tokenizer, opening) for opening in self.openings]

    def _watch(self, tokenizer: Tokenizer, model: Model) -> dict[str, float]:
        from ..metrics.memorization import knowledge_memorization

        said = say_rest(model, tokenizer, thin_out(self._begun(tokenizer), WATCHED), WATCHED_ROOM)
        known = knowledge_memorization(model, tokenizer, thin_out(self.forget_questions, WATCHED))
        return {"verbmem": sum(said) / len(said), "knowmem": sum(known) / len(known)}


def begin(tokenizer: Tokenizer, opening: Opening) -> Example:
    """Encode an opening: as one text where its first tokens are the prompt's, so that a word at the seam is whole.

    Where they are not, prompt and rest are encoded apart.
    """
    prompt = tokenizer(opening.prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(opening.prompt + opening.rest, add_special_tokens=False)["input_ids"]
    fits = whole[: len(prompt)] == prompt and len(whole) > len(prompt)
    rest = whole[len(prompt) :] if fits else tokenizer(opening.rest, add_special_tokens=False)["input_ids"]
    return Example(beginning(tokenizer) + prompt, rest)


def split_at(passage: Example, prefix: int) -> Example:
    """Make the passage's first tokens the prompt."""
    ids = passage.prompt + passage.answer
    return Example(ids[:prefix], ids[prefix:])


def say_rest(model: Model, tokenizer: Tokenizer, begun: Sequence[Example], room: int) -> list[float]:
    r"""Compare what the model says after each prompt with its answer (MUSE's VerbMem).

    .. math:: \mathrm{ROUGE}_{F_1}\big(f(x_{[:l]}), x_{[l+1:]}\big)      (arXiv:2407.06460, section 3)

    Unlike ``metrics.memorization.verbatim_memorization`` it takes prompts of different lengths.

    Returns:
        For each in [0, 1]; higher = more memorised.
    """
    from ..metrics.generation import continue_texts
    from ..metrics.rouge import rouge_l

    rests = [example.answer[:room] for example in begun]
    prompts = [example.prompt for example in begun]
    said = continue_texts(model, tokenizer, prompts, [len(rest) for rest in rests])
    true = [tokenizer.decode(rest, skip_special_tokens=True).strip() for rest in rests]
    return rouge_l(true, said, "f1", stem=False)


def show_solved(rows: Sequence[Row], solved: Sequence[Row]) -> list[Row]:
    """Put solved questions before each question, for models that have not learned to answer in this form."""
    shown = "\n\n".join(f"{PROMPT.format(question=row.question)} {row.answer}" for row in solved)
    if not shown:
        return list(rows)
    opening = PROMPT.partition("{question}")[0]
    return [row._replace(question=f"{shown.removeprefix(opening)}\n\n{opening}{row.question}") for row in rows]
