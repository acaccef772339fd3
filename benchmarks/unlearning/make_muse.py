"""Write a folder in the layout of MUSE from plain text of the form "NAME:" and lines below, such as plays.

    python benchmarks/unlearning/make_muse.py plays.txt --out muse-plays
    python benchmarks/unlearning/make_muse.py plays.txt --retain-text others.txt --out muse-plays --forget 96

The text is the book to forget, the other text the one to keep; a single text is halved.
Each is cut into passages of whole lines. Some of the first are forgotten and others never seen (holdout); some of the
second are rehearsed (retain1) and others left alone (retain2). Questions are made from lines that occur once:
who says a line, and which line comes after it. The same text, options and seed give the same folder.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # As a command, the folder above is not on the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

import unlearning  # noqa: F401  It finds shared_lib.

# isort: split
from shared_lib.errors import InputError, run

SHORTEST_LINE = 4  # words of a line that is asked for
SOLVED = 5  # questions kept apart, to be shown with their answers
OPENING = 0.3  # of a passage's characters, shown for VerbMem


class Speech(NamedTuple):
    """Who speaks, and the lines."""

    speaker: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join([f"{self.speaker}:", *self.lines])


Passage = list[Speech]
Question = dict[str, str]


def parse_speeches(text: str) -> list[Speech]:
    """Read blocks between blank lines that begin with "NAME:"; others are left out."""
    blocks = [[line.strip() for line in block.splitlines() if line.strip()] for block in text.split("\n\n")]
    return [Speech(lines[0][:-1], tuple(lines[1:])) for lines in blocks if len(lines) > 1 and lines[0].endswith(":")]


def pack(speeches: Iterable[Speech], chars: int) -> list[Passage]:
    """Join speeches to passages of at most so many characters; a longer speech goes on in the next, under its name."""
    passages: list[Passage] = []
    size = chars
    for piece in (piece for speech in speeches for piece in _pieces(speech, chars)):
        added = len(piece.text) + 2
        if not passages or size + added > chars:
            passages.append([])
            size = 0
        passages[-1].append(piece)
        size += added
    return passages


def _pieces(speech: Speech, chars: int) -> list[Speech]:
    pieces: list[list[str]] = [[]]
    for line in speech.lines:
        if pieces[-1] and len(Speech(speech.speaker, (*pieces[-1], line)).text) + 2 > chars:
            pieces.append([])
        pieces[-1].append(line)
    return [Speech(speech.speaker, tuple(lines)) for lines in pieces]


def write_out(passage: Passage) -> str:
    """Return a passage's text."""
    return "\n\n".join(speech.text for speech in passage)


def make_questions(passages: Iterable[Passage], unique: set[str]) -> list[Question]:
    """Ask who says a line and which comes after it, for lines that occur only once in all texts.

    Args:
        unique: those lines.
    """
    questions = []
    for speech in (speech for passage in passages for speech in passage):
        for line, after in zip(speech.lines, (*speech.lines[1:], ""), strict=True):
            if line not in unique or len(line.split()) < SHORTEST_LINE:
                continue
            questions.append({"question": f'Who says "{line}"?', "answer": speech.speaker})
            if after:
                questions.append({"question": f'What comes after "{line}"?', "answer": after})
    return questions


def open_passage(text: str) -> Question:
    """Split a passage for VerbMem, between two words or lines."""
    place = max(text.rfind(" ", 1, int(OPENING * len(text))), text.rfind("\n", 1, int(OPENING * len(text))))
    place = place if place > 0 else len(text) // 2
    return {"prompt": text[:place], "gt": text[place:]}


