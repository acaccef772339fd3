"""compute-sanitizer on a native driver of the kernels; without a GPU the same driver on the emulator."""

import re
import subprocess
import sys

from .context import ROOT, Context, Sheet
from .machine import nvidia_program

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
DONE = {True: "the same results in every run", False: "the same results under every schedule"}


def run(context: Context, sheet: Sheet) -> None:
    if context.device != "cuda":
        emulated(context, sheet)
        return
    program = nvidia_program("compute-sanitizer")
    if program is None:
        sheet.note("Left out: compute-sanitizer was not found on the PATH or in the CUDA toolkit's folders.")
        return
    if not context.driver.is_file():
        raise SystemExit("error: the stage `build` has left no driver")
    rows = []
    for tool in TOOLS:
        if context.seconds_left < 5:
            sheet.note(f"{tool} was not started: no time left.")
            continue
        command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", str(context.driver)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=context.seconds_left - 2)
        except subprocess.TimeoutExpired:
            rows.append({"tool": tool, "came to": "took too long"})
        else:
            print(done.stdout + done.stderr)
            rows.append({"tool": tool} | verdict(done))
        sheet.table("compute-sanitizer", rows)
    if not all(row["came to"] == "clean" for row in rows):
        raise SystemExit("error: not every tool of compute-sanitizer came to a clean end, see the table and the log")


def verdict(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What a tool found; one that cannot work on this machine has found nothing, and says so at best."""
    summary = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)", done.stdout)
    if done.returncode == 0 and DONE[True] in done.stdout:
        came_to = "clean"
    elif DONE[True] in done.stdout or done.returncode == 9:
        came_to = "FOUND"
    else:
        came_to = f"the driver did not end: exit code {done.returncode}"
        summary = summary or [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][:1]
    return {"came to": came_to, "summary": "; ".join(summary)}


def emulated(context: Context, sheet: Sheet) -> None:
    """The driver by g++ on the emulator of the tests, which has no GPU's memory model: a rehearsal."""
    sys.path.insert(0, str(ROOT / "tests/kernels/cuda"))
    import _pytest.outcomes
    from cuda_toolchain import CSRC, HERE, emulated_object, linked

    small = ["-O0", "-DBLUR_OPTIM_CUDA_BLOCK=64", "-DBLUR_OPTIM_CUDA_CHUNK=1024"]
    sources = [HERE / "driver.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]
    folder = context.work / "emulated"
    try:
        objects = [emulated_object(folder / f"{source.stem}.o", source, *small) for source in sources]
    except _pytest.outcomes.Skipped as reason:
        sheet.note(f"Left out: {reason}.")
        return
    driver = linked(folder / "driver", *objects)
    done = subprocess.run([driver], capture_output=True, text=True)
    print(done.stdout + done.stderr)
    sheet.table("The driver on the emulator", [{"came to": done.stdout.strip() or done.stderr.strip()}])
    if done.returncode or DONE[False] not in done.stdout:
        raise SystemExit(f"error: the driver exits with {done.returncode}")
