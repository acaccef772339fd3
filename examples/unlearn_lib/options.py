"""The command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared_lib.arguments import fraction, not_negative, positive, whole
from shared_lib.method import add_rule_and_metric, check_beta, check_metric

DESCRIPTION = """\
Let a causal language model forget the rows of one file and keep those of another, with BLUR.

Rows are JSON lines, or a data set of the hub, NAME[:CONFIG][:SPLIT]. A row is one of
  {"text": ...}                        all of it is forgotten or kept
  {"prompt": ..., "completion": ...}   the completion, joined to the prompt as it stands
  {"question": ..., "answer": ...}     the answer, after the tokenizer's chat template where it has one
  {"messages": [{"role": ..., "content": ...}, ...]}   the last message, which must be the assistant's
Model, model card, results and log go to --out. The same command goes on where it was interrupted."""

EXAMPLES = """\
examples:
  python examples/unlearn.py --model HuggingFaceTB/SmolLM2-135M-Instruct --forget forget.jsonl --retain retain.jsonl
  python examples/unlearn.py --model folder --forget locuslab/TOFU:forget01 --retain locuslab/TOFU:retain99 --lora 8
  accelerate launch --num_processes 4 examples/unlearn.py --model folder --forget forget.jsonl --retain retain.jsonl"""

METHODS = ("npo", "simnpo", "ga", "dpo", "margin")
RETAIN_LOSSES = ("nll", "kl")
STASHES = ("reference", "bfloat16", "int8", "cpu")
SCHEDULERS = ("constant", "linear", "cosine")
DTYPES = ("float32", "bfloat16", "float16")
RESERVED_SETS = ("forget", "retain", "retain, held out", "never seen")
LEARNING_RATE, LORA_LEARNING_RATE = 1e-5, 1e-4
#: What a second start may say otherwise than the first, and be the same run.
NO_SETTING = ("out", "overwrite", "dry_run")


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, every one of them valid; leave with code 2 and a message otherwise."""
    parser = argparse.ArgumentParser(
        prog="unlearn.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for add in (
        _add_model,
        _add_data,
        _add_method,
        _add_optimizer,
        _add_lora,
        _add_resources,
        _add_scores,
        _add_output,
    ):
        add(parser)
    options = parser.parse_args(arguments)
    _check_together(parser, options)
    check_metric(parser, options)
    if options.max_grad_norm is None:
        options.max_grad_norm = 0.0 if options.metric == "retain" else 1.0
    options.lr = options.lr or (LORA_LEARNING_RATE if options.lora else LEARNING_RATE)
    return options


