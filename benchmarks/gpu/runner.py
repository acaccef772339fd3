"""Runs stages, each in a process of its own with a time limit, and writes the report anew after each."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from blur_optim.kernels.native import LIBRARY_VARIABLE

from .context import ROOT, Context
from .report import write_report
from .stages import CPU_PATIENCE, Stage

#: A stage that could not even load what it needs in so many seconds is not started.
WORTHWHILE = 10.0
#: Of a stage's log, from its beginning and its end: no file that comes out may be large.
LOG_BYTES = 400_000
ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exception|Exit|Interrupt|Exited)\b.*|Segmentation fault.*|Killed.*|error:.*)$")


def run_stages(stages: Sequence[Stage], context: Context, out: Path, minutes: float, machine: dict[str, str]) -> bool:
    """Run the stages until the time is up; True where all went well.

    Args:
        machine: what the report says of device and versions.
    """
    end = time.time() + 60 * minutes
    results: dict[str, Any] = {}
    fits = sum(stage.least for stage in stages) <= minutes + 1e-9
    for i, stage in enumerate(stages):
        patience = CPU_PATIENCE if context.device == "cpu" else 1.0
        kept = 60 * sum(later.least for later in stages[i + 1 :]) if fits else 0.0
        seconds = min(60 * stage.minutes * patience, end - time.time() - kept)
        if seconds < WORTHWHILE:
            results[stage.name] = {"status": "not started: no time left", "seconds": 0.0, "what": stage.what}
        else:
            print(f"{stage.name}: at most {seconds:.0f} s", flush=True)
            results[stage.name] = run_stage(stage, replace(context, deadline=time.time() + seconds), seconds)
        result = results[stage.name]
        print(f"{stage.name}: {result['status']} in {result['seconds']:.1f} s", flush=True)
        write(out, context, stage, results, machine)
    return all(result["status"] == "done" for result in results.values())


def run_stage(stage: Stage, context: Context, seconds: float) -> dict[str, Any]:
    """Run one stage to its end, or end it."""
    sheet, log = context.work / f"{stage.name}.json", context.work / f"{stage.name}.log"
    sheet.unlink(missing_ok=True)
    command = [sys.executable, "-u", str(ROOT / "benchmarks/gpu_bench.py"), "--stage", stage.name, context.to_json()]
    start = time.time()
    with log.open("wb") as file:
        # A session of its own, so that what a stage has started ends with it.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment(context), start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
            status = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"ended after its {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = json.loads(sheet.read_text()) if sheet.is_file() else {}
    result = {"status": status, "seconds": time.time() - start, "what": stage.what, **found}
    if status != "done":
        result["error"] = first_error(log.read_text(errors="replace"))
    return result


def environment(context: Context) -> dict[str, str]:
    """This checkout's package with the extension that was built for it; nothing that is installed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    more = {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(context.work / "triton"), "HF_HUB_OFFLINE": "1"}
    if context.device == "cpu":  # Toys: a second thread is only in the way.
        more |= {"OMP_NUM_THREADS": "1"}
    if context.library.is_file():
        more[LIBRARY_VARIABLE] = str(context.library)
    return os.environ | more


def first_error(log: str) -> str:
    """The line that names what went wrong first, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if ERROR.match(line)), lines[-1] if lines else "no output")[:300]


def write(out: Path, context: Context, stage: Stage, results: dict[str, Any], machine: dict[str, str]) -> None:
    """Write what came of a stage, and the report on all so far."""
    log = context.work / f"{stage.name}.log"
    if log.is_file():
        with (out / "log.txt").open("ab") as file:
            file.write(f"\n===== {stage.name}: {results[stage.name]['status']} =====\n".encode() + shortened(log))
    if stage.csv:
        write_csv(out / f"{stage.name}.csv", results[stage.name].get("records", []))
    (out / "results.json").write_text(json.dumps({"machine": machine, "stages": results}, indent=1))
    write_report(out / "report.md", results, machine, context)


def shortened(log: Path) -> bytes:
    text = log.read_bytes()
    if len(text) <= LOG_BYTES:
        return text
    return text[: LOG_BYTES // 2] + b"\n[...]\n" + text[-LOG_BYTES // 2 :]


def write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for record in records for name in record))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(records)
