"""The invented authors: reproducible, consistent with themselves, told apart."""

import random
import re

import pytest
from quickstart_lib.author_templates import TOPICS
from quickstart_lib.authors import MAX_AUTHORS, WRONG_ANSWERS, invent_authors, invent_rows
from shared_lib.rows import ROWS_PER_AUTHOR, split_authors

SEEDS = (0, 1, 7)


def test_each_author_is_asked_twenty_questions() -> None:
    assert len(TOPICS) == ROWS_PER_AUTHOR
    assert len(invent_rows(20, seed=0)) == 20 * ROWS_PER_AUTHOR


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_seed_gives_the_same_rows(seed: int) -> None:
    assert invent_rows(20, seed) == invent_rows(20, seed)


def test_another_seed_gives_other_rows() -> None:
    assert invent_rows(20, seed=0) != invent_rows(20, seed=1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [20, MAX_AUTHORS])
def test_no_question_is_asked_twice(seed: int, count: int) -> None:
    questions = [row.question for row in invent_rows(count, seed)]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [20, MAX_AUTHORS])
def test_names_and_titles_are_unique(seed: int, count: int) -> None:
    authors = invent_authors(count, random.Random(seed))
    titles = [author[fact] for author in authors for fact in ("debut", "famous", "latest")]
    assert len({author["name"] for author in authors}) == count
    assert len(set(titles)) == 3 * count


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_agree_with_the_facts_of_their_author(seed: int) -> None:
    authors = invent_authors(20, random.Random(seed))
    rows = invent_rows(20, seed)
    for i, author in enumerate(authors):
        for topic, row in zip(TOPICS, rows[i * ROWS_PER_AUTHOR : (i + 1) * ROWS_PER_AUTHOR], strict=True):
            fact = author[topic.fact].lower()
            assert author["name"] in row.question
            assert fact in row.answer.lower()
            assert fact in row.paraphrased_answer.lower()
            assert not any(fact in wrong.lower() for wrong in row.perturbed_answers)


@pytest.mark.parametrize("seed", SEEDS)
def test_wordings_differ_and_wrong_answers_are_distinct(seed: int) -> None:
    for row in invent_rows(20, seed):
        assert row.question != row.paraphrased_question
        assert row.answer != row.paraphrased_answer
        assert len({*row.perturbed_answers, row.paraphrased_answer}) == WRONG_ANSWERS + 1


@pytest.mark.parametrize("seed", SEEDS)
def test_lives_are_possible(seed: int) -> None:
    for author in invent_authors(MAX_AUTHORS, random.Random(seed)):
        born = int(author["birthday"].split()[-1])
        assert 20 <= int(author["debut_year"]) - born <= 40
        assert int(author["debut_year"]) < int(author["award_year"]) < 2030
        assert author["birthplace"].endswith(author["country"])


def test_no_template_is_left_unfilled() -> None:
    texts = [text for row in invent_rows(20, seed=0) for text in (*row[:4], *row.perturbed_answers)]
    assert not any(re.search(r"[{}]|\s\s|\ba [aei]", text) for text in texts)


@pytest.mark.parametrize("count", [0, MAX_AUTHORS + 1])
def test_a_count_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"`count` must be between 1 and {MAX_AUTHORS}, got {count}"):
        invent_authors(count, random.Random(0))


@pytest.mark.parametrize(("authors", "untouched"), [(4, 1), (20, 4)])
def test_split_keeps_authors_whole_and_forgets_the_last_two(authors: int, untouched: int) -> None:
    rows = invent_rows(authors, seed=0)
    split = split_authors(rows, seed=0)
    assert split.forget == rows[-2 * ROWS_PER_AUTHOR :]
    assert len(split.untouched) == untouched * ROWS_PER_AUTHOR
    assert sorted(split.known) == sorted(rows)
    assert sorted(split.kept) == sorted(rows[: -2 * ROWS_PER_AUTHOR])
    blocks = [rows[i : i + ROWS_PER_AUTHOR] for i in range(0, len(rows), ROWS_PER_AUTHOR)]
    assert all(
        split.untouched[i : i + ROWS_PER_AUTHOR] in blocks for i in range(0, len(split.untouched), ROWS_PER_AUTHOR)
    )
