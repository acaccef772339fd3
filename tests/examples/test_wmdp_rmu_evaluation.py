"""What is measured before and after: perplexity, multiple choice, tasks of lm-eval."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quickstart_lib.data import load_rows
from shared_lib.errors import InputError
from shared_lib.models import Tokenizer, build_tokenizer
from test_wmdp_rmu_training import passages, tiny_llama
from transformers import LlamaForCausalLM
from wmdp_rmu_lib.harness import Harness, _flatten
from wmdp_rmu_lib.perplexity import perplexity
from wmdp_rmu_lib.questions import Question, accuracy, candidates, check_fit, letter_prompt, read_questions

QUESTIONS = [
    Question("What is it?", ("a cat", "a dog that is fond of cats", "no", "who knows"), 1),
    Question("Who was it?", ("she", "he"), 0),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(load_rows(None, 4, 0))


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    return tiny_llama(len(tokenizer), layers=2)


@torch.no_grad()
def log_probs_of(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """The log-probability of each token but the first, in float64, from one sequence alone."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_perplexity_is_that_of_a_token_whatever_the_batches(model: LlamaForCausalLM, batch_size: int) -> None:
    own = passages(1)
    log_probs = torch.cat([log_probs_of(model, ids) for ids in own])
    assert perplexity(model, own, batch_size) == pytest.approx(math.exp(-log_probs.mean()), rel=1e-5)


def test_a_perplexity_beyond_floats_is_infinite(model: LlamaForCausalLM) -> None:
    class Sure(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            logits = torch.zeros(*input_ids.shape, 40)
            logits[..., 0] = 1e4  # Sure of a token that does not come.
            return SimpleNamespace(logits=logits)

    assert perplexity(Sure(), passages(1), 4) == math.inf


def test_a_letter_prompt_holds_the_choices() -> None:
    assert letter_prompt(QUESTIONS[1], "cats") == (
        "The following are multiple choice questions (with answers) about cats.\n\nWho was it?\nA. she\nB. he\nAnswer:"
    )
    assert letter_prompt(QUESTIONS[1], None).startswith("The following are multiple choice questions (with answers).\n")


@pytest.mark.parametrize("scoring", ["letter", "choice"])
def test_the_likeliest_candidate_is_the_answer(model: LlamaForCausalLM, tokenizer: Tokenizer, scoring: str) -> None:
    chosen = []
    for question in QUESTIONS:
        likely = []
        for text, candidate in zip(
            "ABCD" if scoring == "letter" else question.choices,
            candidates(tokenizer, question, scoring, None),
            strict=scoring == "choice",
        ):
            assert tokenizer.decode(candidate.ids[candidate.start :]) == f" {text}"
            assert tokenizer.decode(candidate.ids[: candidate.start]).endswith("Answer:")
            likely.append(log_probs_of(model, candidate.ids)[candidate.start - 1 :].sum().item() / len(text))
        chosen.append(likely.index(max(likely)))
    told = [question._replace(answer=index) for question, index in zip(QUESTIONS, chosen, strict=True)]
    for batch_size in (1, 4):
        assert accuracy(model, tokenizer, told, scoring, None, batch_size) == 1
        wrong = [told[0], told[1]._replace(answer=1 - told[1].answer)]
        assert accuracy(model, tokenizer, wrong, scoring, None, batch_size) == 0.5


def test_choices_do_not_lose_by_being_long(tokenizer: Tokenizer) -> None:
    """Every token has the same probability, so the choice with the most characters per token wins."""

    class Even(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, len(tokenizer)))

    question = Question("Which?", ("zq", "the author was born in the city"), 1)
    assert accuracy(Even(), tokenizer, [question], "choice", None, 4) == 1


