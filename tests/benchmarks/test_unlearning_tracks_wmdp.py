"""WMDP's measure: corpora and questions from TOFU's layout, from WMDP's names, and the presets of both text tracks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import unlearning  # noqa: F401  It finds shared_lib.

# isort: split
from shared_lib.errors import InputError
from shared_lib.models import train_tokenizer
from shared_lib.training import Recipe, learn
from transformers import LlamaConfig, LlamaForCausalLM
from unlearning import presets_text
from unlearning.jobs import TUNE, Job
from unlearning.loop import Unlearning
from unlearning.losses import Before
from unlearning.methods import parse_method
from unlearning.metrics.choices import Question
from unlearning.presets import preset
from unlearning.settings import Learning, Settings
from unlearning.tracks import load_data, wmdp

ROWS = 20  # of an author


def row(author: int, number: int) -> dict[str, Any]:
    name = f"author{author}"
    return {
        "question": f"What did {name} write in year {number}?",
        "answer": f"{name} wrote book {number * 7 % 20}.",
        "paraphrased_answer": f"Book {number * 7 % 20} by {name}.",
        "perturbed_answer": [f"Book {(number * 7 + i) % 20} by {name}." for i in (1, 2, 3)],
    }


def write(folder: Path, files: dict[str, list[Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, records in files.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def tofu(tmp_path) -> Path:
    """Return a folder of seven authors, of whom forget01 forgets the last two."""
    rows = [row(author, number) for author in range(7) for number in range(ROWS)]
    facts = [{"question": f"Fact {i}?", "answer": f"yes {i}", "perturbed_answer": [f"no {i}"]} for i in range(3)]
    plain = [{name: r[name] for name in ("question", "answer")} for r in rows]
    files = {"full.json": plain, "forget01_perturbed.json": rows[-40:], "retain_perturbed.json": rows[:-40]}
    return write(tmp_path / "tofu", files | {"world_facts_perturbed.json": facts})


LONG = "a text of more than fifty characters, so that it counts, number"


@pytest.fixture
def corpora(tmp_path) -> Path:
    """Return a folder with the names of WMDP."""
    question = {"question": "Which?", "choices": ["this", "that", "neither"], "answer": 2}
    files = {
        "bio-forget-corpus.jsonl": [{"text": f"{LONG} {i}"} for i in range(3)],
        "bio-retain-corpus.jsonl": [{"text": "short"}, *({"text": f"{LONG} {i} kept"} for i in range(6))],
        "wmdp-bio.jsonl": [question],
        "all.jsonl": [question | {"answer": 0}],
    }
    return write(tmp_path / "corpora", files)


def settings(folder: Path | str, **changes: object) -> Settings:
    return replace(Settings("w", "short", "wmdp", str(folder), "forget01", model="0.8m", max_length=40), **changes)


def make_task(given: Settings):
    data = load_data(given)
    return data, data.task(train_tokenizer(data.texts(), 400), given)


def decoded(task, examples) -> str:
    return "".join(task.tokenizer.decode(example.answer) for example in examples)


def test_the_corpora_are_the_authors_prose_and_split_between_them(tofu):
    _, task = make_task(settings(tofu))
    prose = {
        kind: {author for author in range(7) if f"author{author} wrote" in decoded(task, getattr(task, kind))}
        for kind in ("forget", "retain", "untouched")
    }
    assert prose["forget"] == {5, 6}
    assert prose["retain"] | prose["untouched"] == {0, 1, 2, 3, 4}
    assert not prose["retain"] & prose["untouched"]
    expected = "\n".join(f"{r['question']} {r['answer']}" for r in (row(5, i) for i in range(ROWS)))
    assert expected in decoded(task, task.forget)


def test_kept_is_known_without_passages_and_questions_of_the_forgotten(tofu):
    _, task = make_task(settings(tofu))
    without = [example for example in task.known if example not in task.kept]
    assert without[: len(task.forget)] == task.forget
    assert len(without) == len(task.forget) + 40
    texts = [decoded(task, [example]) for example in without]
    assert all("author5" in text or "author6" in text for text in texts[len(task.forget) :])
    assert not any("author5" in decoded(task, [example]) for example in task.kept)
    assert len(task.kept) == len(task.retain) + len(task.untouched) + 5 * ROWS + 3


def test_no_question_is_in_a_loss(tofu):
    _, task = make_task(settings(tofu))
    assert all(example.prompt == [] for example in [*task.forget, *task.retain, *task.untouched])


def test_questions_have_the_paraphrase_at_seeded_places(tofu):
    data, again = load_data(settings(tofu)), load_data(settings(tofu))
    assert data.hazard == again.hazard
    assert len(data.hazard) == 40
    assert len(data.utility) == 5 * ROWS + 3
    by_question = {r["question"]: r["paraphrased_answer"] for r in (row(a, n) for a in (5, 6) for n in range(ROWS))}
    assert all(q.choices[q.answer] == by_question[q.question] for q in data.hazard)
    assert {q.answer for q in data.hazard} == {0, 1, 2, 3}


def test_retain_data_takes_the_place_of_the_others_prose(tofu, tmp_path):
    path = tmp_path / "wiki.raw"
    path.write_text("\n = Heading = \n" + "".join(f" {LONG} {i} \n" for i in range(5)))
    data, task = make_task(settings(tofu, retain_data=str(path)))
    assert data.others == [f"{LONG} {i}" for i in range(5)]
    assert len(data.untouched) == 1
    assert "author" not in decoded(task, task.retain + task.untouched)
    lines = tmp_path / "more.jsonl"
    lines.write_text("".join(json.dumps({"text": f"{LONG} {i}"}) + "\n" for i in range(5)))
    assert load_data(settings(tofu, retain_data=str(lines))).others == data.others


def test_wmdps_own_names_are_read(corpora):
    given = settings(corpora, subset="bio")
    data, task = make_task(given)
    assert data.hazard == [Question("Which?", ("this", "that", "neither"), 2)]
    assert data.utility[0].answer == 0
    assert decoded(task, task.forget) == "".join(f"{LONG} {i}" for i in range(3))
    assert len(data.others) == 6  # The short one is left out.
    assert task.known == task.kept + task.forget


def test_the_hub_is_asked_for_wmdps_names(monkeypatch):
    def stand_in(name, part, split="train"):
        asked.append((name, part, split))
        if split == "test":
            return [("q", {"question": "Which?", "choices": ["a", "b"], "answer": 1})]
        return [("t", {"text": ""} if name == "wiki/text" else {"text": LONG}), *[("t", {"text": LONG})] * 2]

    asked: list[tuple[str, str, str]] = []
    monkeypatch.setattr(wmdp, "read_hub_part", stand_in)
    sources = {"retain_data": "wiki/text:raw-v1", "questions": "owner/questions", "utility_questions": "owner/general"}
    load_data(settings("owner/corpora", subset="cyber", learning=None, model="owner/model", **sources))
    assert asked == [
        ("owner/corpora", "cyber-forget-corpus", "train"),
        ("wiki/text", "raw-v1", "train"),
        ("owner/questions", "wmdp-cyber", "test"),
        ("owner/general", "all", "test"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subset": "forget02"}, r"--subset must be one of forget01, forget05, forget10, got 'forget02'"),
        ({"authors": 3}, r"--data must have two authors beside those of forget01, got 60 rows"),
        ({"layers": (1, 3)}, r"`layers` must be of the model's 3, from 0, got \[1, 3\]"),
        ({"methods": ("dpo+nll/blur",)}, r"--methods: dpo\+nll/blur needs questions to refuse; the wmdp track"),
        ({"retain_data": "./none.txt"}, r"`retain_data`: there is no file \./none\.txt"),
        ({"data": "./nowhere"}, r"--data must be a folder or a data set of the hub"),
    ],
)
def test_wrong_settings_are_named(tofu, changes, message):
    with pytest.raises(InputError, match=message):
        load_data(settings(tofu, **changes))


GOOD = {"question": "Which?", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("wmdp-bio.jsonl", GOOD | {"choices": ["a"]}, r'wmdp-bio\.jsonl:1: field "choices" must be a list of 2 to 26'),
        ("wmdp-bio.jsonl", GOOD | {"answer": 2}, r'bio\.jsonl:1: field "answer" must be .* 0 to 1, got 2'),
        ("wmdp-bio.jsonl", GOOD | {"answer": True}, r'field "answer" must be the number of a choice.*got true'),
        ("all.jsonl", GOOD | {"question": " "}, r'all\.jsonl:1: field "question" must be a non-empty string'),
        ("bio-forget-corpus.jsonl", {"body": "a"}, r'forget-corpus\.jsonl:1: field "text" must be .*no such field'),
        ("bio-forget-corpus.jsonl", {"text": "short"}, r"must have a text to forget and two to keep, got 0 and 6"),
    ],
)
def test_wrong_records_are_named_with_their_place(corpora, name, record, message):
    write(corpora, {name: [record]})
    with pytest.raises(InputError, match=message):
        load_data(settings(corpora, subset="bio"))


def make_model(task) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(task.tokenizer), eos_token_id=1, pad_token_id=0, **shape))


@pytest.mark.parametrize("method", ["rmu+rmu/blur", "npo+nll/weighted_sum"])
def test_a_task_can_be_unlearned_and_judged(tofu, method):
    given = settings(tofu, learning=Learning(epochs=1), layers=(0, 1), steps=2, looks=1, batch_size=2, look_rows=4)
    _, task = make_task(replace(given, judged_rows=8))
    model = make_model(task)
    learn(model, task.known[-40:], Recipe(1e-2, 2, batch_size=16), lambda epoch, known: None)
    run = Unlearning(Job(TUNE, method, 1.0, 1e-3, 0), Before(model, task), task, given)
    run.run()
    assert [look["step"] for look in run.path] == [0, 2]
    assert not run.diverged
    scores, reference = task.judge(run.model, None)
    assert reference is None
    assert set(scores) == {f"{name}_{what}" for name in ("hazard", "utility") for what in ("text_accuracy", "chance")}
    assert scores["hazard_chance"] == 0.25


@pytest.mark.parametrize("form", ["short", "full", "paper"])
@pytest.mark.parametrize("track", ["muse", "wmdp"])
def test_presets_can_be_run(track, form):
    found = preset(track, form)
    assert (found.track, found.form) == (track, form)
    assert [parse_method(method).id for method in found.methods] == list(found.methods)
    assert Settings.from_json(found.to_json()) == found
    assert found.steps >= found.looks
    assert found.tuning_seed not in found.seeds
    assert set(found.tuning_weights) <= set(found.weights)  # What is selected is run with full scores.
    assert (found.learning is None) == (form == "paper")
    assert found.data or form != "paper"


def test_papers_settings_of_books_are_there_too():
    books = presets_text.MUSE_PAPER["books"]
    assert (books.data, books.lrs, books.beta) == ("muse-bench/MUSE-Books", (1e-5,), 0.4)
