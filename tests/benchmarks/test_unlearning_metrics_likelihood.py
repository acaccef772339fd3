"""The teacher-forced pass against cases worked out by hand, and against a naive loop."""

import math

import pytest
import torch
import unlearning.metrics.likelihood as likelihood
from counting import Counter
from shared_lib.encoding import Example, encode_rows
from shared_lib.metrics import answer_probabilities
from transformers import LlamaForCausalLM
from unlearning.metrics.likelihood import (
    evaluating,
    log_prob_and_probability,
    mean_log_prob,
    next_log_probs,
    probability,
    row_log_probs,
    token_log_probs,
    token_scores,
)
from unlearning_metrics_models import ROWS, make_llama, make_tokenizer

# Answer 3, 4: both as predicted. Answer 3, 7: one in two. Answer 0: not as predicted. A passage: its first token is
# predicted by nothing.
EXAMPLES = [Example([7, 2], [3, 4]), Example([5, 2], [3, 7]), Example([2], [0]), Example([], [1, 2, 8])]
LOG_PROBS = [[1 / 2, 1 / 2], [1 / 2, 1 / 16], [1 / 16], [1 / 2, 1 / 16]]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return make_llama(make_tokenizer())


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [*encode_rows(make_tokenizer(), ROWS), Example([], [5, 6, 7, 8, 9])]


def naive(model: LlamaForCausalLM, example: Example) -> torch.Tensor:
    """Return the full log-probabilities of the answer's tokens, ``[n, V]``, in float64 from one sequence alone."""
    ids = torch.tensor([example.prompt + example.answer])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].double()
    return logits.log_softmax(-1)[max(len(example.prompt) - 1, 0) :]


def targets(example: Example) -> torch.Tensor:
    return torch.tensor(example.answer if example.prompt else example.answer[1:])


def test_log_probs_by_hand() -> None:
    for got, expected in zip(token_log_probs(Counter(), EXAMPLES), LOG_PROBS, strict=True):
        assert got.tolist() == pytest.approx([math.log(p) for p in expected])


def test_correct_tokens_by_hand() -> None:
    assert [s.correct.tolist() for s in token_scores(Counter(), EXAMPLES)] == [
        [True, True],
        [True, False],
        [False],
        [True, False],
    ]


def test_mean_and_spread_over_the_vocabulary_by_hand() -> None:
    # One token of 1/2 and eight of 1/16: in units of log 2, E = -1/2 - 8 * 4/16 = -5/2, E^2 = 1/2 + 8 * 16/16 = 17/2.
    mean, variance = -2.5, 8.5 - 2.5**2
    for scores in token_scores(Counter(), EXAMPLES, vocabulary=True):
        n = len(scores.log_probs)
        assert scores.mean.tolist() == pytest.approx([mean * math.log(2)] * n)
        assert scores.std.tolist() == pytest.approx([math.sqrt(variance) * math.log(2)] * n)


def test_mean_and_spread_are_left_out_unless_asked_for() -> None:
    assert {(s.mean, s.std) for s in token_scores(Counter(), EXAMPLES)} == {(None, None)}


def test_a_certain_prediction_has_a_spread_to_divide_by(llama: LlamaForCausalLM, examples: list[Example]) -> None:
    class Certain(Counter):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits * 1000  # the most probable token takes all
            return output

    (scores,) = token_scores(Certain(), [Example([7, 2], [3, 4])], vocabulary=True)
    assert scores.std.tolist() == pytest.approx([1e-3, 1e-3])  # sqrt(1e-6)
    assert ((scores.log_probs - scores.mean) / scores.std).tolist() == [0, 0]


def test_averages_by_hand() -> None:
    # Rows: log 1/2; mean of log 1/2 and log 1/16 (twice); log 1/16.
    rows = [-1, -2.5, -4, -2.5]
    assert row_log_probs(Counter(), EXAMPLES).tolist() == pytest.approx([x * math.log(2) for x in rows])
    assert mean_log_prob(Counter(), EXAMPLES) == pytest.approx(-10 / 4 * math.log(2))
    assert probability(Counter(), EXAMPLES) == pytest.approx(sum(2**x for x in rows) / 4)
    both = log_prob_and_probability(Counter(), EXAMPLES)
    assert both == {"log_prob": mean_log_prob(Counter(), EXAMPLES), "probability": probability(Counter(), EXAMPLES)}


