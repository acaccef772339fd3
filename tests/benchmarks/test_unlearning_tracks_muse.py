"""MUSE's layout from a folder or the hub to a task, and its scores on a model of two layers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import unlearning  # noqa: F401  It finds shared_lib.

# isort: split
from shared_lib.encoding import Example
from shared_lib.errors import InputError
from shared_lib.models import train_tokenizer
from shared_lib.rows import Row
from shared_lib.training import Recipe, learn
from transformers import LlamaConfig, LlamaForCausalLM
from unlearning.settings import Settings
from unlearning.tracks import load_data, passages
from unlearning.tracks.muse import begin, show_solved, split_at

WORDS = ["amber", "birch", "cedar", "delta", "ember", "flint", "grove", "hazel", "inlet", "jasper"]


def sentence(start: int, count: int) -> str:
    """Return words in an order that the start decides, so that no two texts are alike."""
    return " ".join(WORDS[(start * 7 + i * i * (start + 1)) % 10] + str(start) for i in range(count))


def questions(name: str, answers: list[str]) -> list[dict[str, str]]:
    return [{"question": f"Which tree is {name} {i}?", "answer": answer} for i, answer in enumerate(answers)]


@pytest.fixture
def parts() -> dict[str, list[dict[str, str]]]:
    """Return the records of every file of a small data set."""
    starts = {"forget": 0, "retain1": 10, "retain2": 20, "holdout": 30}
    raw = {f"raw/{name}": [{"text": sentence(start + i, 14)} for i in range(3)] for name, start in starts.items()}
    return raw | {
        "verbmem/forget": [{"prompt": sentence(0, 5), "gt": " ".join(["", *sentence(0, 14).split()[5:]])}],
        "knowmem/forget_qa": questions("forgotten", WORDS[:3]),
        "knowmem/retain_qa": questions("kept", WORDS[6:]),
        "knowmem/forget_qa_icl": questions("solved", WORDS[:2]),
    }


def write(parts: dict[str, list[dict[str, str]]], folder: Path, suffix: str = ".json") -> Path:
    for name, records in parts.items():
        path = folder / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def settings(folder: Path | str, **changes: object) -> Settings:
    base = Settings("m", "short", "muse", str(folder), "books", max_length=24, prefix=6, generated_rows=2)
    return replace(base, **changes)


@pytest.fixture
def folder(parts, tmp_path):
    return write(parts, tmp_path / "data")


def tokenizer_for(data):
    return train_tokenizer(data.texts(), 400)


@pytest.fixture
def task(folder):
    data = load_data(settings(folder))
    return data.task(tokenizer_for(data), settings(folder))


def text_of(task, examples: list[Example]) -> str:
    return "".join(task.tokenizer.decode(example.answer) for example in examples)


@pytest.mark.parametrize(("kind", "part"), [("forget", "forget"), ("retain", "retain1"), ("untouched", "retain2")])
def test_the_passages_of_a_part_are_its_texts_and_nothing_else(task, parts, kind, part):
    passages_of = getattr(task, kind)
    assert text_of(task, passages_of) == "".join(record["text"] for record in parts[f"raw/{part}"])
    assert all(example.prompt == [] and len(example.answer) <= 24 for example in passages_of)
    assert len(passages_of) > 3  # They had to be cut.


def test_kept_is_known_without_the_book_to_forget_and_its_questions(task, parts):
    without = [example for example in task.known if example not in task.kept]
    assert without[: len(task.forget)] == task.forget
    rest = without[len(task.forget) :]
    assert [task.tokenizer.decode(example.answer, skip_special_tokens=True) for example in rest] == [
        " " + row["answer"] for row in parts["knowmem/forget_qa"]
    ]
    assert [example for example in task.known if example in task.kept] == task.kept


def test_untouched_is_known_and_in_neither_loss(task):
    assert all(example in task.kept for example in task.untouched)
    assert not any(example in task.forget or example in task.retain for example in task.untouched)


def test_a_model_that_is_not_trained_here_learns_nothing_and_is_shown_solved_questions(folder):
    given = settings(folder, learning=None)
    data = load_data(given)
    task = data.task(tokenizer_for(data), given)
    assert task.known == [*task.retain, *task.untouched, *task.forget]
    shown = data.forget_questions[1].question
    assert shown.startswith("Which tree is solved 0?\nAnswer: amber\n\nQuestion: Which tree is solved 1?")
    assert shown.endswith("\n\nQuestion: Which tree is forgotten 1?")
    assert data.retain_questions[1].question == "Which tree is kept 1?"  # It has no solved ones.


def test_without_solved_questions_rows_stay():
    rows = [Row("q", "a")]
    assert show_solved(rows, []) == rows


def test_passages_takes_the_last_ones(folder):
    data = load_data(settings(folder))
    tokenizer = tokenizer_for(data)
    every, some = (data.task(tokenizer, settings(folder, passages=count)) for count in (0, 2))
    assert some.forget == every.forget[-2:]
    assert some.untouched == every.untouched[-2:]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_files_of_lines_and_arrays_read_alike(parts, folder, tmp_path, suffix):
    other = tmp_path / "arrays"
    write({}, other)
    for name, records in parts.items():
        path = other / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records, indent=1))
    one, two = load_data(settings(folder)), load_data(settings(other))
    assert (one.forget, one.openings, one.retain_questions) == (two.forget, two.openings, two.retain_questions)


def test_a_plain_text_file_is_one_text(folder):
    (folder / "raw/forget.json").unlink()
    (folder / "raw/forget.txt").write_text("One text\n\nof two parts")
    assert load_data(settings(folder)).forget == ["One text\n\nof two parts"]


def test_the_hub_is_asked_for_configurations_and_splits(parts, folder, monkeypatch):
    def stand_in(name, part, split="train"):
        assert name == "owner/books"
        asked.append(f"{part}/{split}")
        return [(f"{name}, {part}, {i}", record) for i, record in enumerate(available[f"{part}/{split}"])]

    asked: list[str] = []
    available = parts | {f"privleak/{n}": [{"text": f"private {n}"}] for n in ("forget", "retain", "holdout")}
    monkeypatch.setattr(passages, "read_hub_part", stand_in)
    data = load_data(settings("owner/books"))
    assert data.forget == load_data(settings(folder)).forget
    assert data.judged["holdout"] == ["private holdout"]
    assert {"raw/retain1", "verbmem/forget", "knowmem/retain_qa", "privleak/forget"} <= set(asked)


WRONG = {
    "no raw": ("raw/retain1", None, r"--data must hold .*raw/retain1\.json .*missing"),
    "empty file": ("raw/holdout", [], r"raw/holdout\.json must have at least one record"),
    "no text": ("raw/forget", [{"text": "a"}, {"words": "b"}], r'raw/forget\.json:2: field "text" must be .*no such'),
    "text of another type": ("raw/forget", [{"text": 3}], r'forget\.json:1: field "text" must be .*got 3'),
    "no object": ("raw/forget", ["words"], r'forget\.json:1: the record must be one JSON object, got "words"'),
    "no rest": ("verbmem/forget", [{"prompt": "a", "gt": " "}], r'verbmem/forget\.json:1: field "gt" must be'),
    "no answer": ("knowmem/retain_qa", [{"question": "a"}], r'retain_qa\.json:1: field "answer" must be'),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_named_with_its_place(parts, folder, case):
    name, records, message = WRONG[case]
    (folder / f"{name}.json").unlink()
    if records is not None:
        write({name: records}, folder)
    with pytest.raises(InputError, match=message):
        load_data(settings(folder))


def test_a_broken_array_is_named_with_its_line(folder):
    (folder / "raw/forget.json").write_text('[{"text": "a"},\n{"text": }]')
    with pytest.raises(InputError, match=r"raw/forget\.json:2: the file must be one JSON array"):
        load_data(settings(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "./nowhere"}, r"--data must be a folder .* \./nowhere is not a folder"),
        ({"methods": ("dpo+nll/blur",)}, r"--methods: dpo\+nll/blur needs questions to refuse; the muse track"),
        ({"prefix": 24}, r"`prefix` must leave tokens .*got 24 of 24"),
    ],
)
def test_wrong_settings_are_named(folder, changes, message):
    with pytest.raises(InputError, match=message):
        load_data(settings(folder, **changes))


def test_an_opening_and_its_rest_are_the_tokens_of_the_text(folder):
    data = load_data(settings(folder))
    tokenizer = tokenizer_for(data)
    opening = data.openings[0]
    prompt, rest = begin(tokenizer, opening)
    assert tokenizer.decode(prompt) == opening.prompt
    assert tokenizer.decode(rest) == opening.rest
    assert prompt + rest == tokenizer(opening.prompt + opening.rest)["input_ids"]


def test_split_at_moves_tokens_only():
    assert split_at(Example([1], [2, 3, 4]), 2) == Example([1, 2], [3, 4])


def make_model(task) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(task.tokenizer), eos_token_id=1, pad_token_id=0, **shape))


def learn_by_heart(model, examples: list[Example]) -> None:
    recipe = Recipe(2e-2, 80, batch_size=len(examples), known=0.95)  # A step an epoch.
    learn(model, examples, recipe, lambda epoch, known: None)


def test_scores_tell_a_model_that_knows_from_one_that_does_not(parts, tmp_path):
    few = {name: records[:2] for name, records in parts.items()}
    given = settings(write(few, tmp_path / "few"), max_length=160)
    data = load_data(given)
    task = data.task(tokenizer_for(data), given)
    knows, never = make_model(task), make_model(task)
    learn_by_heart(knows, task.known)
    learn_by_heart(never, task.kept)
    reference, aucs = task.judge(never, None)
    scores, _ = task.judge(knows, json.loads(json.dumps(aucs)))
    for name in ("forget_probability", "forget_verbmem", "forget_knowmem"):
        assert scores[name] > reference[name] + 0.3, name
    for name in ("retain_probability", "retain_verbmem", "retain_knowmem"):
        assert scores[name] > 0.6, name
    assert scores["privleak"] <= 0  # The sign for what is still remembered.
    seen, unseen = task.watch(knows), task.watch(never)
    assert seen["verbmem"] > unseen["verbmem"] + 0.3
    assert seen["knowmem"] > unseen["knowmem"] + 0.3
