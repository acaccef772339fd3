"""One process, or several under ``accelerate launch`` or ``torchrun``: who speaks, and how a run ends."""

import os
import signal
import time
from collections.abc import Callable

from shared_lib import errors
from shared_lib.errors import InputError


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run(main: Callable[[], None]) -> int:
    """Call ``main`` and return the exit code. An error in the input is everybody's, and the first process tells it."""
    code = errors.run(lambda: _let_the_first_speak(main))
    return code if count() == 1 else _part(code)


def _let_the_first_speak(main: Callable[[], None]) -> None:
    try:
        main()
    except (InputError, SystemExit):
        if rank():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(2)  # When the first has ended, the launcher ends this one.
        raise


def _part(code: int) -> int:
    import torch.distributed as dist
    from shared_lib.parting import part

    return part(code) if dist.is_initialized() else code
