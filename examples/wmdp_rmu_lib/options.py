"""The command line."""

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from shared_lib.arguments import not_negative, positive, whole
from shared_lib.errors import InputError, is_path
from shared_lib.method import add_rule_and_metric, check_metric

DESCRIPTION = """\
Let a causal language model forget what some corpora are about, by BLUR-RMU (arXiv:2403.03218, arXiv:2506.08164).

On forget passages the activations of one layer are steered to a fixed random vector, on retain passages they are held
to those of the model as it was. Three matrices are trained; the defaults are those for Zephyr-7B."""

EPILOG = """\
A SOURCE is one of
  FILE.jsonl, FILE.json     JSON lines, one object each with a field "text"
  any other FILE            text, cut at line ends into passages of --passage-chars characters
  NAME:CONFIG:SPLIT:FIELD   a data set of the Hugging Face hub; what is left out from the right or left empty is the
                            default configuration, train (test for --questions) and text
  e.g. Salesforce/wikitext:wikitext-2-raw-v1:test, cais/wmdp:wmdp-bio:test, corpora/cyber.jsonl

example:
  python examples/wmdp_rmu.py --model HuggingFaceH4/zephyr-7b-beta --dtype bfloat16 \\
      --forget bio.jsonl --forget cais/wmdp-corpora:cyber-forget-corpus --length 512,768 \\
      --retain Salesforce/wikitext:wikitext-2-raw-v1:test --out zephyr-forgets"""

