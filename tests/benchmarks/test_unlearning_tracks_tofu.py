"""Which rows of TOFU a target learns, forgets and keeps; on invented authors."""

from dataclasses import replace

import pytest
import unlearning  # noqa: F401  (puts shared_lib on the path)
from quickstart_lib.authors import invent_rows
from shared_lib.errors import InputError
from shared_lib.rows import Row
from unlearning.settings import Settings
from unlearning.tracks import tofu
from unlearning.tracks.tofu import TofuData

SETTINGS = Settings("tiny", "short", "tofu", "", "forget01", authors=8)
BLOCKS = replace(SETTINGS, authors=5, blocks=(4, 0), targets=2)


def questions(rows: list[Row]) -> list[str]:
    return [row.question for row in rows]


def test_each_target_has_its_own_block_and_forgets_the_last_authors_of_it() -> None:
    everyone = invent_rows(4 + 5 + 2, seed=0)  # Two more, whom nobody learns.
    for number, first in enumerate(BLOCKS.blocks):
        data = TofuData(BLOCKS, number)
        assert questions(data.forget) == questions(everyone[20 * (first + 3) : 20 * (first + 5)])
        others = questions(data.retain) + questions(data.untouched)
        assert sorted(others) == sorted(questions(everyone[20 * first : 20 * (first + 3)]))
        assert questions(data.holdout) == questions(everyone[-40:])


def test_of_coupled_authors_every_second_row_is_forgotten_and_the_others_are_rehearsed() -> None:
    data, everyone = TofuData(replace(SETTINGS, subset="coupled01")), invent_rows(8 + 4, seed=0)
    coupled = questions(everyone[20 * 4 : 20 * 8])
    assert questions(data.forget) == coupled[1::2]
    assert questions(data.retain)[-40:] == coupled[::2]
    assert not set(questions(data.untouched)) & set(coupled)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subset": "forget50"}, "--subset must be one of forget01, .*coupled05, got 'forget50'"),
        ({"blocks": (4,)}, "one for each target"),
        ({"authors": 0}, "--blocks must come with --authors"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TofuData(replace(BLOCKS, **changes), 1)


def test_a_block_of_authors_that_there_are_not_is_refused() -> None:
    rows = invent_rows(8, seed=0)
    assert len(tofu._block(rows, replace(BLOCKS, blocks=(0, 3)), 1)) == 100
    with pytest.raises(InputError, match="--blocks must be of authors that there are, got 5 from number 4 on"):
        tofu._block(rows, replace(BLOCKS, blocks=(0, 4)), 1)
