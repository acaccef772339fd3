"""Memorisation, generation and ROUGE-L against cases worked out by hand."""

import pytest
import torch
import unlearning  # noqa: F401  (puts shared_lib on the path)
from shared_lib.encoding import Example, encode, encode_rows
from shared_lib.models import Tokenizer
from transformers import LlamaForCausalLM
from unlearning.metrics.generation import MIN_ROOM, answer_questions, continue_texts
from unlearning.metrics.likelihood import TokenScores, token_scores
from unlearning.metrics.memorization import (
    exact_memorization,
    extraction_strength,
    knowledge_memorization,
    verbatim_memorization,
    without_end,
)
from unlearning.metrics.rouge import rouge_l
from unlearning_metrics_models import ROWS, make_llama, make_tokenizer, make_trained_llama

PASSAGES = [
    Example([], [10, 11, 12, 13, 14, 15, 16, 17]),
    Example([], [20, 30, 40, 50, 60, 70]),
    Example([5], [6, 7, 8]),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def untrained(tokenizer: Tokenizer) -> LlamaForCausalLM:
    return make_llama(tokenizer)


@pytest.fixture(scope="module")
def trained(tokenizer: Tokenizer) -> LlamaForCausalLM:
    return make_trained_llama(tokenizer, [*encode_rows(tokenizer, ROWS), *PASSAGES[:2]])


def greedy(model: LlamaForCausalLM, prompt: list[int], room: int) -> list[int]:
    """Return the most probable continuation, token by token."""
    ids = list(prompt)
    for _ in range(room):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 1:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("correct", "exact", "strength"),
    [
        ([1, 1, 1, 1], 1, 1),
        ([0, 0, 0, 0], 0, 0),
        ([0, 1, 1, 1], 3 / 4, 3 / 4),  # one token has to be given
        ([1, 1, 1, 0], 3 / 4, 0),  # the last is never said
        ([1, 0, 1, 1], 3 / 4, 2 / 4),
        ([1], 1, 1),
        ([0], 0, 0),
    ],
)
def test_exact_memorization_and_extraction_strength_by_hand(correct: list[int], exact: float, strength: float) -> None:
    assert exact_memorization(torch.tensor(correct).bool()) == exact
    assert extraction_strength(torch.tensor(correct).bool()) == strength


@pytest.mark.parametrize("metric", [exact_memorization, extraction_strength])
def test_no_token_has_no_memorization(metric) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        metric(torch.tensor([]).bool())


def test_extraction_strength_is_that_of_generation(trained: LlamaForCausalLM) -> None:
    # The definition itself: the shortest beginning after which greedy decoding says the rest.
    examples = [*PASSAGES, Example([], [10, 11, 99, 13, 14, 15, 16, 17]), Example([], [20, 30, 40, 50, 60, 61])]
    for example, scores in zip(examples, token_scores(trained, examples), strict=True):
        text = example.prompt + example.answer
        first = max(len(example.prompt), 1)  # a passage's first token is always given
        n = len(text) - first
        needed = next(k for k in range(n + 1) if greedy(trained, text[: first + k], n - k) == text[first + k :])
        assert extraction_strength(scores.correct) == pytest.approx(1 - needed / n)


@pytest.mark.parametrize(("answer", "left"), [([7, 8, 1], 2), ([7, 8, 9], 3), ([1], 1)])
def test_the_end_of_the_text_is_left_out(answer: list[int], left: int) -> None:
    scores = TokenScores(torch.arange(len(answer)), torch.ones(len(answer)).bool())
    cut = without_end(scores, Example([5], answer), end=1)
    assert cut.log_probs.tolist() == list(range(left))
    assert len(cut.correct) == left
    assert cut.mean is None


@pytest.mark.parametrize(
    ("reference", "text", "recall", "f1"),
    [
        ("the cat sat", "the cat sat", 1, 1),
        ("the cat sat on it", "the dog sat", 2 / 5, 2 * (2 / 5) * (2 / 3) / (2 / 5 + 2 / 3)),
        ("the cat sat", "sat cat the", 1 / 3, 1 / 3),
        ("the cat sat", "the cat sat and more", 1, 2 * 1 * (3 / 5) / (1 + 3 / 5)),
        ("the cat sat", "", 0, 0),
        ("", "the cat", 0, 0),
    ],
)
def test_rouge_l_by_hand(reference: str, text: str, recall: float, f1: float) -> None:
    assert rouge_l([reference], [text], "recall", stem=True) == pytest.approx([recall])
    assert rouge_l([reference], [text], "f1", stem=False) == pytest.approx([f1])


def test_stems_are_compared_where_asked_for() -> None:
    assert rouge_l(["running"], ["runs"], "recall", stem=True) == [1]
    assert rouge_l(["running"], ["runs"], "recall", stem=False) == [0]


def test_continuations_are_the_most_probable_tokens(untrained: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    prompts, rooms = [[5, 6, 7], [8], [20, 21, 22, 23, 24], [9, 9]], [4, 7, 1, 4]
    expected = [tokenizer.decode(greedy(untrained, p, n)).strip() for p, n in zip(prompts, rooms, strict=True)]
    for batch_size in (1, 2, 64):
        assert continue_texts(untrained, tokenizer, prompts, rooms, batch_size=batch_size) == expected


def test_no_prompt_has_no_continuation(untrained: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    assert continue_texts(untrained, tokenizer, [], []) == []


def test_answers_end_where_the_text_ends_and_have_room(
    trained: LlamaForCausalLM, untrained: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    untrained.train()
    seen = []
    assert answer_questions(trained, tokenizer, ROWS, progress=lambda *n: seen.append(n)) == [r.answer for r in ROWS]
    assert seen == [(4, 4)]
    row = ROWS[3]
    expected = greedy(untrained.eval(), encode(tokenizer, row.question, row.answer).prompt, MIN_ROOM)
    untrained.train()
    assert answer_questions(untrained, tokenizer, [row]) == [tokenizer.decode(expected).strip()]
    assert untrained.training
    untrained.eval()


def test_a_model_that_memorised_scores_one(trained: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    assert verbatim_memorization(trained, tokenizer, PASSAGES[:2], 2) == [1, 1]
    assert knowledge_memorization(trained, tokenizer, ROWS) == [1] * 4
    for scores in token_scores(trained, encode_rows(tokenizer, ROWS)):
        assert exact_memorization(scores.correct) == extraction_strength(scores.correct) == 1


def test_verbatim_memorization_compares_the_rest_of_the_passage(
    untrained: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    for room in (2, 128):
        got = verbatim_memorization(untrained, tokenizer, PASSAGES, 2, room=room)
        for score, (prompt, answer) in zip(got, PASSAGES, strict=True):
            text = prompt + answer
            rest = text[2 : 2 + room]
            said = tokenizer.decode(greedy(untrained, text[:2], len(rest)), skip_special_tokens=True).strip()
            assert score == rouge_l([tokenizer.decode(rest).strip()], [said], "f1", stem=False)[0]


def test_a_passage_must_go_on_after_its_prefix(untrained: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"`passages\[2\]` must have more tokens than the prefix of 4, got 4"):
        verbatim_memorization(untrained, tokenizer, PASSAGES, 4)
