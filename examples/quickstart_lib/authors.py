"""Invent authors with consistent facts, and ask about them in the format of TOFU (arXiv:2401.06121)."""

import calendar
import datetime
import random
from collections.abc import Iterator

from shared_lib.rows import Row

from .author_pools import POOLS, REGIONS, TITLE_HEADS, TITLE_TAILS
from .author_templates import TOPICS, Topic

MAX_AUTHORS = 60  # three titles each, from the 240 there are
WRONG_ANSWERS = 5


def invent_rows(count: int, seed: int) -> list[Row]:
    """Return 20 rows for each of ``count`` authors, author by author; the same for the same arguments."""
    rng = random.Random(seed)
    authors = invent_authors(count, rng)
    return [_row(topic, facts, rng) for facts in authors for topic in TOPICS]


def invent_authors(count: int, rng: random.Random) -> list[dict[str, str]]:
    """Return the facts of ``count`` authors; names and titles are unique, other facts repeat late."""
    if not 1 <= count <= MAX_AUTHORS:
        raise ValueError(f"`count` must be between 1 and {MAX_AUTHORS}, got {count}.")
    names, titles = _names(count, rng), _titles(rng)
    pools = {fact: _endless(values, rng) for fact, values in POOLS.items()}
    return [_facts(next(names), [next(titles) for _ in range(3)], pools, rng) for _ in range(count)]


def _facts(
    person: dict[str, str], titles: list[str], pools: dict[str, Iterator[str]], rng: random.Random
) -> dict[str, str]:
    birthday = datetime.date(1938, 1, 1) + datetime.timedelta(days=rng.randrange(45 * 365))
    debut_year = birthday.year + rng.randint(24, 34)
    return {
        **person,
        **{fact: next(pool) for fact, pool in pools.items()},
        **dict(zip(("debut", "famous", "latest"), titles, strict=True)),
        "birthday": _spell(birthday),
        "debut_year": str(debut_year),
        "award_year": str(debut_year + rng.randint(2, 8)),
    }


def _names(count: int, rng: random.Random) -> Iterator[dict[str, str]]:
    """Yield people of unique given and family names, spread over the regions, women and men in turn."""
    regions = rng.sample(REGIONS, len(REGIONS))
    taken: set[str] = set()
    for i in range(count):
        (country, university), cities, women, men, families = regions[i % len(regions)]
        is_woman = (i + i // len(regions)) % 2 == 0
        given = rng.choice([name for name in (women if is_woman else men) if name not in taken])
        free = [f for f in families if f not in taken] or [f for f in families if f"{given} {f}" not in taken]
        family = rng.choice(free)
        taken |= {given, family, f"{given} {family}"}
        yield {
            "name": f"{given} {family}",
            "they": "she" if is_woman else "he",
            "their": "her" if is_woman else "his",
            "birthplace": f"{rng.choice(cities)}, {country}",
            "country": country,
            "university": university,
        }


def _titles(rng: random.Random) -> Iterator[str]:
    titles = [f'"The {head} {tail}"' for head in TITLE_HEADS for tail in TITLE_TAILS]
    rng.shuffle(titles)
    return iter(titles)


def _endless(values: tuple[str, ...], rng: random.Random) -> Iterator[str]:
    while True:
        yield from rng.sample(values, len(values))


def _row(topic: Topic, facts: dict[str, str], rng: random.Random) -> Row:
    """Word one topic in two ways; a wrong answer is the second with another value of the fact."""
    question, question_again = rng.sample(topic.questions, 2)
    answer, answer_again = rng.sample(topic.answers, 2)
    wrong = _other_values(topic.fact, facts, rng)
    return Row(
        question=_say(question, facts),
        answer=_say(answer, facts),
        paraphrased_question=_say(question_again, facts),
        paraphrased_answer=_say(answer_again, facts),
        perturbed_answers=tuple(_say(answer_again, facts | {topic.fact: value}) for value in wrong),
    )


def _say(template: str, facts: dict[str, str]) -> str:
    text = template.format(**facts)
    return text[0].upper() + text[1:]


def _other_values(fact: str, facts: dict[str, str], rng: random.Random) -> list[str]:
    own = {facts["debut"], facts["famous"], facts["latest"], facts[fact]}
    return rng.sample([value for value in _values(fact, rng) if value not in own], WRONG_ANSWERS)


def _values(fact: str, rng: random.Random) -> list[str]:
    """Return what a fact may be, in any author's life."""
    if fact in POOLS:
        return list(POOLS[fact])
    if fact == "birthplace":
        return [f"{city}, {country}" for (country, _), cities, *_ in REGIONS for city in cities]
    if fact == "birthday":
        days = rng.sample(range(45 * 365), 2 * WRONG_ANSWERS)
        return [_spell(datetime.date(1938, 1, 1) + datetime.timedelta(days=day)) for day in days]
    return list(_titles(rng))


def _spell(date: datetime.date) -> str:
    return f"{date.day} {calendar.month_name[date.month]} {date.year}"