def _check_together(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.lora is None:
        for name in ("keep_adapter", "lora_alpha", "lora_dropout", "lora_targets", "lora_embeddings"):
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"argument --{name.replace('_', '-')}: needs --lora R, which was not given")
    if options.keep_adapter and options.save_dtype:
        parser.error(
            "argument --save-dtype: an adapter is saved as it was trained; leave --keep-adapter out to merge it"
        )
    if options.stop_at is None and options.stop_every != parser.get_default("stop_every"):
        parser.error("argument --stop-every: needs --stop-at FILE_OR_NAME, which was not given")
    check_beta(parser, options, "method")
    names = [*RESERVED_SETS, *(name for name, _ in options.eval)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        parser.error(f"argument --eval: each set must have a name of its own, got {twice[0]!r} twice")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=True, metavar="NAME_OR_PATH", help="causal LM: a folder, or a name on the Hugging Face hub"
    )
    group.add_argument(
        "--gguf-file", metavar="NAME", help="a GGUF file in that folder, which is dequantised (default: none)"
    )
    group.add_argument(
        "--dtype", choices=DTYPES[:2], default="float32", help="of the weights that are trained (default: float32)"
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--forget", required=True, metavar="FILE_OR_NAME", help="rows to forget")
    group.add_argument("--retain", required=True, metavar="FILE_OR_NAME", help="rows to keep")
    group.add_argument(
        "--max-length",
        type=whole(2),
        metavar="N",
        help="cut rows to N tokens, and say how many were cut (default: 512, or what the model reads if that is less)",
    )
    group.add_argument(
        "--plain-questions",
        action="store_true",
        help='ask questions as "Question: ...\\nAnswer:", also where the tokenizer has a chat template',
    )


def _add_method(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method",
        choices=METHODS,
        default="npo",
        help="forget loss. dpo prefers to each answer that is forgotten the row's own \"instead\", or an I-don't-know "
        "where the row is a question or messages; margin flattens the prediction and ends there: with --metric retain, "
        "or a --gamma of about 0.01 (default: npo)",
    )
    group.add_argument(
        "--retain-loss",
        choices=RETAIN_LOSSES,
        default="nll",
        help="kl stays near the model as it was; without --lora it holds a second model (default: nll)",
    )
    group.add_argument(
        "--beta",
        type=positive,
        metavar="X",
        help="inverse temperature (default: 0.1; simnpo 2.5; ga and margin have none)",
    )
    add_rule_and_metric(group)
    group.add_argument("--gamma", type=positive, default=1.0, metavar="X", help="weight of forgetting (default: 1)")
    group.add_argument("--retain-weight", type=positive, default=1.0, metavar="X", help="(default: 1)")
    group.add_argument("--normalize", action="store_true", help="apply the rule to gradients of length 1")


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer: BLUR over AdamW")
    group.add_argument("--lr", type=positive, metavar="X", help="learning rate (default: 1e-5; with --lora 1e-4)")
    group.add_argument("--epochs", type=positive, default=5.0, metavar="X", help="over the rows to forget (default: 5)")
    group.add_argument("--max-steps", type=whole(1), metavar="N", help="stop after N steps (default: by --epochs)")
    group.add_argument(
        "--stop-at",
        metavar="FILE_OR_NAME",
        help="rows that the model has never seen: stop when the answers to forget are as improbable as theirs were "
        "before the first step (default: none)",
    )
    group.add_argument(
        "--stop-every",
        type=whole(1),
        default=10,
        metavar="N",
        help="steps between two such looks (default: 10)",
    )
    group.add_argument(
        "--batch-size", type=whole(1), default=4, metavar="N", help="rows of each kind at a time (default: 4)"
    )
    group.add_argument(
        "--accumulation", type=whole(1), default=1, metavar="N", help="batches of each kind in a step (default: 1)"
    )
    group.add_argument("--scheduler", choices=SCHEDULERS, default="linear", help="of the lr (default: linear)")
    group.add_argument(
        "--warmup",
        type=fraction,
        default=0.0,
        metavar="X",
        help="share of the steps in which the lr rises (default: 0)",
    )
    group.add_argument(
        "--max-grad-norm",
        type=not_negative,
        metavar="X",
        help="of the update; 0 never clips (default: 1; with --metric retain 0, for there a limit that every step "
        "exceeds is a smaller --lr)",
    )
    group.add_argument("--weight-decay", type=not_negative, default=0.01, metavar="X", help="(default: 0.01)")
    group.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of everything (default: 0)")


def _add_lora(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA: train a small adapter, not all weights")
    group.add_argument("--lora", type=whole(1), metavar="R", help="rank of the adapter (default: all weights)")
    group.add_argument("--lora-alpha", type=positive, metavar="X", help="(default: twice the rank)")
    group.add_argument("--lora-dropout", type=fraction, default=0.0, metavar="X", help="(default: 0)")
    group.add_argument(
        "--lora-targets",
        default="all-linear",
        metavar="NAMES",
        help="layers, such as q_proj,v_proj (default: all-linear)",
    )
    group.add_argument(
        "--lora-embeddings",
        action="store_true",
        help="train the token embeddings whole beside the adapter: with --metric retain far more is forgotten",
    )
    group.add_argument("--keep-adapter", action="store_true", help="save the adapter alone, not merged into the model")


def _add_resources(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory and device")
    group.add_argument(
        "--stash", choices=STASHES, default="reference", help="where forget gradients wait (default: reference)"
    )
    group.add_argument("--bf16", action="store_true", help="compute in bfloat16; weights stay as --dtype says")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    group.add_argument("--cpu", action="store_true", help="use the CPU, also where there is a GPU")


def _add_scores(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scores, before and after")
    group.add_argument(
        "--eval-fraction",
        type=fraction,
        default=0.1,
        metavar="X",
        help="share of --retain that is not trained on, to see what happens to other rows (default: 0.1)",
    )
    group.add_argument(
        "--eval",
        type=_named_source,
        action="append",
        default=[],
        metavar="NAME=FILE_OR_NAME",
        help="more rows to score, such as paraphrases of those to forget; may be repeated (default: none)",
    )
    group.add_argument(
        "--eval-rows", type=whole(1), default=200, metavar="N", help="score at most N rows of a set (default: 200)"
    )
    group.add_argument(
        "--generate-rows",
        type=whole(0),
        default=40,
        metavar="N",
        help="let the model answer at most N rows of a set, for ROUGE-L; 0 for none (default: 40)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", type=Path, default=Path("unlearned"), metavar="DIR", help="where all goes (default: unlearned)"
    )
    group.add_argument(
        "--save-steps", type=whole(1), metavar="N", help="steps between checkpoints (default: one an epoch)"
    )
    group.add_argument("--log-steps", type=whole(1), default=1, metavar="N", help="steps between logs (default: 1)")
    group.add_argument("--save-dtype", choices=DTYPES, help="of the saved model (default: as --dtype)")
    group.add_argument("--keep-checkpoints", action="store_true", help="also once the run is finished")
    group.add_argument("--overwrite", action="store_true", help="delete the earlier run in --out, and begin anew")
    group.add_argument(
        "--dry-run", action="store_true", help="read model configuration and data, say what would be done"
    )


def as_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what makes the run the one that it is, as JSON takes it."""
    chosen = {name: value for name, value in vars(options).items() if name not in NO_SETTING}
    return {**chosen, "eval": [list(pair) for pair in options.eval]}


def _named_source(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not (name.strip() and equals and source.strip()):
        raise argparse.ArgumentTypeError(f"must be NAME=FILE_OR_NAME, got {text!r}")
    return name.strip(), source.strip()
