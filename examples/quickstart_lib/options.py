"""The command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared_lib.arguments import positive, whole
from shared_lib.rows import MIN_AUTHORS

DESCRIPTION = """\
A language model learns twenty authors, then forgets two of them and keeps the rest: with a weighted sum of the
two losses, with BLUR, with the normalized rule, and with BLUR in the metric of the retain loss. Prints a table;
writes quickstart.png and quickstart.json."""

EXAMPLES = """\
examples:
  python examples/quickstart.py
  python examples/quickstart.py --data tofu/ --out out-tofu
  python examples/quickstart.py --data locuslab/TOFU --model HuggingFaceTB/SmolLM2-135M"""


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, every one of them valid; leave with code 2 and a message otherwise."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_what(parser)
    _add_how(parser)
    options = parser.parse_args(arguments)
    small = options.model is None
    options.lr = options.lr or (None if small else 2e-5)
    options.learning_lr = options.learning_lr or (3e-3 if small else 1e-4)
    return options


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is learned and forgotten")
    group.add_argument(
        "--data",
        metavar="PATH",
        help="question/answer pairs in the format of TOFU, 20 consecutive rows an author: a folder with full.json and "
        "its *_perturbed.json, one JSON-lines file, or a data set of the Hugging Face hub such as locuslab/TOFU. "
        "Without it: invented authors, no download",
    )
    group.add_argument(
        "--authors",
        type=whole(at_least=MIN_AUTHORS),
        default=20,
        metavar="N",
        help="take the last N authors; the last two are forgotten (default: 20)",
    )
    group.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        help="start from this causal LM of the hub or of a folder; seven copies of it are in memory at once. "
        "Without it: a small Llama, trained from nothing",
    )
    group.add_argument(
        "--out",
        type=Path,
        default=Path("quickstart-out"),
        metavar="DIR",
        help="where results and trained models go; a second run takes the models from there (default: quickstart-out)",
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how")
    number = whole(at_least=1)
    group.add_argument("--steps", type=number, default=50, metavar="N", help="unlearning steps (default: 50)")
    group.add_argument(
        "--lr",
        type=positive,
        metavar="X",
        help="learning rate of unlearning, of all methods (default: each its own, tuned for the small model; with "
        "--model 2e-5)",
    )
    group.add_argument(
        "--retain-weight",
        type=positive,
        metavar="X",
        help="weight of the retain loss in the weighted sum (default: 10)",
    )
    group.add_argument(
        "--gamma",
        type=positive,
        metavar="X",
        help="weight of the forget gradient, of all but the weighted sum (default: each its own)",
    )
    group.add_argument(
        "--epochs", type=number, default=30, metavar="N", help="learn for at most N epochs (default: 30)"
    )
    group.add_argument(
        "--learning-lr", type=positive, metavar="X", help="learning rate before (default: 3e-3; with --model 1e-4)"
    )
    group.add_argument(
        "--digits-steps", type=number, default=300, metavar="N", help="steps of the second act (default: 300)"
    )
    group.add_argument("--seed", type=whole(at_least=0), default=0, metavar="N", help="of everything (default: 0)")
    group.add_argument("--device", default="cpu", metavar="NAME", help="such as cuda (default: cpu)")


def as_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options as JSON takes them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
