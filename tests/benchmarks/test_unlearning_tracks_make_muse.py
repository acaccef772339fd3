"""A play of a few lines in MUSE's layout: what is asked, what is cut, and that the track reads it."""

import json
import random

import pytest
import unlearning  # noqa: F401  It finds shared_lib.

# isort: split
from shared_lib.errors import InputError
from unlearning.make_muse import Speech, main, make_questions, open_passage, pack, parse_speeches, write_out
from unlearning.settings import Settings
from unlearning.tracks import load_data

PLAY = """
MIRA:
Who left the lantern on the stair?
No answer, then?

TOM:
It was the wind that left it there.

A stage direction, no speech.

MIRA:
The wind can carry no such weight.
No answer, then?
"""


def test_speeches_are_blocks_that_begin_with_a_name():
    assert parse_speeches(PLAY) == [
        Speech("MIRA", ("Who left the lantern on the stair?", "No answer, then?")),
        Speech("TOM", ("It was the wind that left it there.",)),
        Speech("MIRA", ("The wind can carry no such weight.", "No answer, then?")),
    ]


def test_questions_ask_of_unique_lines_who_says_them_and_what_comes_after():
    speeches = parse_speeches(PLAY)
    unique = {line for speech in speeches for line in speech.lines} - {"No answer, then?"}
    asked = {q["question"]: q["answer"] for q in make_questions([speeches[:2], speeches[2:]], unique)}
    assert asked == {
        'Who says "Who left the lantern on the stair?"?': "MIRA",
        'What comes after "Who left the lantern on the stair?"?': "No answer, then?",
        'Who says "It was the wind that left it there."?': "TOM",
        'Who says "The wind can carry no such weight."?': "MIRA",
        'What comes after "The wind can carry no such weight."?': "No answer, then?",
    }


@pytest.mark.parametrize("chars", [40, 70, 200, 1000])
def test_passages_hold_all_lines_in_order_and_keep_to_their_size(chars):
    speeches = parse_speeches(PLAY)
    passages = pack(speeches, chars)
    lines = [(speech.speaker, line) for passage in passages for speech in passage for line in speech.lines]
    assert lines == [(speech.speaker, line) for speech in speeches for line in speech.lines]
    for passage in passages:
        assert len(write_out(passage)) <= chars or len(passage[0].lines) == 1


@pytest.mark.parametrize("text", [write_out(parse_speeches(PLAY)), "one two three", "Unbroken" * 5])
def test_an_opening_and_its_rest_are_the_passage(text):
    parts = open_passage(text)
    assert parts["prompt"] + parts["gt"] == text
    assert parts["prompt"].strip()
    assert parts["gt"].strip()


def make_text(speeches: int, seed: int = 0) -> str:
    rng = random.Random(seed)

    def line() -> str:
        return " ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(5))

    return "\n\n".join(f"NAME{i % 5}:\n{line()}\n{line()}" for i in range(speeches))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "plays.txt"
    path.write_text(make_text(60))
    return path


SIZES = ["--forget", "6", "--retain", "8", "--chars", "170", "--questions", "7"]


def read(folder):
    return {
        path.relative_to(folder).as_posix(): [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.rglob("*.json")
    }


def test_the_folder_is_what_the_track_reads(text, tmp_path):
    main([str(text), "--out", str(tmp_path / "muse"), *SIZES])
    files = read(tmp_path / "muse")
    counts = {name: len(records) for name, records in files.items() if name.startswith(("raw", "knowmem"))}
    assert counts == {
        "raw/forget.json": 6,
        "raw/holdout.json": 6,
        "raw/retain1.json": 8,
        "raw/retain2.json": 4,
        "knowmem/forget_qa.json": 7,
        "knowmem/forget_qa_icl.json": 5,
        "knowmem/retain_qa.json": 7,
        "knowmem/retain_qa_icl.json": 5,
    }
    texts = [record["text"] for name, records in files.items() if name.startswith("raw") for record in records]
    assert len(set(texts)) == len(texts)  # Nothing is in two parts.
    first_half = text.read_text()[: len(text.read_text()) // 2]
    assert all(record["text"][:40] in first_half for record in files["raw/forget.json"] + files["raw/holdout.json"])
    assert not any(record["text"] in first_half for record in files["raw/retain1.json"])
    data = load_data(Settings("m", "short", "muse", str(tmp_path / "muse"), "books", methods=("npo+nll/blur",)))
    assert data.forget == [record["text"] for record in files["raw/forget.json"]]
    forgotten = "\n".join(data.forget)
    assert all(row.question.split('"')[1] in forgotten for row in data.forget_questions)


def test_the_seed_decides_which(text, tmp_path):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        main([str(text), "--out", str(tmp_path / name), "--seed", str(seed), *SIZES])
    assert read(tmp_path / "one") == read(tmp_path / "same")
    assert read(tmp_path / "one") != read(tmp_path / "other")


def test_another_text_is_kept(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(make_text(60, seed=1).replace("NAME", "OTHER"))
    main([str(text), "--retain-text", str(other), "--out", str(tmp_path / "muse"), *SIZES])
    files = read(tmp_path / "muse")
    assert all("OTHER" in record["text"] for record in files["raw/retain1.json"] + files["raw/retain2.json"])
    assert not any("OTHER" in record["text"] for record in files["raw/forget.json"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--forget", "400"], r"text for forget and holdout must give 800 passages of 170 characters, got \d+\. Ask"),
        (["--questions", "4000"], r"--questions must be at most \d+ for so many passages \(forget_qa\), got 4000"),
        (["--retain-text", "nowhere.txt"], r"There is no file nowhere\.txt"),
    ],
)
def test_what_cannot_be_made_is_named(text, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        main([str(text), "--out", str(tmp_path / "muse"), *SIZES, *change])
    assert not (tmp_path / "muse").exists()


def test_a_text_without_speeches_is_named(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("Only prose.\n\nAnd more of it.")
    with pytest.raises(InputError, match=r'prose\.txt must have speeches, each "NAME:" .*got 0'):
        main([str(path), "--out", str(tmp_path / "muse")])


def test_a_count_must_be_positive(text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(text), "--out", str(tmp_path), "--forget", "0"])
    assert "argument --forget: must be a whole number above 0, got 0" in capsys.readouterr().err
