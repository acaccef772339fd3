"""What the suites ask a model, part by part; each part's result is plain data that a JSON file can hold."""

from collections.abc import Callable, Sequence
from pathlib import Path

from shared_lib.encoding import Example, encode, encode_rows
from shared_lib.models import Model, Tokenizer
from shared_lib.rows import Row

from .generation import answer_questions
from .likelihood import Progress, TokenScores, row_log_probs, token_scores
from .memorization import exact_memorization, extraction_strength, verbatim_memorization, without_end
from .parts import Parts, fingerprint
from .privacy import ATTACKS, membership_scores
from .tofu import AnswerLogProbs, ChoiceRow

SuiteProgress = Callable[[str, int, int], None]  # part, rows done, rows in all
PerRow = dict[str, list[float]]


class Measure:
    """Ask one model.

    Args:
        parts: a file for finished parts, or None.
        settings: all that the parts' results depend on beside the model, such as the data.
        progress: called with the part's name as it goes on.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        parts: Path | None,
        settings: object,
        progress: SuiteProgress | None,
    ) -> None:
        self.model, self.tokenizer, self._progress = model, tokenizer, progress
        self._parts = Parts(parts, fingerprint(model, settings)) if parts else Parts()

    def texts(self, name: str, examples: Sequence[Example], texts: Sequence[str], *, membership: bool) -> PerRow:
        """Score texts that may be memorised: log_prob, exact_memorization, extraction_strength and the attacks' scores.

        ``texts`` are the examples' answers in words. Without ``membership`` the attacks are left out.
        """

        def compute() -> PerRow:
            scores = token_scores(self.model, examples, vocabulary=membership, progress=self._bar(part))
            return self._per_row(scores, examples, texts, membership)

        part = f"{name}/texts"
        return self._parts.get(part, compute)

    def rows(self, name: str, rows: Sequence[Row], *, membership: bool) -> PerRow:
        """Score the answers of rows, as :meth:`texts`."""
        return self.texts(name, encode_rows(self.tokenizer, rows), [row.answer for row in rows], membership=membership)

    def _per_row(
        self, scores: list[TokenScores], examples: Sequence[Example], texts: Sequence[str], membership: bool
    ) -> PerRow:
        result: PerRow = {"log_prob": [s.log_probs.double().mean().item() for s in scores]}
        end = self.tokenizer.eos_token_id
        scores = [without_end(s, example, end) for s, example in zip(scores, examples, strict=True)]
        result["exact_memorization"] = [exact_memorization(s.correct) for s in scores]
        result["extraction_strength"] = [extraction_strength(s.correct) for s in scores]
        if membership:
            attacks = [membership_scores(s, text) for s, text in zip(scores, texts, strict=True)]
            result |= {attack: [row[attack] for row in attacks] for attack in ATTACKS}
        return result

    def answers(self, name: str, rows: Sequence[ChoiceRow]) -> list[AnswerLogProbs]:
        """Compare the true answer with the wrong ones, for each row."""

        def compute() -> list[list[float]]:
            examples = [encode(self.tokenizer, r.question, a) for r in rows for a in (r.answer, *r.wrong_answers)]
            log_probs = row_log_probs(self.model, examples, progress=self._bar(part))
            return [piece.tolist() for piece in log_probs.split([1 + len(r.wrong_answers) for r in rows])]

        part = f"{name}/answers"
        return [AnswerLogProbs(true, wrong) for true, *wrong in self._parts.get(part, compute)]

    def said(self, name: str, rows: Sequence[Row]) -> list[str]:
        """Let the model answer the rows' questions."""
        part = f"{name}/said"
        return self._parts.get(
            part, lambda: answer_questions(self.model, self.tokenizer, rows, progress=self._bar(part))
        )

    def verbatim(self, name: str, passages: Sequence[Example], prefix: int, room: int) -> list[float]:
        """Return the VerbMem of each passage."""
        part = f"{name}/verbatim"
        return self._parts.get(
            part,
            lambda: verbatim_memorization(
                self.model, self.tokenizer, passages, prefix, room=room, progress=self._bar(part)
            ),
        )

    def chosen(
        self,
        name: str,
        choose: Callable[..., list[int]],
        *arguments: object,
    ) -> list[int]:
        """Let the model choose: ``choose(model, tokenizer, *arguments, progress=...)``."""
        return self._parts.get(name, lambda: choose(self.model, self.tokenizer, *arguments, progress=self._bar(name)))

    def _bar(self, part: str) -> Progress | None:
        progress = self._progress
        return (lambda done, total: progress(part, done, total)) if progress else None
