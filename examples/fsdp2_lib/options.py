"""The command line."""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shared_lib.arguments import not_negative, positive, whole
from shared_lib.method import add_rule_and_metric, check_beta, check_metric

DESCRIPTION = """\
Let a causal language model of any size forget with BLUR, sharded over N processes by FSDP2.

Forget and retain data are JSON lines, one object each: {"text": ...}, {"prompt": ..., "completion": ...} or
{"question": ..., "answer": ...}. Of the last two, only the completion and the answer are forgotten or kept."""

EXAMPLES = """\
examples:
  torchrun --nproc-per-node 8 examples/fsdp2.py --model meta-llama/Llama-2-7b-hf \\
      --forget forget.jsonl --retain retain.jsonl --out run --steps 200 --save-every 50
  torchrun --nproc-per-node 8 examples/fsdp2.py ... --resume        # goes on from the last checkpoint in run/
  python examples/fsdp2.py --model tiny/config.json --tokenizer tiny ... --device cpu       # one process"""

DTYPES = ("float32", "bfloat16", "float16")
FORGET_LOSSES = ("npo", "ga", "simnpo", "margin")
STASHES = ("reference", "bfloat16", "int8", "cpu", "recompute")


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, every one of them valid; leave with code 2 and a message otherwise."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for add in (_add_what, _add_losses, _add_optimizer, _add_sharding, _add_output):
        add(parser)
    with first_rank_speaks():
        options = parser.parse_args(arguments)
        check_metric(parser, options)
        check_beta(parser, options, "forget-loss")
        if options.resume and not options.out.is_dir():
            parser.error(f"argument --resume: there is nothing to resume in {options.out}, which does not exist")
    # The arguments are those of the first start.
    options.resume = options.resume or restarts() > 0
    return options


def restarts() -> int:
    """How often torchrun has started all processes again, after one had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def first_rank_speaks() -> Iterator[None]:
    """Let all processes but the first leave late and without a word: what stops one mostly stops all."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    kept = sys.stdout, sys.stderr
    try:
        with open(os.devnull, "w") as nowhere:
            sys.stdout = sys.stderr = nowhere
            yield
    except SystemExit:
        time.sleep(2)  # torchrun ends all when one has ended, and the first may not have spoken yet.
        raise
    finally:
        sys.stdout, sys.stderr = kept


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model",
        required=True,
        metavar="NAME_OR_PATH",
        help="causal LM: a folder with safetensors, a name on the Hugging Face hub, or a config.json, which starts "
        "from random weights",
    )
    group.add_argument(
        "--tokenizer", metavar="NAME_OR_PATH", help="folder or name of the tokenizer (default: that of the model)"
    )
    group.add_argument("--forget", type=Path, required=True, metavar="FILE", help="JSON lines to forget")
    group.add_argument("--retain", type=Path, required=True, metavar="FILE", help="JSON lines to retain")
    group.add_argument(
        "--length", type=whole(2), default=512, metavar="N", help="cut examples to N tokens (default: 512)"
    )
    group.add_argument(
        "--batch",
        type=whole(1),
        default=8,
        metavar="N",
        help="sequences of each kind in one step, over all processes (default: 8)",
    )
    group.add_argument(
        "--micro-batch",
        type=whole(1),
        default=1,
        metavar="N",
        help="sequences that a process computes at a time; --batch must be a multiple of N times the processes "
        "(default: 1)",
    )
    group.add_argument("--steps", type=whole(1), default=100, metavar="N", help="(default: 100)")
    group.add_argument("--seed", type=whole(0), default=0, metavar="N", help="order of data, dropout (default: 0)")


def _add_losses(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("losses; what is to be kept has the negative log-likelihood")
    group.add_argument(
        "--forget-loss",
        choices=FORGET_LOSSES,
        default="npo",
        help="margin: with --metric retain, or a --gamma of about 0.01 (default: npo)",
    )
    group.add_argument(
        "--beta", type=positive, metavar="X", help="inverse temperature of npo and simnpo (default: 0.1, 2.5)"
    )
    group.add_argument(
        "--reference",
        choices=("stored", "model"),
        default="stored",
        help="what npo compares with: log-probabilities computed before the first step and kept in OUT, or a second, "
        "frozen model beside the first (default: stored)",
    )


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("BLUR over AdamW")
    group.add_argument("--gamma", type=positive, default=1.0, metavar="X", help="weight of forgetting (default: 1)")
    group.add_argument("--retain-weight", type=positive, default=1.0, metavar="X", help="(default: 1)")
    add_rule_and_metric(group)
    group.add_argument(
        "--stash",
        choices=STASHES,
        default="reference",
        help="where the forget gradients wait; int8 and recompute need the least memory (default: reference)",
    )
    group.add_argument("--lr", type=positive, default=1e-5, metavar="X", help="learning rate (default: 1e-5)")
    group.add_argument("--warmup", type=whole(0), default=0, metavar="N", help="steps of rising lr (default: 0)")
    group.add_argument("--weight-decay", type=not_negative, default=0.01, metavar="X", help="(default: 0.01)")
    group.add_argument(
        "--max-grad-norm",
        type=positive,
        metavar="X",
        help="clip the update's norm; with --metric retain a limit that every step exceeds is a smaller --lr "
        "(default: none)",
    )


def _add_sharding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sharding")
    group.add_argument(
        "--device", choices=("cuda", "cpu"), help="GPUs with NCCL or CPU with gloo (default: GPUs where there are any)"
    )
    group.add_argument(
        "--param-dtype",
        choices=DTYPES[:2],
        default="float32",
        help="of parameters, gradients and optimizer state (default: float32)",
    )
    group.add_argument(
        "--compute-dtype",
        choices=DTYPES[:2],
        help="of matrix products; gradients are reduced in float32 (default: bfloat16 on GPUs, float32 on CPU)",
    )
    group.add_argument(
        "--no-checkpointing", action="store_true", help="keep all activations: faster, and needs more memory"
    )
    group.add_argument(
        "--sync-each",
        action="store_true",
        help="reduce the gradients after each micro-batch instead of the last alone: more communication, and no "
        "unsharded gradients of the whole model in memory",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        type=Path,
        default=Path("fsdp2-out"),
        metavar="DIR",
        help="log.jsonl, checkpoints/ and the unlearned model/ go there (default: fsdp2-out)",
    )
    group.add_argument("--log-every", type=whole(1), default=1, metavar="N", help="steps (default: 1)")
    group.add_argument(
        "--save-every", type=whole(1), metavar="N", help="steps between checkpoints (default: only after the last)"
    )
    group.add_argument("--keep", type=whole(1), default=2, metavar="N", help="checkpoints to keep (default: 2)")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in OUT, also on another number of processes; start anew where there is "
        "none. After a restart by torchrun --max-restarts this is the default",
    )
    group.add_argument(
        "--export-dtype", choices=DTYPES, help="of the unlearned model's files (default: as the model came)"
    )