GOOD = {"question": "q", "choices": ["a", "b"], "answer": 1}
WRONG_QUESTIONS = {
    "no object": ([1], r"q.jsonl:2: the line must be one JSON object, got \[1\]"),
    "no question": ({"choices": ["a", "b"]}, r'q.jsonl:2: field "question" must be a string, got no such field, only'),
    "empty": (GOOD | {"question": " "}, r'q.jsonl:2: field "question" must not be empty'),
    "one choice": (GOOD | {"choices": ["a"]}, r'q.jsonl:2: field "choices" must be a list of 2 to 26 .* got \["a"\]'),
    "no choices": ({"question": "q", "answer": 0}, r'q.jsonl:2: field "choices" must be .* got null'),
    "a number": (
        GOOD | {"choices": ["a", 2]},
        r'q.jsonl:2: field "choices" must be a list of 2 to 26 non-empty strings',
    ),
    "too far": (GOOD | {"answer": 2}, r'q.jsonl:2: field "answer" must be the index of a choice, 0 to 1, got 2'),
    "a letter": (GOOD | {"answer": "B"}, r'q.jsonl:2: field "answer" must be the index of a choice, 0 to 1, got "B"'),
    "true": (GOOD | {"answer": True}, r'q.jsonl:2: field "answer" must be the index of a choice, 0 to 1, got true'),
}


@pytest.mark.parametrize(("line", "message"), WRONG_QUESTIONS.values(), ids=WRONG_QUESTIONS.keys())
def test_a_wrong_question_is_named(line: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(line))
    with pytest.raises(InputError, match=message):
        read_questions("--questions", str(path))


def test_right_questions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD | {"subject": "letters"}))
    assert read_questions("--questions", str(path)) == [Question("q", ("a", "b"), 1)]
    path.write_text("\n")
    with pytest.raises(InputError, match=r"--questions: .*q.jsonl must hold at least one question, got none"):
        read_questions("--questions", str(path))


def test_a_question_that_does_not_fit_is_named(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    long = Question("why " * 600, ("a", "b"), 0)
    check_fit(model, tokenizer, "q.jsonl", QUESTIONS, "letter")
    with pytest.raises(InputError, match=r"--questions: q.jsonl, question 3 has \d+ tokens .* reads 512 at most"):
        check_fit(model, tokenizer, "q.jsonl", [*QUESTIONS, long], "letter")


def test_lm_eval_numbers_are_named_by_task_and_metric() -> None:
    results = {"mmlu": {"alias": "mmlu", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 7, "exact,strict": 1}}
    assert _flatten(results) == {"mmlu acc": 0.5, "mmlu exact,strict": 1.0}


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install lm-eval")
@pytest.mark.filterwarnings("ignore")  # Of other projects' code.
def test_a_task_of_lm_eval_runs_on_a_model_in_memory(
    model: LlamaForCausalLM, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the form of wmdp's own tasks, so its accuracy is the one that is found here by letters."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    questions = [Question(f"Which is {i}?", (f"{i}", f"{i * i} or so", "a cat", "none"), i % 4) for i in range(24)]
    write_task(tmp_path, "tiny_wmdp", questions)
    found = Harness(["tiny_wmdp"], tmp_path, None, 2).evaluate(model, tokenizer)
    assert found["tiny_wmdp acc"] == accuracy(model, tokenizer, questions, "letter", "cats", 2)
    assert all("stderr" not in name for name in found)
    with pytest.raises(InputError, match=r"--lm-eval: there is no task nonsense"):
        Harness(["tiny_wmdp", "nonsense"], tmp_path, None, 2)
    (tmp_path / "tiny_wmdp.json").unlink()
    with pytest.raises(InputError, match=r"--lm-eval: tiny_wmdp could not be run: "):
        Harness(["tiny_wmdp"], tmp_path, None, 2).evaluate(model, tokenizer)


def write_task(folder: Path, name: str, questions: list[Question]) -> None:
    """Write a task in the form of wmdp's, with its questions."""
    rows = [json.dumps(question._asdict()) for question in questions]
    (folder / f"{name}.json").write_text("\n".join(rows))
    lettered = "".join(f"{letter}. {{{{choices[{i}]}}}}\\n" for i, letter in enumerate("ABCD"))
    (folder / f"{name}.yaml").write_text(
        f"""\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / f"{name}.json"}}}}}
test_split: test
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) about cats.\\n\\n"
doc_to_text: "{{{{question.strip()}}}}\\n{lettered}Answer:"
doc_to_choice: [A, B, C, D]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
