"""Prove and measure on a GPU all that this repository claims of it, with one command.

    python benchmarks/gpu_bench.py --out gpu-results
    python benchmarks/gpu_bench.py --out gpu-results --device cpu --quick       # a rehearsal, without a GPU

Each stage runs in a process of its own with a time limit: a crash, a hang or a full card ends that stage alone. After
each the report, OUT/report.md, is written anew; with it come results.json, log.txt and a CSV for each stage that has
many numbers. What is built goes to --work, and nothing of the machine's packages is touched.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # This checkout's package, installed or not.

from gpu.context import Context, Sheet  # noqa: E402
from gpu.stages import STAGES  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, names = parser.add_argument, [stage.name for stage in STAGES]
    add("--out", type=Path, metavar="DIR", default=Path("gpu-results"), help="the results (default: %(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    add("--quick", action="store_true", help="toy sizes: a rehearsal, in which no number means anything")
    add("--minutes", type=float, default=8.0, help="of all stages together (default: 8)")
    add("--stages", nargs="+", choices=names, default=names, metavar="STAGE", help=f"of {', '.join(names)}")
    add("--data", type=Path, metavar="DIR", default=os.environ.get("BLUR_OPTIM_DATA_DIR"),
        help="a folder with tofu/ (default: $BLUR_OPTIM_DATA_DIR, else invented authors)")  # fmt: skip
    add("--work", type=Path, metavar="DIR", default=ROOT / "build/gpu", help="what is built (default: build/gpu)")
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"argument --minutes: must be above 0, got {options.minutes:g}")
    if options.data and not (Path(options.data) / "tofu").is_dir():
        parser.error(f"argument --data: must be a folder with tofu/ in it, got {options.data}")
    return options


def run_one(name: str, told: str) -> None:
    """Run one stage here; the process was started for it."""
    context = Context.from_json(told)
    sheet = Sheet(context.work / f"{name}.json")
    importlib.import_module(f"gpu.{name}").run(context, sheet)
    sheet.save()


def main() -> int:
    if sys.argv[1:2] == ["--stage"]:
        run_one(*sys.argv[2:])
        return 0
    options = parse()
    import torch
    from gpu.machine import describe
    from gpu.runner import run_stages

    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_bench: --device cuda needs a GPU, and torch sees none. To rehearse without: --device cpu --quick",
            file=sys.stderr,
        )
        return 2
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    (options.out / "log.txt").unlink(missing_ok=True)
    data = Path(options.data).resolve() if options.data else None
    context = Context(options.device, options.quick, options.work.resolve(), 0.0, data)
    chosen = [stage for stage in STAGES if stage.name in options.stages]
    fine = run_stages(chosen, context, options.out, options.minutes, describe(options.device))
    print(f"report: {options.out / 'report.md'}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