DTYPES = ("float32", "bfloat16")
RETAIN_WEIGHT = {"euclidean": 800.0, "retain": 1.0}


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, every one of them valid by itself; leave with code 2 and a message otherwise."""
    parser = argparse.ArgumentParser(
        prog="wmdp_rmu.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for add in (_add_model, _add_corpora, _add_rmu, _add_optimizer, _add_evaluation, _add_output):
        add(parser)
    options = parser.parse_args(arguments)
    check_metric(parser, options)
    if options.retain_weight is None:
        options.retain_weight = RETAIN_WEIGHT[options.metric]
    for name in ("length", "steering"):
        _one_for_each_corpus(parser, options, name)
    if max(options.layers) > options.layer:
        parser.error(
            f"argument --layers: a layer above --layer, {options.layer}, has no effect on its activations and would "
            f"not be trained, got {max(options.layers)}"
        )
    return options


def check_sources(options: argparse.Namespace) -> None:
    """See, before any slow import, that files and packages are there and OUT is free.

    Raises:
        InputError: they aren't; names the option.
    """
    sources = {"--forget": options.forget, "--retain": [options.retain], "--questions": options.questions}
    for option, source in ((option, source) for option, all_ in sources.items() for source in all_):
        if not Path(source).is_file() and not is_hub_name(source):
            raise InputError(f"{option}: there is no file {source}.")
    if is_path(options.model) and "/" in options.model and not Path(options.model).is_dir():
        raise InputError(f"--model: there is no folder {options.model}.")
    folder = Path(options.model)
    if options.gguf_file and folder.is_dir() and not (folder / options.gguf_file).is_file():
        raise InputError(f"--gguf-file: there is no file {folder / options.gguf_file}.")
    for option, package, wanted in (
        ("--lm-eval", "lm_eval", options.lm_eval),
        ("--gguf-file", "gguf", options.gguf_file),
    ):
        if wanted and find_spec(package) is None:
            name = package.replace("_", "-")
            raise InputError(f"{option} needs the package {name}, which is not installed: pip install {name}")
    if options.lm_eval_path and not options.lm_eval_path.is_dir():
        raise InputError(f"--lm-eval-path: there is no folder {options.lm_eval_path}.")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise InputError(f"--out: {options.out} must be a new or an empty folder, but is not. Use another.")


def is_hub_name(source: str) -> bool:
    """Tell a data set of the hub, owner/name or anything with a colon after it, from a path."""
    name, colon, _ = source.partition(":")
    return not is_path(name) or bool(colon and "/" not in name and not Path(name).suffix)


def _one_for_each_corpus(parser: argparse.ArgumentParser, options: argparse.Namespace, name: str) -> None:
    values, corpora = getattr(options, name), len(options.forget)
    if len(values) not in (1, corpora):
        parser.error(f"argument --{name}: give one value, or one for each of the {corpora} --forget, got {len(values)}")
    setattr(options, name, values * (corpora // len(values)))


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=True, metavar="NAME_OR_PATH", help="causal LM: a folder, or a name on the Hugging Face hub"
    )
    group.add_argument(
        "--gguf-file", metavar="FILE", help="of that folder or name, take this GGUF file; it is dequantized"
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the whole model, the trained matrices and AdamW's moments too. In bfloat16, as in the original, "
        "steps of 5e-5 are partly lost to rounding (default: float32)",
    )
    group.add_argument("--device", metavar="NAME", help="such as cuda or cpu (default: cuda where there is one)")
    group.add_argument("--threads", type=whole(1), metavar="N", help="of the CPU (default: torch's own choice)")


def _add_corpora(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("corpora; SOURCE is explained at the end")
    group.add_argument(
        "--forget",
        action="append",
        required=True,
        metavar="SOURCE",
        help="to forget; give it several times for several corpora, which take turns batch by batch, each with a "
        "steering vector of its own",
    )
    group.add_argument("--retain", required=True, metavar="SOURCE", help="to retain")
    group.add_argument(
        "--length",
        type=_list(whole(2)),
        default=[512],
        metavar="N[,N...]",
        help="cut forget passages to N tokens; one for all corpora, or one each (default: 512)",
    )
    group.add_argument("--retain-length", type=whole(2), default=512, metavar="N", help="(default: 512)")
    group.add_argument(
        "--min-chars",
        type=whole(0),
        default=50,
        metavar="N",
        help="drop passages of N characters or less (default: 50)",
    )
    group.add_argument(
        "--passage-chars", type=whole(1), default=1000, metavar="N", help="of a text file's passages (default: 1000)"
    )
    group.add_argument("--batch", type=whole(1), default=4, metavar="N", help="passages of each kind (default: 4)")
    group.add_argument("--steps", type=whole(1), default=150, metavar="N", help="batches in all (default: 150)")
    group.add_argument(
        "--seed", type=whole(0), default=0, metavar="N", help="order of passages, steering vectors (default: 0)"
    )


def _add_rmu(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("RMU; layers are numbered from 0")
    group.add_argument(
        "--layer", type=whole(0), default=7, metavar="N", help="whose activations are steered (default: 7)"
    )
    group.add_argument(
        "--layers", type=_list(whole(0)), default=[5, 6, 7], metavar="N[,N...]", help="to train (default: 5,6,7)"
    )
    group.add_argument(
        "--param-pattern",
        default="mlp.down_proj.weight",
        metavar="GLOB",
        help="what is trained in each of them: names within a layer, * and ? allowed (default: mlp.down_proj.weight)",
    )
    group.add_argument(
        "--steering",
        type=_list(positive),
        default=[6.5],
        metavar="X[,X...]",
        help="norm of the steering vector; one for all forget corpora, or one each. It has to be about as large as the "
        "activations or larger, whose median norm is printed before the first step (default: 6.5, for Zephyr-7B)",
    )
    group.add_argument(
        "--frozen",
        choices=("swap", "copy"),
        default="swap",
        help="where the activations to retain come from: the model itself with the original values of the trained "
        "matrices in their place, which are all that is kept, or a second model (default: swap)",
    )


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("BLUR over AdamW; g_f and g_r are the gradients of the two losses")
    add_rule_and_metric(group)
    group.add_argument("--gamma", type=positive, default=1.0, metavar="X", help="weight of forgetting (default: 1)")
    group.add_argument(
        "--retain-weight",
        type=not_negative,
        metavar="X",
        help="RMU's alpha, BLUR's retain_weight. It multiplies g_r, not the printed loss: weighted_sum descends "
        "gamma*forget + X*retain, blur along gamma*g_f + X*(g_r less its part along g_f). AdamW sees little but the "
        "ratio X/gamma. With normalized, whose gradients have length 1, give about 1 (default: 800; with --metric "
        "retain, where it is the size of the retain term's step in units of --lr, 1)",
    )
    group.add_argument("--lr", type=positive, default=5e-5, metavar="X", help="learning rate (default: 5e-5)")
    group.add_argument("--weight-decay", type=not_negative, default=0.01, metavar="X", help="(default: 0.01)")


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation, before and after")
    group.add_argument(
        "--held-out",
        type=whole(1),
        default=32,
        metavar="N",
        help="passages of each corpus, evenly spaced, that are kept from training for the perplexity (default: 32)",
    )
    group.add_argument(
        "--questions",
        action="append",
        default=[],
        metavar="SOURCE",
        help='multiple choice, rows with "question", "choices" and "answer" (index from 0) as in WMDP and MMLU; give '
        "it several times for several files",
    )
    group.add_argument(
        "--scoring",
        choices=("letter", "choice"),
        default="letter",
        help="letter: the choices are in the prompt, and the likeliest of A, B, ... is the answer. choice: they are "
        "not, and the answer is the choice of the highest log-likelihood per character (default: letter)",
    )
    group.add_argument(
        "--topic", metavar="TEXT", help='begin letter prompts with "... questions (with answers) about TEXT."'
    )
    group.add_argument(
        "--lm-eval", type=_names, default=[], metavar="TASK[,TASK...]", help="tasks of lm-eval, such as wmdp_bio,mmlu"
    )
    group.add_argument("--lm-eval-path", type=Path, metavar="DIR", help="of tasks of your own")
    group.add_argument("--lm-eval-limit", type=whole(1), metavar="N", help="questions per task (default: all)")
    group.add_argument("--eval-batch", type=whole(1), default=4, metavar="N", help="sequences at a time (default: 4)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        type=Path,
        default=Path("wmdp-rmu-out"),
        metavar="DIR",
        help="new folder for model/, with the tokenizer, and results.json (default: wmdp-rmu-out)",
    )
    group.add_argument("--no-model", action="store_true", help="write results.json alone")
    group.add_argument("--log-every", type=whole(1), default=10, metavar="N", help="steps (default: 10)")


def _list(parse: Callable[[str], object]) -> Callable[[str], list]:
    return lambda text: [parse(part.strip()) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
