"""Compare ways to unlearn, on one machine: train, tune, unlearn with several seeds, and report.

    python benchmarks/unlearning_bench.py --track tofu --data path/to/tofu

What is finished is kept in --cache, so the same command goes on after an interrupt. The report goes to --out.
"""

import argparse
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from unlearning.make_muse import main as make_muse
from unlearning.presets import FORMS, preset
from unlearning.settings import Settings
from unlearning.tracks import TRACKS

# What makes results other than the preset's: their report must not take the place of its.
CHANGES = (
    "subset",
    "model",
    "authors",
    "steps",
    "batch_size",
    "accumulation",
    "looks",
    "warm_up",
    "lora_rank",
    "embeddings",
    "stop",
)
CHANGED_LISTS = ("lrs", "tuning_weights", "blocks")
SOURCES = ("data", "retrained", "gguf_file", "retain_data", "questions", "utility_questions")
FIELDS = (*SOURCES, *CHANGES, "name", "device", "dtype")
LISTS = ("methods", "seeds", *CHANGED_LISTS)
EMBEDDINGS = ("trained", "frozen", "only")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--track", nargs="+", choices=TRACKS, help="which benchmarks (default: tofu; with --data-dir all)")
    add(
        "--form",
        choices=FORMS,
        default="short",
        help="minutes; hours; who wins on held-out authors; or what needs more (default: short)",
    )
    add("--data", metavar="PATH", help="folder or hub name with the data of the track; default: what its preset says")
    add(
        "--data-dir",
        type=Path,
        metavar="DIR",
        default=os.environ.get("BLUR_OPTIM_DATA_DIR"),
        help="a folder with tofu/ and text/, from which each track takes its own (default: $BLUR_OPTIM_DATA_DIR)",
    )
    add("--retain-data", metavar="PATH", help="wmdp: what is rehearsed, where --data does not hold it")
    add("--questions", metavar="PATH", help="wmdp: hazard questions, likewise")
    add("--utility-questions", metavar="PATH", help="wmdp: the others, likewise")
    add("--subset", help="what is forgotten, such as forget01, forget05, forget10, coupled01")
    add("--model", help="a size (0.8m, 1m, 3m, 10m), trained from nothing; or a folder or a name of the hub")
    add("--retrained", metavar="MODEL", help="with --form paper: the model that never saw what is forgotten")
    add("--gguf-file", metavar="FILE", help="the file in the --model folder, where that is how it comes")
    add("--name", help="of the report; needed where results are other than the preset's, to keep them apart")
    add("--methods", nargs="+", metavar="ID", help="such as npo+nll/blur; default: those of the preset")
    add("--seeds", nargs="+", type=int, metavar="N", help="held-out seeds (default: 1 2 3); 0 is for tuning")
    add("--lrs", nargs="+", type=float, metavar="LR", help="learning rates that tuning tries, each with each weight")
    add("--tuning-weights", nargs="+", type=float, metavar="W", help="weights that it tries, as shares of the largest")
    add("--training-lr", type=float, metavar="LR", help="at which target and retrained model learn their rows")
    add("--authors", type=int, metavar="N", help="tofu: of how many authors a model knows the rows")
    add("--blocks", nargs="+", type=int, metavar="N", help="tofu: the first author of each target: to tune, to compare")
    add("--steps", type=int, metavar="N", help="of unlearning")
    add("--batch-size", type=int, metavar="N", help="rows of each of the two losses in a micro-batch")
    add("--accumulation", type=int, metavar="N", help="micro-batches in a step")
    add("--looks", type=int, metavar="N", help="how often a run is looked at")
    add("--warm-up", type=float, metavar="SHARE", help="of the steps, over which the learning rate rises")
    add("--lora-rank", type=int, metavar="N", help="train LoRA adapters of this rank in place of the model's weights")
    add("--embeddings", choices=EMBEDDINGS, help="of the tokens: trained beside LoRA, frozen, or trained alone")
    add(
        "--stop",
        action="store_true",
        default=None,
        help="end a run where the forgotten is as improbable as rows never seen",
    )
    add("--device", help="default: what the preset says")
    add("--dtype", choices=("float32", "bfloat16"), help="default: what the preset says")
    add("--processes", type=int, default=2, metavar="N", help="side by side, one thread each (default: 2)")
    add("--cache", type=Path, default=Path("unlearning-bench"), help="models and results (default: %(default)s)")
    add("--out", type=Path, default=Path("docs/results/unlearning"), help="reports (default: %(default)s)")
    add("--no-cost", action="store_true", help="leave out the timing of steps, which needs a quiet machine")
    options = parser.parse_args(arguments)
    options.data_dir = Path(options.data_dir) if options.data_dir else None
    with_all = options.data_dir and not options.data and options.form != "pretrained"
    options.track = options.track or (list(TRACKS) if with_all else ["tofu"])
    _check_together(parser, options)
    return options


