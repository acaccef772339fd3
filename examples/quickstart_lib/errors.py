"""How a run ends: one clear line on stderr and an exit code, never a traceback."""

import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import parent_process
from types import FrameType

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


class InputError(Exception):
    """The user gave something that cannot be used: an option, a file, a row."""


class TrainingError(Exception):
    """A training process ended without a model."""


def leave_quietly_while_importing() -> None:
    """Meet Ctrl-C during the slow imports with a line. A training process leaves Ctrl-C to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN if parent_process() else _leave)


def _leave(signum: int, frame: FrameType | None) -> None:
    print("\nInterrupted before anything was begun.", file=sys.stderr)
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def run(main: Callable[[], None]) -> int:
    """Call ``main`` and return the exit code: 0, 1 (failed), 2 (bad input) or 130 (Ctrl-C)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        return _say("Interrupted. Finished models are kept; nothing is left half-written.", INTERRUPTED)
    except InputError as error:
        return _say(f"Error: {error}", BAD_INPUT)
    except TrainingError as error:
        return _say(f"Error: {error}", FAILED)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _say(f"Error: {error.strerror or error}{where}. Nothing is left half-written.", FAILED)
    return 0


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
