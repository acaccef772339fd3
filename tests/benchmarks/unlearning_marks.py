"""What worker processes do in the tests of ``unlearning.jobs``; without torch, which they would have to import."""

import os
import time
from pathlib import Path


def leave_a_mark(folder: str, number: int) -> int:
    (Path(folder) / str(number)).write_text(str(os.getpid()))
    return number


def leave_a_mark_slowly(folder: str, number: int) -> int:
    time.sleep(0.2)
    return leave_a_mark(folder, number)


def leave_a_mark_or_fail(folder: str, number: int) -> int:
    if number == 1:
        raise OSError("number 1 cannot")
    return leave_a_mark_slowly(folder, number)
