"""Multiple choice against cases worked out by hand, and against a naive loop."""

from collections import Counter as Count

import pytest
import torch
import unlearning  # noqa: F401  (puts shared_lib on the path)
from shared_lib.encoding import Example, encode, encode_rows
from shared_lib.models import Tokenizer
from shared_lib.rows import Row
from transformers import LlamaForCausalLM
from unlearning.metrics.choices import (
    Question,
    accuracy,
    letter_choices,
    letter_prompt,
    make_questions_from_wrong_answers,
    text_choices,
)
from unlearning.metrics.likelihood import row_log_probs, token_log_probs
from unlearning_metrics_models import ROWS, make_llama, make_tokenizer, make_trained_llama

QUESTIONS = [
    Question("Where does Ada live?", ("In Rome.", "She lives in Oslo.", "In Bern."), 1),
    Question("Does she sing?", ("No.", "Loudly."), 0),
    Question("When was that?", ("In May.", "In summer.", "In winter.", "In a long and very cold winter."), 3),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def untrained(tokenizer: Tokenizer) -> LlamaForCausalLM:
    return make_llama(tokenizer)


def test_questions_hold_the_paraphrase_among_the_wrong_answers() -> None:
    for question, row in zip(make_questions_from_wrong_answers(ROWS, seed=3), ROWS, strict=True):
        assert question.question == row.question
        assert question.choices[question.answer] == row.paraphrased_answer
        others = [c for i, c in enumerate(question.choices) if i != question.answer]
        assert tuple(others) == row.perturbed_answers


def test_rows_without_a_paraphrase_or_without_wrong_answers() -> None:
    rows = [Row("q", "true", "", "", ("wrong",)), Row("q", "true", "", "other words")]
    (question,) = make_questions_from_wrong_answers(rows, seed=0)
    assert sorted(question.choices) == ["true", "wrong"]
    assert question.choices[question.answer] == "true"


def test_places_depend_on_the_seed_and_the_row_alone() -> None:
    rows = [Row(f"question {i}", "true", "", "", ("b", "c", "d")) for i in range(400)]
    questions = make_questions_from_wrong_answers(rows, seed=0)
    assert make_questions_from_wrong_answers(rows[::-1], seed=0) == questions[::-1]
    assert make_questions_from_wrong_answers(rows[7:9], seed=0) == questions[7:9]
    assert make_questions_from_wrong_answers(rows, seed=1) != questions
    # 400 draws of one in four: 100 each, with a standard deviation of 8.7.
    assert all(abs(n - 100) < 40 for n in Count(q.answer for q in questions).values())
    assert {q.answer for q in questions} == {0, 1, 2, 3}


def test_the_usual_prompt() -> None:
    assert letter_prompt(Question("Which?", ("this", "that"), 0), "birds") == (
        "The following are multiple choice questions (with answers) about birds.\n\nWhich?\nA. this\nB. that\nAnswer:"
    )
    assert letter_prompt(Question("Which?", ("this",), 0)).startswith(
        "The following are multiple choice questions (with answers).\n\nWhich?\nA. this\nAnswer:"
    )


def test_the_most_probable_letter_is_chosen(untrained: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    expected = []
    for question in QUESTIONS:
        prompt = tokenizer(letter_prompt(question, "Ada"))["input_ids"]
        letters = [tokenizer(f" {letter}")["input_ids"] for letter in "ABCD"[: len(question.choices)]]
        scores = [token_log_probs(untrained, [Example(prompt, ids)])[0].sum().item() for ids in letters]
        expected.append(max(range(len(scores)), key=scores.__getitem__))
    assert letter_choices(untrained, tokenizer, QUESTIONS, "Ada") == expected
    assert letter_choices(untrained, tokenizer, QUESTIONS[::-1], "Ada") == expected[::-1]


def test_letters_of_several_tokens_share_their_beginnings(tokenizer: Tokenizer) -> None:
    # What the test above is for: one letter is a token of its own, others are not.
    lengths = {letter: len(tokenizer(f" {letter}")["input_ids"]) for letter in "ABCD"}
    assert set(lengths.values()) == {1, 2}


def test_a_model_that_says_a_letter_chooses_it(tokenizer: Tokenizer) -> None:
    asked = [tokenizer(letter_prompt(q))["input_ids"] for q in QUESTIONS]
    right = [tokenizer(f" {'ABCD'[q.answer]}")["input_ids"] for q in QUESTIONS]
    model = make_trained_llama(tokenizer, [Example(p, a) for p, a in zip(asked, right, strict=True)])
    assert accuracy(letter_choices(model, tokenizer, QUESTIONS), QUESTIONS) == 1


def test_the_text_of_the_highest_probability_per_token_is_chosen(
    untrained: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    expected = [
        int(torch.cat([row_log_probs(untrained, [encode(tokenizer, q.question, c)]) for c in q.choices]).argmax())
        for q in QUESTIONS
    ]
    assert text_choices(untrained, tokenizer, QUESTIONS) == expected
    assert text_choices(untrained, tokenizer, QUESTIONS[::-1]) == expected[::-1]


def test_a_model_that_memorised_chooses_its_answers(tokenizer: Tokenizer) -> None:
    model = make_trained_llama(tokenizer, encode_rows(tokenizer, ROWS))
    assert accuracy(text_choices(model, tokenizer, QUESTIONS), QUESTIONS) == 1


def test_accuracy_by_hand() -> None:
    assert accuracy([1, 1, 3], QUESTIONS) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least one question"):
        accuracy([], [])


def test_no_question_has_no_choice(untrained: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    assert letter_choices(untrained, tokenizer, []) == []
    assert text_choices(untrained, tokenizer, []) == []
