"""Unlearning for real: a Llama of about 100M parameters learns TOFU on the spot and forgets a tenth of its authors.

Target and retrained model, tuning on one seed, three held-out seeds, all of them by benchmarks/unlearning; the table is
that of ``make bench-unlearning``. Rules and metrics are those that BLUR offers when this runs.
"""

import inspect
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import unlearning  # noqa: F401  (puts the examples' shared_lib on the path)
from rich.progress import Progress
from unlearning.methods import COMBINATIONS
from unlearning.presets import preset
from unlearning.report.load import load
from unlearning.report.markdown import table_text
from unlearning.report.records import portable
from unlearning.report.summary import summarize
from unlearning.report.tables import all_tables
from unlearning.settings import Learning, Settings

from blur_optim import BLUR

from .context import Context, Sheet

LOSSES = "npo+nll"
#: Of the table, beside every combination that measures in another metric than the Euclidean.
COMBINED = ("weighted_sum", "blur", "normalized")
#: The paper unlearns for 10 epochs of forget10.
EPOCHS, ROWS, BATCH = 10, 400, 32
#: Before the stage's end, the table of what is there is written.
SPARE = 12.0


def run(context: Context, sheet: Sheet) -> None:
    settings = quick_settings(context) if context.quick else full_settings(context)
    sheet.note(
        f"{settings.data or 'Invented authors'}, {settings.subset}; {settings.model}; {settings.steps} steps of "
        f"{settings.batch_size} rows of each loss; seeds {', '.join(map(str, settings.seeds))}."
    )
    sheet.note("ROUGE is left out: no answers are generated here.")
    if "metric" in inspect.signature(BLUR).parameters and not other_metrics():
        sheet.note("BLUR takes `metric`, and no combination of benchmarks/unlearning uses it: it is not measured here.")
    # In a process that can be ended, so that the table of what is finished is still written.
    cache = context.work / f"unlearning-{'quick' if context.quick else 'full'}"
    worker = multiprocessing.get_context("spawn").Process(
        target=work, args=(settings, cache, 1 if context.quick else 4), daemon=False
    )
    worker.start()
    worker.join(max(1.0, context.seconds_left - SPARE))
    unfinished = worker.is_alive()
    if unfinished:
        sheet.note("Not finished in its time: the table is of what was.")
        worker.kill()
        worker.join()
    found = show(settings, cache, sheet)
    if not unfinished and worker.exitcode:
        raise SystemExit(f"error: the run exits with {worker.exitcode}")
    if unfinished and not found:
        raise SystemExit("error: no time: not one method was unlearned with")


def other_metrics() -> list[str]:
    """The combinations in which BLUR's own rule measures in another metric; at most two."""
    found = [
        name
        for name, options in COMBINATIONS.items()
        if options.get("metric", "euclidean") != "euclidean" and options.get("rule") == "blur"
    ]
    return sorted(found, key=lambda name: len(COMBINATIONS[name]))[:2]


def full_settings(context: Context) -> Settings:
    return replace(
        preset("tofu", "full"),
        name="gpu-forget10",
        data=str(context.data / "tofu") if context.data else "",
        model="100m",
        learning=Learning(lr=5e-4, epochs=12, batch_size=32, known=0.95),
        methods=tuple(f"{LOSSES}/{name}" for name in (*COMBINED, *other_metrics())),
        batch_size=BATCH,
        steps=EPOCHS * ROWS // BATCH,
        looks=2,
        generated_rows=0,
        relearning_steps=0,
        lrs=(1e-4,),
        tuning_weights=(1.0, 0.3, 0.1),
        weights=(),
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
        methods=tuple(f"{LOSSES}/{name}" for name in (*COMBINED[:2], *other_metrics()[:1])),
        batch_size=8,
        steps=2,
        looks=1,
        look_rows=4,
        judged_rows=4,
        tuning_weights=(1.0,),
        seeds=(1,),
        threads=1,
    )


def work(settings: Settings, cache: Path, processes: int) -> None:
    """Do everything that is not done; in a process of its own."""
    from unlearning.stages import run_setting

    # TF32 in the matrix products: this is about unlearning, and float32's last digits are not.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "1"
    with Progress(disable=True) as progress:
        run_setting(settings, cache, processes, "python benchmarks/gpu_bench.py --stages unlearn", progress)


def show(settings: Settings, cache: Path, sheet: Sheet) -> bool:
    """Write the tables of as much as there is; whether there is any."""
    from unlearning.jobs import setting_folder

    folder = setting_folder(cache, settings)
    timings(folder, sheet)
    if not (folder / "settings.json").is_file():
        return False
    loaded = load(folder)
    summary = summarize(replace(loaded, values=portable(loaded.values)))
    groups = all_tables(summary)
    tables = [table for name in ("selected", "equal retain", "gradients") for table in groups[name]]
    for table in tables:
        sheet.text(table_text(table, titled=True))
    return True


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