def _check_together(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.data and len(options.track) > 1:
        parser.error("--data must be that of one --track. For several, give --data-dir.")
    if options.name and len(options.track) > 1:
        parser.error("--name must be that of the report of one --track, and there are several.")
    other = [name for name in (*CHANGES, *CHANGED_LISTS, "training_lr") if getattr(options, name) is not None]
    if other and not options.name and options.form != "paper":
        flag = f"--{other[0].replace('_', '-')}"
        parser.error(f"--name must be given with {flag}: these are other results than the preset's.")
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}.")


def data_in(folder: Path, track: str, cache: Path) -> str:
    """Return where the data of a track is, in a folder of data; a play there becomes a folder like MUSE's."""
    if track != "muse":
        return str(folder / "tofu")
    made = cache / "muse-data"
    if not made.is_dir():
        scratch = made.with_name(".unfinished-muse-data")
        make_muse([str(folder / "text" / "tinyshakespeare.txt"), "--out", str(scratch)])
        os.replace(scratch, made)
    return str(made)


def make_settings(options: argparse.Namespace, track: str) -> Settings:
    """Return the preset of a track with what the command line says otherwise."""
    given = {name: getattr(options, name) for name in FIELDS if getattr(options, name) is not None}
    if options.data_dir and options.form != "paper":
        given.setdefault("data", data_in(options.data_dir, track, options.cache))
    if "data" in given and Path(given["data"]).exists():  # However it is spelled, it is the same data.
        given["data"] = str(Path(given["data"]).resolve())
    lists = {name: tuple(value) for name in LISTS if (value := getattr(options, name))}
    if "blocks" in lists:
        given["targets"] = len(lists["blocks"])
    settings = replace(preset(track, options.form, options.subset), **given, **lists)
    if options.training_lr is not None:
        settings = settings.trained_at(options.training_lr)
    # What was measured on invented authors has another name than what was measured on TOFU.
    return replace(settings, name=settings.name.replace("invented", "tofu")) if settings.data else settings


def main() -> None:
    """Run all tracks asked for."""
    options = parse_options()
    # After the options, which are then met at once.
    from shared_lib.console import make_console, make_progress
    from unlearning.checks import check_settings
    from unlearning.cost import measure_costs
    from unlearning.report import write_report
    from unlearning.stages import run_setting

    settings = [make_settings(options, track) for track in options.track]
    for setting in settings:
        check_settings(setting)
    command = shlex.join(["python", "benchmarks/unlearning_bench.py", *sys.argv[1:]])
    console = make_console()
    for setting in settings:
        with make_progress(console) as progress:
            folder = run_setting(setting, options.cache, options.processes, command, progress)
            if not options.no_cost:
                measure_costs(setting, options.cache, progress)
        console.print(f"{setting.name}: {write_report(folder, options.out)}", soft_wrap=True)


if __name__ == "__main__":
    from shared_lib.errors import run

    sys.exit(run(main))
