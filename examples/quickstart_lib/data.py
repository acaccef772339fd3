"""The authors of the story: invented, or from elsewhere."""

from shared_lib.errors import InputError
from shared_lib.records import read_rows
from shared_lib.rows import MIN_AUTHORS, ROWS_PER_AUTHOR, Row

from .authors import MAX_AUTHORS, invent_rows


def load_rows(source: str | None, authors: int, seed: int) -> list[Row]:
    """Return 20 rows for each of the last ``authors`` authors of ``source``, or of invented authors for None.

    Args:
        source: a folder with full.json (and, for the truth ratio, forget*_perturbed.json and
            retain_perturbed.json), one JSON-lines file, or a data set of the hub with the same parts.
        authors: how many authors; a source with fewer gives all it has.
        seed: of the invented authors.
    Raises:
        InputError: a file is missing, or a row is not as it should be; names the file and the line.
    """
    if source is None:
        if authors > MAX_AUTHORS:
            raise InputError(f"--authors must be at most {MAX_AUTHORS} for the embedded data, got {authors}.")
        return invent_rows(authors, seed)
    rows = read_rows(source)
    if len(rows) % ROWS_PER_AUTHOR or len(rows) < MIN_AUTHORS * ROWS_PER_AUTHOR:
        raise InputError(
            f"{source}: the number of rows must be a multiple of {ROWS_PER_AUTHOR} (consecutive rows of one "
            f"author) for at least {MIN_AUTHORS} authors, got {len(rows)} rows."
        )
    return rows[-authors * ROWS_PER_AUTHOR :]
