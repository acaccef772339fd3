"""Peak memory of a training step by method and stash: memory_bench, on CUDA by the allocator's statistics."""

import gc
import importlib.util
from dataclasses import asdict

import torch
from memory_bench import check, measure, rows_of
from memory_methods import BASELINE, METHODS, METRIC, settings_of
from memory_tracker import GRADIENTS, REST, STASH

from .context import Context, Sheet

#: What a method needs beside torch and transformers.
NEEDS = {"torchjd": "torchjd", "torchjd_lean": "torchjd", "pcgrad": "pytorch_optimizer"}
#: What is worth most, for the time may end.
FIRST = (BASELINE, "reference", METRIC)
QUICK = (*FIRST, "int8", "original")


def run(context: Context, sheet: Sheet) -> None:
    missing = {name: need for name, need in NEEDS.items() if importlib.util.find_spec(need) is None}
    for need in sorted(set(missing.values())):
        sheet.note(f"{', '.join(n for n in missing if missing[n] == need)}: left out, {need} is not installed.")
    names = [name for name in METHODS if name not in missing and (not context.quick or name in QUICK)]
    names.sort(key=lambda name: name not in FIRST)
    # All in this process: CUDA's allocator tells what one step takes, whatever was before.
    settings = settings_of("tiny" if context.quick else "llama-134m", device=context.device)
    peaks = {}
    for name in names:
        if context.seconds_left < 3:
            sheet.note(f"{METHODS[name].title}: left out, no time was left.")
            continue
        peaks[name] = measure(settings, name)
        gc.collect()
        if context.device == "cuda":
            torch.cuda.empty_cache()
        show(peaks, sheet, f"{settings.model}, {settings.dtype}, {settings.batch} x {settings.length} tokens")
        print(name, flush=True)
    errors = check(settings, [name for name in names if name in peaks])
    sheet.record([asdict(row) for row in rows_of(settings, peaks, {}, errors)])
    sheet.table(
        "Distance of the update from BLUR's, relative to its norm", [{METHODS[n].title: e for n, e in errors.items()}]
    )


def show(peaks: dict, sheet: Sheet, title: str) -> None:
    rows = [
        {
            "method": METHODS[name].title,
            "peak": peak.above_state,
            "above the weighted sum": peak.above_state - peaks[BASELINE].above_state,
            "by the allocator": None if peak.process is None else peak.process / peak.unit,
            **{part: peak.at_peak[part] / peak.unit for part in (GRADIENTS, STASH, REST)},
        }
        for name, peak in peaks.items()
    ]
    sheet.table(f"In gradient sets, above parameters and optimizer state: {title}", rows)
