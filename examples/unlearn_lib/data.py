"""All rows of a run: what is trained on, what is scored, and what the records say of them."""

import argparse
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared_lib.encoding import Example
from shared_lib.errors import InputError

from .options import RESERVED_SETS
from .rows import TextRow, parse_row
from .sources import Source, named_sources, read_source
from .tokens import Encoder, fingerprint

FORGET, RETAIN, HELD_OUT, NEVER_SEEN = RESERVED_SETS


@dataclass(frozen=True)
class Data:
    """The rows as token ids.

    forget: examples, or pairs of them for DPO. sets: what is scored, by name. facts: by option.
    """

    forget: list[Any]
    retain: list[Example]
    sets: dict[str, list[Example]]
    facts: dict[str, dict[str, Any]]

    @property
    def hub_names(self) -> list[str]:
        """Return the data sets of the hub that were trained on."""
        trained = (self.facts["--forget"], self.facts["--retain"])
        return sorted({fact["source"].partition(":")[0] for fact in trained if fact["from"] == "hub"})


def read_data(options: argparse.Namespace, encoder: Encoder) -> Data:
    """Read, encode and split all rows.

    Raises:
        InputError: a row is not as it should be, or is both to be forgotten and kept, or trained on and never seen.
    """
    examples, facts, rows_of = {}, {}, {}
    for option, name in named_sources(options):
        source = read_source(option, name)
        rows = rows_of[option] = [parse_row(record, option) for record in source.records]
        examples[option], facts[option] = _encode(encoder, source, rows)
    forget_rows = rows_of["--forget"]
    _check_apart("--forget", "--retain", examples, forget_rows)
    if options.stop_at is not None:
        for option in ("--forget", "--retain"):
            _check_apart("--stop-at", option, examples, rows_of["--stop-at"])
    pairs = [encoder.pair(row, i) for i, row in enumerate(forget_rows)] if options.method == "dpo" else None
    if pairs:
        facts["--forget"]["tokens_sha256"] = fingerprint(example for pair in pairs for example in pair.values())
    retain, held_out = hold_out(examples["--retain"], options.eval_fraction, options.seed)
    sets = {FORGET: examples["--forget"], RETAIN: retain, **({HELD_OUT: held_out} if held_out else {})}
    sets |= {NEVER_SEEN: examples["--stop-at"]} if options.stop_at is not None else {}
    sets |= {name: examples[f"--eval {name}"] for name, _ in options.eval}
    facts["--retain"]["held_out"] = len(held_out)
    return Data(pairs or examples["--forget"], retain, sets, facts)


def hold_out(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split off a share of the rows, at random; both parts keep their order.

    Raises:
        InputError: nothing would be left to train on.
    """
    count = max(1, round(fraction * len(examples))) if fraction else 0
    if count >= len(examples):
        raise InputError(
            f"--eval-fraction: of --retain at least one row must be left to train on, got {len(examples)} rows in all. "
            "Give more rows, or --eval-fraction 0."
        )
    chosen = set(random.Random(seed).sample(range(len(examples)), count))
    kept = [example for i, example in enumerate(examples) if i not in chosen]
    return kept, [examples[i] for i in sorted(chosen)]


def _encode(encoder: Encoder, source: Source, rows: Sequence[TextRow]) -> tuple[list[Example], dict[str, Any]]:
    encoder.cut = 0
    examples = [encoder(row) for row in rows]
    kinds = dict(Counter(row.kind for row in rows))
    lengths = [len(example.prompt) + len(example.answer) for example in examples]
    facts = {**source.facts(), "tokens_sha256": fingerprint(examples), "kinds": kinds, "longest": max(lengths)}
    return examples, {**facts, "cut": encoder.cut}


def _check_apart(option: str, other: str, examples: Mapping[str, Sequence[Example]], rows: Sequence[TextRow]) -> None:
    others = {(*example.prompt, -1, *example.answer) for example in examples[other]}
    both = [i for i, example in enumerate(examples[option]) if (*example.prompt, -1, *example.answer) in others]
    if both:
        raise InputError(
            f"{rows[both[0]].where}: a row must not be in {other} too, which this one is, and {len(both)} of "
            f"{len(rows)} in all. Leave them out of one of the two."
        )
