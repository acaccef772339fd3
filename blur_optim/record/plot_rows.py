"""From the names of parameters to the rows of a heat map: by decoder layer, and finer the fewer layers there are."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

#: More are not told apart in one picture.
MOST_ROWS = 100
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.(.+)$")
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|feed_forward|ffn|expert|\bfc\d?\b|moe")
_NORM = re.compile(r"norm|\bln_?\d?")
_INPUT = re.compile(r"embed|wte|wpe")


class Row(NamedTuple):
    """One row of the heat map.

    Args:
        layer: number of the decoder layer; None for what is in none.
        label: what the row is within its layer.
        members: indices of its parameters.
    """

    layer: int | None
    label: str
    members: list[int]


def rows_of(names: Sequence[str]) -> list[Row]:
    """Sort the parameters from the model's input to its output and join them until at most ``MOST_ROWS`` rows are left.

    First the parts of the MLP and of the norms of a layer become one row each, then its attention, then the layer.
    """
    rows: list[Row] = []
    for label_of in (_fine, _by_projection, _by_kind, lambda part: "all"):
        rows = _rows(names, label_of)
        if len(rows) <= MOST_ROWS:
            break
    return rows


def _rows(names: Sequence[str], label_of: Callable[[str], str]) -> list[Row]:
    found: dict[tuple[int | None, str], list[int]] = {}
    for index in sorted(range(len(names)), key=lambda i: (_position(names[i]), i)):
        layer, part = _split(names[index])
        label = _fine(part) if layer is None else label_of(part)
        found.setdefault((layer, label), []).append(index)
    return [Row(layer, label, members) for (layer, label), members in found.items()]


def _split(name: str) -> tuple[int | None, str]:
    match = _LAYER.search(name)
    return (None, name) if match is None else (int(match[1]), match[2])


def _position(name: str) -> tuple[int, int, int]:
    layer, part = _split(name)
    if layer is None:
        return (0 if _INPUT.search(name) else 2, 0, 0)
    return (1, layer, ("attention", "mlp", "norm", "other").index(_by_kind(part)))


def _by_kind(part: str) -> str:
    """What a parameter of a layer belongs to: "attention", "mlp", "norm" or "other"."""
    if _NORM.search(part):  # First, for there are norms of attention's parts.
        return "norm"
    return "attention" if _ATTENTION.search(part) else "mlp" if _MLP.search(part) else "other"


def _by_projection(part: str) -> str:
    kind = _by_kind(part)
    return _fine(part).split()[0] if kind == "attention" else kind


def _fine(part: str) -> str:
    """The name without what says nothing: ``self_attn.q_proj.weight`` is "q", its bias "q bias"."""
    part = re.sub(r"^(base_model\.model\.)?(model|transformer)\.", "", part)
    part = re.sub(r"^(self_attn|attention|attn|mlp)\.(?=.*\.)", "", part)
    part = re.sub(r"\.(default|weight)\b", "", part).replace("_proj", "")
    return re.sub(r"\.(bias|lora_\w+)", lambda match: " " + match[1], part)
