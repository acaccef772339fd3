"""How a run ends: one clear line on stderr and an exit code, never a traceback."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


class InputError(Exception):
    """The user gave something that cannot be used: an option, a file, a row."""


def is_path(source: str) -> bool:
    """Tell a path from a name on the Hugging Face hub, which has the form owner/name."""
    return source.count("/") != 1 or source.startswith((".", "/", "~")) or bool(Path(source).suffix)


class TrainingError(Exception):
    """A training process ended without a model."""


def leave_quietly_while_importing() -> None:
    """Meet Ctrl-C during the slow imports with a line."""
    signal.signal(signal.SIGINT, _leave)


@contextmanager
def ctrl_c_deferred() -> Iterator[None]:
    """Let Ctrl-C wait. Processes begun meanwhile never see it: they leave it to their parent."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _leave(signum: int, frame: FrameType | None) -> None:
    print("\nInterrupted before anything was begun.", file=sys.stderr)
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def run(main: Callable[[], None]) -> int:
    """Call ``main`` and return the exit code: 0, 1 (failed), 2 (bad input) or 130 (Ctrl-C, SIGTERM)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
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
