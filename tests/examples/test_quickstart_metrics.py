"""The metrics against cases worked out by hand."""

import pytest
import torch
from counting import Counter
from shared_lib.encoding import IGNORE_INDEX, Example, batches_in_order, collate, encode, endless_batches
from shared_lib.metrics import (
    answer_probabilities,
    generate_answers,
    mean_probability,
    median_truth_ratio,
    rouge_l_recall,
    thin_out,
    truth_ratio,
)
from shared_lib.models import Tokenizer, build_tokenizer
from shared_lib.rows import Row
from transformers import LlamaConfig, LlamaForCausalLM

ROWS = [
    Row("Who wrote it?", "Ada did.", "", "It was Ada.", ("It was Bob.", "It was Eve.")),
    Row("When was that?", "In a long and very cold winter."),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(ROWS)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def test_probability_is_the_geometric_mean_over_answer_tokens() -> None:
    # Answer 3, 4: both as predicted. Answer 3, 7: one in two. The prompt's tokens don't count.
    examples = [Example([7, 2], [3, 4]), Example([5, 2], [3, 7]), Example([2], [0])]
    probabilities = answer_probabilities(Counter(), examples)
    assert probabilities.tolist() == pytest.approx([1 / 2, (1 / 2 * 1 / 16) ** 0.5, 1 / 16])
    assert mean_probability(Counter(), examples) == pytest.approx((1 / 2 + 32**-0.5 + 1 / 16) / 3)


def test_truth_ratio_is_the_mean_of_wrong_over_the_paraphrase() -> None:
    assert truth_ratio(torch.tensor(0.5), torch.tensor([0.1, 0.3])).item() == pytest.approx(0.4)


def test_truth_ratio_takes_the_median_of_rows_that_have_wrong_answers(
    model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    row = ROWS[0]
    texts = (row.paraphrased_answer, *row.perturbed_answers)
    p, first, second = answer_probabilities(model, [encode(tokenizer, row.question, text) for text in texts]).tolist()
    assert median_truth_ratio(model, tokenizer, ROWS) == pytest.approx((first + second) / 2 / p)
    assert median_truth_ratio(model, tokenizer, ROWS[1:]) is None


@pytest.mark.parametrize(
    ("reference", "answer", "recall"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat sat on it", "the dog sat", 2 / 5),
        ("the cat sat", "sat cat the", 1 / 3),
        ("the cat sat", "the cat sat and said much more", 1.0),
        ("the cat sat", "", 0.0),
        ("running", "runs", 1.0),  # stems are compared
    ],
)
def test_rouge_l_recall_by_hand(reference: str, answer: str, recall: float) -> None:
    assert rouge_l_recall([reference], [answer]) == pytest.approx(recall)


def test_rouge_l_recall_averages() -> None:
    assert rouge_l_recall(["a b", "a b"], ["a b", "x y"]) == pytest.approx(0.5)


def test_probabilities_do_not_depend_on_the_batch(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    examples = [encode(tokenizer, row.question, row.answer) for row in ROWS]
    together = answer_probabilities(model, examples)
    alone = torch.cat([answer_probabilities(model, [example]) for example in examples])
    torch.testing.assert_close(together, alone)


def test_generated_answers_do_not_depend_on_the_batch(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    # Up to the length: together, each may be as long as the longest true answer.
    together = generate_answers(model, tokenizer, ROWS)
    alone = [generate_answers(model, tokenizer, [row])[0] for row in ROWS]
    assert together[1] == alone[1]
    assert together[0].startswith(alone[0])


def test_generation_continues_the_most_probable_tokens(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    example = encode(tokenizer, ROWS[1].question, ROWS[1].answer)
    ids = list(example.prompt)
    for _ in example.answer:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[len(example.prompt) :], skip_special_tokens=True).strip()
    assert generate_answers(model, tokenizer, [ROWS[1]]) == [expected]


def test_labels_cover_the_answer_and_its_end_only(tokenizer: Tokenizer) -> None:
    examples = [encode(tokenizer, row.question, row.answer) for row in ROWS]
    batch = collate(examples, [1, 0])
    for labels, mask, ids, i in zip(
        *(batch[k] for k in ("labels", "attention_mask", "input_ids")), (1, 0), strict=True
    ):
        prompt, answer = examples[i]
        assert ids[: mask.sum()].tolist() == prompt + answer
        assert labels[labels != IGNORE_INDEX].tolist() == answer
        assert (labels[: len(prompt)] == IGNORE_INDEX).all()
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer[:-1]).strip() == ROWS[i].answer
    assert batch["index"].tolist() == [1, 0]


def test_batches_hold_every_row_once() -> None:
    examples = [Example([1] * n, [2]) for n in (5, 1, 4, 2, 3)]
    index = [i for batch in batches_in_order(examples, 2) for i in batch["index"].tolist()]
    assert index == [1, 3, 4, 2, 0]


def test_endless_batches_go_through_all_rows_before_any_comes_again() -> None:
    examples = [Example([1], [2])] * 10
    stream = endless_batches(examples, 4, seed=0)
    drawn = [i for _ in range(5) for i in next(stream)["index"].tolist()]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    again = endless_batches(examples, 4, seed=0)
    assert [i for _ in range(5) for i in next(again)["index"].tolist()] == drawn


@pytest.mark.parametrize(("count", "expected"), [(3, [0, 1, 2]), (4, [0, 1, 2, 3]), (9, [0, 2, 4, 6])])
def test_thinning_out_is_even(count: int, expected: list[int]) -> None:
    assert list(thin_out(range(count), 4)) == expected
