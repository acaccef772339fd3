"""Fluency against cases worked out by hand."""

import math

import pytest
import unlearning  # noqa: F401  (puts shared_lib on the path)
from counting import Counter
from shared_lib.encoding import Example
from unlearning.metrics.fluency import ngram_entropy, perplexity, repetition_rate
from unlearning.metrics.likelihood import token_log_probs
from unlearning_metrics_models import make_llama, make_tokenizer


def test_entropy_by_hand() -> None:
    # a b c d e: 4 bigrams, 3 trigrams, all different.
    assert ngram_entropy("a b c d e") == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    # a b a b a: bigrams ab, ba twice each: 1 bit; trigrams aba twice, bab once.
    trigrams = 2 / 3 * math.log2(3 / 2) + 1 / 3 * math.log2(3)
    assert ngram_entropy("a b a b a") == pytest.approx((2 / 3 * 1 + 4 / 3 * trigrams) / 2)


def test_punctuation_counts_as_words() -> None:
    assert ngram_entropy("a,b c.") == ngram_entropy("a x b c y") > 0


@pytest.mark.parametrize("text", ["", "one", "one two", "la la la la la la"])
def test_nothing_and_the_same_word_have_no_entropy(text: str) -> None:
    assert ngram_entropy(text) == 0


def test_repetition_by_hand() -> None:
    # a b c a b c a b: 5 four-grams, abca, bcab, cabc, abca, bcab: 3 of them different.
    assert repetition_rate("a b c a b c a b") == pytest.approx(2 / 5)
    assert repetition_rate("a b a b a", n=2) == pytest.approx(2 / 4)
    assert repetition_rate("a b c d e f") == 0
    assert repetition_rate("la " * 13) == pytest.approx(9 / 10)
    assert repetition_rate("") == repetition_rate("a b c") == 0


def test_perplexity_by_hand() -> None:
    class Letters:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": ["abcdefghi".index(letter) for letter in text]}

    # After the first letters: 1/2 each for b, c, d after a, b, c; 1/16 for f after c; the lone letter has none.
    expected = math.exp(-(3 * math.log(1 / 2) + math.log(1 / 16)) / 4)
    assert perplexity(Counter(), Letters(), ["abcd", "cf", "a", ""]) == pytest.approx(expected)
    assert perplexity(Counter(), Letters(), ["a", ""]) is None


def test_perplexity_of_a_model() -> None:
    tokenizer = make_tokenizer()
    model = make_llama(tokenizer)
    texts = ["It was Ada who wrote it.", "In May."]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    rows = [token_log_probs(model, [Example([], row)])[0] for row in ids]
    nll = -sum(row.sum().item() for row in rows) / sum(len(row) for row in rows)
    assert perplexity(model, tokenizer, texts) == pytest.approx(math.exp(nll), rel=1e-4)
    assert perplexity(model, tokenizer, texts[::-1]) == pytest.approx(perplexity(model, tokenizer, texts), rel=1e-4)
