"""Rows to token ids: what is the prompt, what the answer, and what does not fit."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from datetime import date

from shared_lib import encoding
from shared_lib.encoding import Batch, Example
from shared_lib.errors import InputError
from shared_lib.models import check_vocabulary
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from blur_optim.losses import IDK_ANSWERS

from .rows import INSTEAD, TextRow

#: What transformers gives to templates for the date. It takes no other function of that name from outside.
_TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")


class Encoder:
    """Tokenize rows, and count those that were cut.

    Args:
        max_length: of prompt and answer together, in tokens.
        plain_questions: do without the chat template where a row is a question.
        config: of the model that is to know the tokens.
        day: what a chat template that prints the date takes for today.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        plain_questions: bool = False,
        config: PretrainedConfig | None = None,
        day: date | None = None,
    ) -> None:
        self.tokenizer, self.max_length, self.config = tokenizer, max_length, config
        self.has_template = bool(tokenizer.chat_template)
        self._template = (
            {"chat_template": on_day(tokenizer.get_chat_template(), day)} if self.has_template and day else {}
        )
        self.asks_plainly = plain_questions or not self.has_template
        self.cut = 0

    def __call__(self, row: TextRow, answer: str | None = None) -> Example:
        """Encode a row, or the same row with another answer. Nothing is predicted but the answer.

        Raises:
            InputError: the row needs a chat template that there is not, no token of the answer fits, or the model does
                not know a token.
        """
        prompt, ids = self._encode(row, row.answer if answer is None else answer)
        if self.config is not None:
            check_vocabulary(row.where, [*prompt, *ids], self.tokenizer, self.config)
        whole, room = len(prompt) + len(ids), self.max_length - len(prompt)
        first = 0 if prompt else 1  # Nothing predicts the first token of a text.
        if min(room, len(ids)) <= first:
            raise InputError(
                f"{row.where}: a token to predict must lie within --max-length, {self.max_length} tokens, got "
                f"{len(prompt)} tokens of prompt and {len(ids)} of answer. Give a larger --max-length, or a shorter "
                "prompt."
            )
        self.cut += whole > self.max_length
        return Example(prompt, ids[:room])

    def pair(self, row: TextRow, position: int) -> dict[str, Example]:
        """Encode what DPO compares: what to say instead, and what to forget.

        Raises:
            InputError: the row doesn't say what to say instead, and an I-don't-know would not fit it.
        """
        if row.kind == "text":
            raise InputError(
                f'{row.where}: --method dpo needs a prompt, to which there is another answer, got a "text". Use '
                "another method, or rows of another kind."
            )
        if row.kind == "prompt" and row.instead is None:
            raise InputError(
                f'{row.where}: with --method dpo, a row of prompt and completion must have the field "{INSTEAD}", '
                "what to say instead of the completion; got none."
            )
        instead = row.instead or IDK_ANSWERS[position % len(IDK_ANSWERS)]
        return {"chosen": self(row, instead), "rejected": self(row)}

    def _encode(self, row: TextRow, answer: str) -> Example:
        if row.kind == "text":
            return self._text(answer)
        if row.kind == "prompt":
            return self._completion(row.prompt, answer)
        if row.kind == "messages":
            return self._chat(row.turns, answer, row.where)
        if self.asks_plainly:
            return encoding.encode(self.tokenizer, row.prompt.strip(), answer.strip())
        return self._chat(({"role": "user", "content": row.prompt},), answer, row.where)

    def _text(self, text: str) -> Example:
        ids = _ended(self.tokenizer(text)["input_ids"], self.tokenizer)
        begins = ids[0] == self.tokenizer.bos_token_id
        return Example(ids[:begins], ids[begins:])

    def _completion(self, prompt: str, completion: str) -> Example:
        before = self.tokenizer(prompt)["input_ids"]
        if before[-1] == self.tokenizer.eos_token_id and len(before) > 1:
            before = before[:-1]  # Some tokenizers end every text.
        after = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
        return Example(before, _ended(after, self.tokenizer))

    def _chat(self, turns: Sequence[dict[str, str]], answer: str, where: str) -> Example:
        if not self.has_template:
            raise InputError(
                f'{where}: "messages" need a tokenizer with a chat template, and that of --model has none. Write the '
                "rows as prompt and completion, or take the model's chat version."
            )
        turns = list(turns)
        before = self._render(turns, where, add_generation_prompt=True)
        whole = self._render([*turns, {"role": "assistant", "content": answer}], where)
        if not whole.startswith(before):
            raise InputError(
                f"{where}: the chat template of --model must begin an answered chat as it begins the same chat "
                "before the answer, and does not. Write the rows as prompt and completion."
            )
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, whole[len(before) :])]
        return Example(ids[0], _until_end(ids[1], self.tokenizer.eos_token_id))

    def _render(self, turns: list[dict[str, str]], where: str, **more: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, **more, **self._template)
        except Exception as error:  # A template raises what it likes, such as for a role that it does not know.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{where}: the chat template of --model refuses the messages: {reason}") from error


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _until_end(ids: list[int], end: int) -> list[int]:
    """Leave out what a template puts after the end of a turn, which no model is asked for."""
    return ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids


def on_day(template: str, day: date) -> str:
    """Return a chat template that prints the given day where it would print today."""
    return _TODAY.sub(lambda found: repr(day.strftime(found["format"])), template)


def fingerprint(examples: Iterable[Example]) -> str:
    """Return the sha256 of prompts and answers as the model reads them."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.prompt} {example.answer}\n".encode())
    return digest.hexdigest()


def collate(examples: Sequence[Example]) -> Batch:
    """Pad on the right."""
    batch = encoding.collate(examples, range(len(examples)))
    del batch["index"]
    return batch