def test_the_pass_is_that_of_a_naive_loop(llama: LlamaForCausalLM, examples: list[Example]) -> None:
    for scores, example in zip(token_scores(llama, examples, vocabulary=True), examples, strict=True):
        full, true = naive(llama, example), targets(example)
        p = full.exp()
        mean = (p * full).sum(-1)
        # float32 of a padded batch against float64 on the same float32 logits, which differ in their last bits.
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(scores.log_probs.double(), full.gather(-1, true[:, None])[:, 0], **close)
        torch.testing.assert_close(scores.mean.double(), mean, **close)
        torch.testing.assert_close(scores.std.double(), ((p * (full - mean[:, None]) ** 2).sum(-1)).sqrt(), **close)
        assert scores.correct.tolist() == (full.argmax(-1) == true).tolist()


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_the_batch_size_does_not_matter(
    llama: LlamaForCausalLM, examples: list[Example], batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    collate = likelihood.collate
    monkeypatch.setattr(likelihood, "collate", lambda e, i, d: sizes.append(len(i)) or collate(e, i, d))
    got = token_log_probs(llama, examples, batch_tokens=batch_tokens)
    assert sum(sizes) == len(examples)
    assert (max(sizes) == 1) == (batch_tokens == 1)
    assert (sizes == [len(examples)]) == (batch_tokens == 10_000)
    for row, example in zip(got, examples, strict=True):
        torch.testing.assert_close(row, token_log_probs(llama, [example])[0], rtol=1e-4, atol=1e-4)


def test_a_permutation_of_the_rows_permutes_the_scores(llama: LlamaForCausalLM, examples: list[Example]) -> None:
    forwards, backwards = token_log_probs(llama, examples), token_log_probs(llama, examples[::-1])
    for a, b in zip(forwards, backwards[::-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_examples_know_the_same_probabilities(llama: LlamaForCausalLM, examples: list[Example]) -> None:
    expected = answer_probabilities(llama, examples)
    torch.testing.assert_close(row_log_probs(llama, examples).exp().float(), expected, rtol=1e-4, atol=1e-7)


def test_next_tokens_by_hand() -> None:
    got = next_log_probs(Counter(), [[1, 2], [4]], [3, 5, 8]).exp()
    torch.testing.assert_close(got, torch.tensor([[1 / 2, 1 / 16, 1 / 16], [1 / 16, 1 / 2, 1 / 16]]))


def test_next_tokens_are_those_of_the_pass(llama: LlamaForCausalLM) -> None:
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20]]
    got = next_log_probs(llama, prompts, [7, 3], batch_tokens=9)
    for j, token in enumerate((7, 3)):
        expected = torch.cat(token_log_probs(llama, [Example(prompt, [token]) for prompt in prompts]))
        torch.testing.assert_close(got[:, j], expected, rtol=1e-4, atol=1e-4)


def test_dropout_is_off_and_the_training_mode_comes_back() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Dropout(), "b": torch.nn.Dropout()}).train()
    model["b"].eval()
    seen = []

    def fail() -> None:
        with evaluating(model):
            seen.append(model["a"].training)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [False]
    assert (model.training, model["a"].training, model["b"].training) == (True, True, False)


def test_progress_counts_the_rows() -> None:
    seen = []
    token_scores(Counter(), EXAMPLES, batch_tokens=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("example", [Example([1, 2], []), Example([], [1]), Example([], [])])
def test_an_example_without_a_token_to_predict_is_refused(example: Example) -> None:
    with pytest.raises(ValueError, match=r"`examples\[1\]` must have a token to predict, got a prompt of"):
        token_scores(Counter(), [Example([1], [2]), example])


def test_no_examples_have_no_scores() -> None:
    assert token_scores(Counter(), []) == []
