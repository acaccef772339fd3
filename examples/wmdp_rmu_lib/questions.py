"""Multiple choice as in WMDP and MMLU: which choice does the model find likeliest?"""

from collections.abc import Sequence
from itertools import chain
from string import ascii_uppercase
from typing import Any, NamedTuple

import torch
from shared_lib.encoding import IGNORE_INDEX
from shared_lib.errors import InputError
from shared_lib.models import Model, Tokenizer, check_vocabulary, logits_of
from shared_lib.records import short

from blur_optim.losses import sequence_log_probs

from .corpora import collate, read_records, text_field

HEAD = "The following are multiple choice questions (with answers){topic}.\n\n"


class Question(NamedTuple):
    """A question; ``answer`` is the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int


class Candidate(NamedTuple):
    """One way to go on after a prompt: ``ids[start:]``; its log-probability is divided by ``weight``."""

    ids: list[int]
    start: int
    weight: int


def read_questions(option: str, source: str) -> list[Question]:
    """Read all questions of a file, or of a data set of the hub.

    Raises:
        InputError: there is none, or a row is not as it should be; names line and field.
    """
    questions = [_parse(where, row) for where, row in read_records(option, source, split="test")]
    if not questions:
        raise InputError(f"{option}: {source} must hold at least one question, got none.")
    return questions


def _parse(where: str, row: Any) -> Question:
    question = text_field(row, "question", where).strip()
    if not question:
        raise InputError(f'{where}: field "question" must not be empty.')
    choices, answer = row.get("choices"), row.get("answer")
    is_list = isinstance(choices, list) and all(isinstance(choice, str) and choice.strip() for choice in choices)
    if not is_list or not 2 <= len(choices) <= len(ascii_uppercase):
        raise InputError(f'{where}: field "choices" must be a list of 2 to 26 non-empty strings, got {short(choices)}.')
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise InputError(
            f'{where}: field "answer" must be the index of a choice, 0 to {len(choices) - 1}, got {short(answer)}.'
        )
    return Question(question, tuple(choice.strip() for choice in choices), answer)


def letter_prompt(question: Question, topic: str | None) -> str:
    """Return question and lettered choices, up to the colon after which the letter is expected."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, question.choices, strict=False)]
    head = HEAD.format(topic=f" about {topic}" if topic else "")
    return head + "\n".join([question.question, *lines, "Answer:"])


def candidates(tokenizer: Tokenizer, question: Question, scoring: str, topic: str | None) -> list[Candidate]:
    """Encode what is compared: the letters, or the choices themselves."""
    if scoring == "letter":
        prompt = letter_prompt(question, topic)
        texts = list(ascii_uppercase[: len(question.choices)])
    else:
        prompt, texts = f"Question: {question.question}\nAnswer:", list(question.choices)
    start = tokenizer(prompt)["input_ids"]
    if start[-1] == tokenizer.eos_token_id and len(start) > 1:
        start = start[:-1]  # Some tokenizers end every text.
    ends = [tokenizer(" " + text, add_special_tokens=False)["input_ids"] for text in texts]
    return [Candidate(start + end, len(start), len(text)) for end, text in zip(ends, texts, strict=True)]


@torch.inference_mode()
def accuracy(
    model: Model, tokenizer: Tokenizer, questions: Sequence[Question], scoring: str, topic: str | None, batch_size: int
) -> float:
    """Return the share of questions whose right choice is the likeliest one."""
    groups = [candidates(tokenizer, question, scoring, topic) for question in questions]
    scores = iter(_scores(model, [candidate for group in groups for candidate in group], batch_size))
    right = 0
    for question, group in zip(questions, groups, strict=True):
        own = [next(scores) for _ in group]
        right += own.index(max(own)) == question.answer
    return right / len(questions)


def _scores(model: Model, all_: Sequence[Candidate], batch_size: int) -> list[float]:
    """Return each candidate's weighted log-probability; batches are of similar length, which wastes little."""
    order = sorted(range(len(all_)), key=lambda i: len(all_[i].ids))
    result = [0.0] * len(all_)
    for i in range(0, len(order), batch_size):
        chosen = order[i : i + batch_size]
        batch = collate([all_[j].ids for j in chosen], model.device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
        for row, j in enumerate(chosen):
            labels[row, : all_[j].start] = IGNORE_INDEX
        log_probs = sequence_log_probs(logits_of(model, batch), labels).tolist()
        for j, log_prob in zip(chosen, log_probs, strict=True):
            result[j] = log_prob / all_[j].weight
    return result


def check_fit(
    model: Model,
    tokenizer: Tokenizer,
    source: str,
    questions: Sequence[Question],
    scoring: str,
    topic: str | None = None,
) -> None:
    """See that every question fits into the model, and that it knows each token.

    Raises:
        InputError: one doesn't; says which.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or 10**9
    for number, question in enumerate(questions, start=1):
        choices = candidates(tokenizer, question, scoring, topic)
        where = f"--questions: {source}, question {number}"
        check_vocabulary(where, chain.from_iterable(choice.ids for choice in choices), tokenizer, model.config)
        longest = max(len(choice.ids) for choice in choices)
        if longest > limit:
            raise InputError(f"{where} has {longest} tokens with its choices, the model reads {limit} at most.")