def make_parts(
    books: tuple[Sequence[Speech], Sequence[Speech]], counts: dict[str, int], chars: int, questions: int, seed: int
) -> dict[str, list[dict[str, str]]]:
    """Return the records of every file, by its path without suffix.

    Args:
        books: the speeches of the one to forget and of the one to keep.
        counts: passages of ``forget``, ``holdout``, ``retain1`` and ``retain2``.
        questions: about each book.
    Raises:
        InputError: the books are too short.
    """
    rng = random.Random(seed)
    packed = [pack(book, chars) for book in books]
    chosen: dict[str, list[Passage]] = {}
    for passages, names in zip(packed, (("forget", "holdout"), ("retain1", "retain2")), strict=True):
        wanted = sum(counts[name] for name in names)
        if len(passages) < wanted:
            raise InputError(
                f"The text for {' and '.join(names)} must give {wanted} passages of {chars} characters, got "
                f"{len(passages)}. Ask for fewer or shorter ones."
            )
        drawn = iter(rng.sample(passages, wanted))
        chosen |= {name: [next(drawn) for _ in range(counts[name])] for name in names}
    lines = Counter(line for book in books for speech in book for line in speech.lines)
    unique = {line for line, count in lines.items() if count == 1}
    texts = {name: [write_out(passage) for passage in passages] for name, passages in chosen.items()}
    raw = {f"raw/{name}": [{"text": text} for text in some] for name, some in texts.items()}
    privleak = {name: raw[f"raw/{source}"] for name, source in PRIVLEAK.items()}
    verbatim = {"verbmem/forget": [open_passage(text) for text in texts["forget"]]}
    asked = {
        "forget_qa": make_questions(chosen["forget"], unique),
        "retain_qa": make_questions(chosen["retain1"] + chosen["retain2"], unique),
    }
    return raw | privleak | verbatim | _drawn(asked, questions, rng)


PRIVLEAK = {"privleak/forget": "forget", "privleak/retain": "retain2", "privleak/holdout": "holdout"}


def _drawn(asked: dict[str, list[Question]], questions: int, rng: random.Random) -> dict[str, list[Question]]:
    parts = {}
    for name, some in asked.items():
        if len(some) < questions + SOLVED:
            most = max(0, len(some) - SOLVED)
            raise InputError(f"--questions must be at most {most} for so many passages ({name}), got {questions}.")
        drawn = rng.sample(some, questions + SOLVED)
        parts |= {f"knowmem/{name}": drawn[:questions], f"knowmem/{name}_icl": drawn[questions:]}
    return parts


def read_books(text: Path, retain_text: Path | None) -> tuple[list[Speech], list[Speech]]:
    """Return the speeches of the book to forget and of the one to keep.

    Raises:
        InputError: a file is missing, is not UTF-8, or has no speeches.
    """
    forget = _read(text)
    if retain_text:
        return forget, _read(retain_text)
    half = len(forget) // 2
    return forget[:half], forget[half:]


def _read(path: Path) -> list[Speech]:
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    try:
        speeches = parse_speeches(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the file must be UTF-8 text, but byte {error.start} is not.") from error
    if len(speeches) < 2:
        raise InputError(f'{path} must have speeches, each "NAME:" and lines after a blank line; got {len(speeches)}.')
    return speeches


def write_parts(parts: dict[str, list[dict[str, str]]], out: Path) -> None:
    """Write one JSON-lines file for each part."""
    for name, records in parts.items():
        path = out / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("text", type=Path, metavar="TEXT", help='plain text: "NAME:", lines below, a blank line')
    add(
        "--retain-text",
        type=Path,
        metavar="TEXT",
        help="the book to keep (default: the second half of TEXT, the first is forgotten)",
    )
    add("--out", type=Path, required=True, metavar="FOLDER", help="is made, and its files overwritten")
    for name, default, meaning in (
        ("forget", 32, "passages to forget, and as many never seen"),
        ("retain", 40, "passages to rehearse, and half as many untouched"),
        ("chars", 400, "of a passage at most; a longer line stays whole"),
        ("questions", 32, "about each book"),
    ):
        add(f"--{name}", type=_positive, default=default, metavar="N", help=f"{meaning} (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of which passages and questions (default: %(default)s)")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text}")
    return number


def main(arguments: list[str] | None = None) -> Any:
    """Make the folder."""
    options = parse_options(arguments)
    books = read_books(options.text, options.retain_text)
    counts = {
        "forget": options.forget,
        "holdout": options.forget,
        "retain1": options.retain,
        "retain2": max(1, options.retain // 2),
    }
    parts = make_parts(books, counts, options.chars, options.questions, options.seed)
    write_parts(parts, options.out)
    print(f"{options.out}: " + ", ".join(f"{name} {len(records)}" for name, records in parts.items()))


if __name__ == "__main__":
    sys.exit(run(main))
