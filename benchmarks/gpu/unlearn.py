"""Unlearning for real: a Llama of about 100M parameters learns half of TOFU on the spot and forgets a tenth of that.

Target and retrained model, tuning on one seed, three held-out seeds, all of them by benchmarks/unlearning; the table is
that of ``make bench-unlearning``.

What two minutes hold is counted and not measured. A step on 2 x 32 rows is 5600 tokens with padding, 31 ms at 180,000
tokens/s forward and backward, which is 100 TFLOPS of an H100 in TF32. A run of 62 steps with ten looks is 2.4 s, the
training of both models half a minute (12 of at most 20 epochs), and starting processes twenty seconds: so the ``FIRST``
methods, 14 runs, are there after 90 s of the 108 s that there are at most, and all, 28 runs, after 130 s. All of TOFU,
with twice the rows and the steps, would take 150 s for the first alone.
"""

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import unlearning  # noqa: F401  (puts the examples' shared_lib on the path)
from rich.progress import Progress
from unlearning.presets import preset
from unlearning.report.load import load
from unlearning.report.markdown import table_text
from unlearning.report.records import portable
from unlearning.report.summary import Summary, summarize
from unlearning.report.tables import all_tables
from unlearning.settings import Learning, Settings

from .context import Context, Sheet

LOSSES = "npo+nll"
#: What is worth most comes first: the table of ``FIRST`` is there before the others are begun.
FIRST = ("weighted_sum", "blur-metric")
COMBINED = (*FIRST, "normalized", "blur")
#: The paper unlearns for 10 epochs; the rows of ten authors.
EPOCHS, ROWS, BATCH = 10, 200, 32
#: Before the stage's end, the table of what is there is written.
SPARE = 12.0


def run(context: Context, sheet: Sheet) -> None:
    settings = quick_settings(context) if context.quick else full_settings(context)
    sheet.note(
        f"{settings.data or 'Invented authors'}, {settings.subset}; {settings.model}; {settings.steps} steps of "
        f"{settings.batch_size} rows of each loss, {settings.looks} looks; learning rates "
        f"{', '.join(map(str, settings.lrs))}; seeds {', '.join(map(str, settings.seeds))}."
    )
    sheet.note("The benchmark's own scores are left out, and with them ROUGE: no answers are generated here.")
    # In a process that can be ended, so that the table of what is finished is still written.
    cache = context.work / f"unlearning-{'quick' if context.quick else 'full'}"
    worker = multiprocessing.get_context("spawn").Process(
        target=work, args=(settings, cache, 1 if context.quick else 4), daemon=False
    )
    worker.start()
    worker.join(max(1.0, context.seconds_left - SPARE))
    unfinished = worker.is_alive()
    if unfinished:
        worker.kill()
        worker.join()
    found = show(settings, cache, sheet)
    if not unfinished and worker.exitcode:
        raise SystemExit(f"error: the run exits with {worker.exitcode}")
    if unfinished and found is None:
        raise SystemExit("error: no time: not one method was unlearned with; --stages unlearn goes on from here")
    if unfinished and found is not None:
        for method, what in left_out(settings, found).items():
            sheet.note(f"{method}: {what}, no time was left.")


def left_out(settings: Settings, found: Summary) -> dict[str, str]:
    """What of each method is not in the tables."""
    missing = {}
    for method in settings.methods:
        summary = found.by_id.get(method)
        if summary is None or not summary.runs:
            missing[method] = "left out"
        elif summary.missing:
            missing[method] = f"{len(summary.missing)} of {len(summary.expected)} runs left out"
    return missing


def full_settings(context: Context) -> Settings:
    return replace(
        preset("tofu", "full"),
        name="gpu-forget05",
        data=str(context.data / "tofu") if context.data else "",
        subset="forget05",
        authors=100 if context.data else 0,  # Not so many are invented: all there are.
        model="100m",
        learning=Learning(lr=5e-4, epochs=20, batch_size=32, known=0.95),
        methods=tuple(f"{LOSSES}/{name}" for name in COMBINED),
        batch_size=BATCH,
        steps=EPOCHS * ROWS // BATCH,
        looks=10,
        tuned_at=(0.98, 0.95, 0.9),
        generated_rows=0,
        relearning_steps=0,
        lrs=(3e-4, 1e-4),
        tuning_weights=(1.0, 0.3),
        weights=(),
        unit_scale=1.0,
        judged_seeds=(0,),  # No run: of the benchmark's own scores there is no table here.
        device=context.device,
        threads=2,
    )


def quick_settings(context: Context) -> Settings:
    return replace(
        full_settings(context),
        name="gpu-quick",
        data="",
        subset="forget01",
        authors=4,
        model="0.8m",
        learning=Learning(lr=3e-3, epochs=2, batch_size=16, known=0.001),
        batch_size=8,
        steps=2,
        looks=1,
        look_rows=4,
        judged_rows=4,
        tuning_weights=(1.0,),
        seeds=(1,),
        threads=1,
    )


def parts(settings: Settings) -> tuple[Settings, ...]:
    """The first methods, then all of them: what is done is found by those that come after."""
    return replace(settings, methods=settings.methods[: len(FIRST)]), settings


def work(settings: Settings, cache: Path, processes: int) -> None:
    """Do everything that is not done; in a process of its own."""
    from unlearning.stages import run_setting

    # TF32 in the matrix products: this is about unlearning, and float32's last digits are not.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "1"
    with Progress(disable=True) as progress:
        for part in parts(settings):
            run_setting(part, cache, processes, "python benchmarks/gpu_bench.py --stages unlearn", progress)


def show(settings: Settings, cache: Path, sheet: Sheet) -> Summary | None:
    """Write the tables of as much as there is; None where there is nothing."""
    from unlearning.jobs import setting_folder

    folder = setting_folder(cache, settings)
    timings(folder, sheet)
    if not (folder / "settings.json").is_file():
        return None
    loaded = load(folder)
    summary = summarize(replace(loaded, values=portable(loaded.values)))
    groups = all_tables(summary)
    tables = [table for name in ("selected", "equal retain", "gradients") for table in groups[name]]
    for table in tables:
        sheet.text(table_text(table, titled=True))
    return summary


def timings(folder: Path, sheet: Sheet) -> None:
    """A line for each run, with its seconds, into the CSV."""
    records: list[dict[str, Any]] = []
    for path in sorted((folder / "runs").glob("*.json")):
        run = json.loads(path.read_text())
        job = {name: run["job"][name] for name in ("stage", "method", "weight", "lr", "seed")}
        final = run["final"] or {}
        probabilities = {kind: final.get(kind, {}).get("probability") for kind in ("forget", "retain", "untouched")}
        records.append(
            job | {f"p_{kind}": value for kind, value in probabilities.items()} | {"seconds": run["seconds"]}
        )
    sheet.record(records)
    if records:
        sheet.note(f"{len(records)} runs, {sum(r['seconds'] for r in records) / len(records):.1f} s each.")
