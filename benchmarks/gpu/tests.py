"""``pytest -m gpu``, a process for each file: a kernel that faults takes its process's CUDA with it, and no other.

Each test's line is read as it comes, so that what ends the stage does not end what passed.
"""

import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .context import ROOT, Context, Sheet

LINE = re.compile(r"^(\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED)(?: \((.*?)\))?(?:\s|$)")
WHY = re.compile(r"^(?:FAILED|ERROR) (\S+::.*?) - (.*)")


#: What a rehearsal leaves out: what is slow on a CPU.
SLOW = "large or 10000 or whole_step or every_run"


def run(context: Context, sheet: Sheet) -> None:
    tally = Tally(sheet)
    files = sorted((ROOT / "tests/gpu").glob("test_*.py"))
    # Side by side where there are cores: most of the time Triton compiles. A rehearsal is one process.
    groups = [files] if context.quick else [[file] for file in files]
    threads = [threading.Thread(target=run_files, args=(group, context, tally)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for reason, count in tally.reasons.most_common(8):
        sheet.note(f"{count} skipped: {reason}")
    if tally.codes.keys() - {0}:
        raise SystemExit(f"error: pytest exits with {sorted(tally.codes)}")


class Tally:
    """What came of the tests of all files."""

    def __init__(self, sheet: Sheet) -> None:
        self.sheet, self.lock = sheet, threading.Lock()
        self.counts: dict[str, Counter[str]] = {}
        self.reasons: Counter[str] = Counter()
        self.codes: Counter[int] = Counter()
        self.failed: dict[str, str] = {}

    def read(self, line: str) -> None:
        """Take in a line of pytest's output."""
        if found := LINE.match(line):
            test, outcome, reason = found.groups()
            self.counts.setdefault(Path(test.partition("::")[0]).stem, Counter())[outcome.lower()] += 1
            if outcome == "SKIPPED" and reason:
                self.reasons[reason] += 1
            if outcome in ("FAILED", "ERROR"):
                self.failed[test] = ""
        elif (found := WHY.match(line)) and found[1] in self.failed:
            self.failed[found[1]] = found[2][:200]
        else:
            return
        self.sheet.table("Tests", [{"file": name, **counts} for name, counts in sorted(self.counts.items())])
        if self.failed:
            rows = [{"test": test, "why": why} for test, why in self.failed.items()]
            self.sheet.table("Not passed", rows[:40])


def run_files(files: Sequence[Path], context: Context, tally: Tally) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--durations=5", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), *map(str, files)]
    command += ["-k", f"not ({SLOW})"] if context.quick else []
    environment = os.environ | {"COLUMNS": "400", "BLUR_OPTIM_GPU_TEST_DEVICE": context.device}
    # Elsewhere than in the checkout: `python -m` puts its folder first on the path, and with it whatever lies there.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=context.work, env=environment
    )
    assert process.stdout is not None
    for line in process.stdout:
        with tally.lock:
            print(line, end="", flush=True)
            tally.read(line)
    code = process.wait()
    with tally.lock:
        tally.codes[code] += 1
