"""Train several models side by side, a process each, with a progress bar each."""

import json
import os
import queue
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.progress import Progress

from .errors import TrainingError, ctrl_c_deferred
from .models import save_small_llama
from .rows import Row
from .training import Recipe, cache_key, learn_and_save

SMALL_LLAMA_START = "the small Llama"


@dataclass(frozen=True)
class Pupil:
    """A model to be: a title for its progress bar, and the rows that it is to know."""

    title: str
    rows: Sequence[Row]


def learn_models(
    pupils: Mapping[str, Pupil],
    start: str | None,
    all_rows: Sequence[Row],
    recipe: Recipe,
    out: Path,
    progress: Progress,
) -> dict[str, Path]:
    """Return each pupil's folder with its trained model, from the cache or trained now, side by side.

    Args:
        start: a causal LM to begin with; None for the small Llama, whose tokenizer is trained on ``all_rows``.
        out: where the models are kept. One that isn't finished leaves nothing there.
    Raises:
        TrainingError: a process failed; its reason is in the message.
    """
    homes = {
        name: out / f"{name}-{cache_key(start or SMALL_LLAMA_START, [*all_rows, *pupil.rows], recipe)}"
        for name, pupil in pupils.items()
    }
    missing = {name: pupil for name, pupil in pupils.items() if not homes[name].is_dir()}
    if missing:
        with _scratch_folder(out) as scratch:
            if start is None:
                save_small_llama(scratch / "start", all_rows, recipe.seed)
            _learn_side_by_side(missing, start or str(scratch / "start"), recipe, scratch, homes, progress)
    return homes


@contextmanager
def _scratch_folder(out: Path) -> Iterator[Path]:
    """Make a folder beside the kept models, on the same file system, and remove it whatever happens."""
    out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=out))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _learn_side_by_side(
    pupils: Mapping[str, Pupil],
    start: str,
    recipe: Recipe,
    scratch: Path,
    homes: Mapping[str, Path],
    progress: Progress,
) -> None:
    context = get_context("spawn")  # A forked process would inherit torch's thread pool in an unusable state.
    messages = context.Queue()
    bars = {name: progress.add_task(pupil.title, total=recipe.max_epochs, note="") for name, pupil in pupils.items()}
    processes = {
        name: context.Process(target=_learn, args=(name, start, recipe, scratch, messages), daemon=True)
        for name in pupils
    }
    for name, pupil in pupils.items():
        # By file: what goes through the pipe must fit it, or each process would start only when the last has imported.
        _rows_file(scratch, name).write_text(json.dumps(pupil.rows))
    try:
        with ctrl_c_deferred():
            for process in processes.values():
                process.start()
        for name, event, value in _events(messages, processes):
            if event == "failed":
                raise TrainingError(f"{pupils[name].title}: training failed: {value}")
            if event == "epoch":
                progress.update(bars[name], completed=value[0], note=f"knows {value[1]:4.0%}")
            else:
                _move(scratch / name, homes[name])
                progress.update(bars[name], total=progress.tasks[bars[name]].completed)
    finally:
        for process in processes.values():
            if process.is_alive():
                process.terminate()
                process.join()


def _move(folder: Path, home: Path) -> None:
    try:
        os.replace(folder, home)
    except OSError:
        if not home.is_dir():  # Another run, beside this one, may have made the same model meanwhile.
            raise


def _rows_file(scratch: Path, name: str) -> Path:
    return scratch / f"{name}.json"


def _learn(name: str, start: str, recipe: Recipe, scratch: Path, messages: Any) -> None:
    """Run in a process of its own, and send what happens."""
    try:
        rows = [Row(*fields) for fields in json.loads(_rows_file(scratch, name).read_text())]
        (scratch / name).mkdir()
        learn_and_save(start, rows, recipe, scratch / name, lambda *epoch: messages.put((name, "epoch", epoch)))
        messages.put((name, "finished", None))
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        messages.put((name, "failed", f"{type(error).__name__}: {reason[0]}"))


def _events(messages: Any, processes: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield what the processes send until all have finished."""
    open_names = set(processes)
    while open_names:
        try:
            name, event, value = messages.get(timeout=0.5)
        except queue.Empty:
            dead = [name for name in open_names if processes[name].exitcode not in (None, 0)]
            if dead:
                code = processes[dead[0]].exitcode
                yield dead[0], "failed", f"the process ended with code {code} (killed? out of memory?)"
            continue
        if event == "finished":
            open_names.discard(name)
        yield name, event, value
