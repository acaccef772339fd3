"""``pytest -m gpu``: each test's line is read as it comes, so that what ends the stage does not end what passed."""

import re
import subprocess
import sys
from collections import Counter

from .context import ROOT, Context, Sheet

LINE = re.compile(r"^(\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)(?: \((.*?)\))?")


def run(context: Context, sheet: Sheet) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "--durations=15"]
    command += ["--tb=short", str(ROOT / "tests/gpu"), "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    # Elsewhere than in the checkout: a `python -m` puts its folder first, and with it whatever lies there.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=context.work)
    counts: Counter[str] = Counter()
    failed: list[dict[str, str]] = []
    reasons: Counter[str] = Counter()
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if found := LINE.match(line):
            test, outcome, reason = found.groups()
            counts[outcome.lower()] += 1
            reasons.update([reason] if outcome == "SKIPPED" and reason else [])
            if outcome in ("FAILED", "ERROR"):
                failed.append({"test": test, "came to": outcome.lower()})
            sheet.table("Tests", [dict(counts)])
        elif found := re.match(r"^(?:FAILED|ERROR) (\S+::\S+(?:\[.*?\])?) - (.*)", line):
            failed = [row | {"why": found[2][:200]} if row["test"].endswith(found[1]) else row for row in failed]
    code = process.wait()
    if failed:
        sheet.table("Not passed", failed)
    for reason, count in reasons.most_common(8):
        sheet.note(f"{count} skipped: {reason}")
    if code:
        raise SystemExit(f"error: pytest exits with {code}")
