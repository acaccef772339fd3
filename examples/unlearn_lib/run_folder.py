"""The folder of a run: what tells this run from another, how far it came, and what may be deleted."""

import json
import os
import shutil
from datetime import date
from pathlib import Path
from typing import Any

from shared_lib.errors import InputError

RUN, RESULTS, LOG = "run.json", "results.json", "log.jsonl"
MODEL, TRAINING, BEFORE = "model", "training", "before.json"
TRAINER_STATE = "trainer_state.json"


class RunFolder:
    """The folder that --out names.

    Args:
        facts: JSON that is the same for every start of one run: settings, data, number of processes, its first day.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, json.loads(json.dumps(facts))
        self.model, self.training = path / MODEL, path / TRAINING
        self.results, self.log, self.before = path / RESULTS, path / LOG, path / TRAINING / BEFORE

    def check(self, overwrite: bool) -> None:
        """See that the folder is this run's, or empty, or may be emptied.

        Raises:
            InputError: it is another's.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out: {self.path} must be a folder, and is a file.")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        earlier = self._earlier()
        if earlier is None:
            raise InputError(
                f"--out: {self.path} must be empty or hold a run of this script, and does not. Give another."
            )
        different = _differences(earlier, self.facts)
        if different and not overwrite:
            raise InputError(
                f"--out: {self.path} holds a run with other settings: {'; '.join(different)}. Give those, another "
                "--out, or --overwrite, which deletes that run."
            )

    @property
    def is_finished(self) -> bool:
        """Return whether all has been done and written."""
        return self.results.is_file()

    def claim(self, overwrite: bool) -> None:
        """Make the folder this run's; with ``overwrite``, empty it first of what this script has written."""
        if overwrite and self.path.is_dir():
            self.results.unlink(missing_ok=True)  # First, for it says that the run is finished.
            for name in (MODEL, f".unfinished-{MODEL}", TRAINING):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in (LOG, RUN):  # RUN last: what is left at any time is a run, or nothing.
                (self.path / name).unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / RUN).is_file():
            write_json(self.path / RUN, self.facts)
        self.training.mkdir(exist_ok=True)

    def release(self) -> None:
        """Give the folder up again, if no training has begun in it: the command may be given with other options."""
        if self.log.exists() or self.is_finished or not (self.path / RUN).is_file():
            return
        shutil.rmtree(self.training, ignore_errors=True)
        (self.path / RUN).unlink()
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def checkpoint(self) -> Path | None:
        """Return the last checkpoint that was written to its end."""
        found = [path for path in self.training.glob("checkpoint-*") if _is_whole(path)]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def drop_checkpoints(self) -> None:
        """Delete what only serves to go on."""
        shutil.rmtree(self.training, ignore_errors=True)

    def _earlier(self) -> dict[str, Any] | None:
        try:
            earlier = json.loads((self.path / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        is_ours = isinstance(earlier, dict) and earlier.keys() >= self.facts.keys()
        return earlier if is_ours else None


def first_day(path: Path) -> date:
    """Return the day on which the run in a folder was begun; today where there is none.

    A chat template may print the date, and a run goes on with the prompts that it began with.
    """
    try:
        return date.fromisoformat(json.loads((path / RUN).read_text(encoding="utf-8"))["day"])
    except (OSError, ValueError, TypeError, KeyError):
        return date.today()


def write_json(path: Path, content: Any) -> None:
    """Write JSON that appears under its name only when it is whole."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _is_whole(checkpoint: Path) -> bool:
    # The Trainer writes its state last.
    try:
        json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Tell what is not as it was, in terms of options. One that the earlier run did not know yet was not given then."""
    before = {n: earlier["settings"].get(n, None if value else value) for n, value in now["settings"].items()}
    found = [
        f"{_option(name)} was {before[name]!r}, now {value!r}"
        for name, value in now["settings"].items()
        if before[name] != value
    ]
    found += [
        f"the rows of {option} have changed"
        for option, facts in now["data"].items()
        if earlier["data"].get(option, facts)["sha256"] != facts["sha256"]
        and earlier["data"][option]["source"] == facts["source"]
    ]
    found += [
        f"the rows of {option} are the same and their tokens are not (another tokenizer, chat template or version of "
        "transformers?)"
        for option, facts in now["data"].items()
        if (before := earlier["data"].get(option, facts))["sha256"] == facts["sha256"]
        and before.get("tokens_sha256") != facts.get("tokens_sha256")
        and _encodes_alike(earlier["settings"], now["settings"])
    ]
    if earlier["processes"] != now["processes"]:
        found.append(f"it had {earlier['processes']} processes, now {now['processes']}")
    return found


def _encodes_alike(earlier: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether no setting has changed that is told of already and changes tokens."""
    return all(earlier.get(name) == now.get(name) for name in ("model", "max_length", "plain_questions", "method"))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
