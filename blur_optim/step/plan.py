"""What does not change from step to step: computed once, checked cheaply, made anew where something has changed.

A check compares objects by identity, which costs some 15 ns a parameter; no tensor is hashed or asked a question. The
values in the param groups are compared as such, for a scheduler writes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, repeat
from numbers import Real
from operator import is_
from typing import Any

import torch
from torch import Tensor

from blur_optim.parallel.ranks import Ranks, is_dtensor, to_local
from blur_optim.step.capturing import is_capturing

Weight = float | Tensor


def check_weight(name: str, value: Any) -> float:
    """Return a gradient's weight as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative or not finite.
    """
    if not isinstance(value, Real | Tensor):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    weight = float(value)
    if not 0 <= weight < float("inf"):
        raise ValueError(f"`{name}` must be finite and >= 0, got {value!r}.")
    return weight


def own_name(name: str, group: Mapping[str, Any]) -> str:
    """Under what key a param group has BLUR's ``gamma`` or ``retain_weight``: with a prefix where its base has one."""
    prefixed = f"blur_{name}"
    return prefixed if prefixed in group else name


def same_objects(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects. ``==`` would compare the values of tensors that differ."""
    return len(some) == len(others) and all(map(is_, some, others))


def any_missing(values: Sequence[Any]) -> bool:
    """Whether one is None. ``in`` would compare tensors."""
    return any(map(is_, values, repeat(None)))


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of the dots and of the coefficients: one per param group, or one per parameter.

    Args:
        params: the members, in the order of the param groups.
        rows, groups: of each member, its row and the index of its param group; both ascend.
        gammas, alphas: of each row; tensors only where they are on a device, whose values the host does not see.
    """

    params: list[Tensor]
    rows: list[int]
    groups: list[int]
    gammas: list[Weight]
    alphas: list[Weight]

    @cached_property
    def members(self) -> list[int]:
        """The place of each of ``params``, in a list that is not to be changed."""
        return list(range(len(self.params)))

    @cached_property
    def sizes(self) -> list[int]:
        """The number of members of each row."""
        sizes = [0] * len(self.gammas)
        for row in self.rows:
            sizes[row] += 1
        return sizes

    def sums(self, table: Tensor) -> Tensor:
        """``[members, 3] -> [rows, 3]``: add what belongs to one row, in an order that no number of threads changes."""
        if self.sizes == [1] * len(self.params):
            return table
        # In pieces shorter than what torch shares out to several threads.
        pieces = [torch.split(piece, 4096) for piece in torch.split(table, self.sizes)]
        return torch.stack([torch.stack([part.sum(0) for part in parts]).sum(0) for parts in pieces])

    @property
    def device(self) -> torch.device:
        """Where a rank computes that has no gradient at all, beside others that have."""
        return to_local(self.params[0]).device if self.params else torch.device("cpu")

    @cached_property
    def smallest(self) -> Tensor | None:
        """The smallest member."""
        return min(self.params, key=lambda p: p.numel(), default=None)

    @cached_property
    def _on_device(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def weights(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``gammas`` and ``alphas`` as float64 on ``device``, without a copy from the host, which would synchronise."""
        if is_capturing():
            return filled(self.gammas, device), filled(self.alphas, device)
        if device not in self._on_device:
            self._on_device[device] = filled(self.gammas, device), filled(self.alphas, device)
        return self._on_device[device]

    def are_sound(self, device: torch.device) -> Tensor | bool:
        """Whether the weights are what :func:`check_weight` takes; where the host does not see them, a 0-d tensor."""
        if not any(isinstance(weight, Tensor) for weight in (*self.gammas, *self.alphas)):
            return True
        gamma, alpha = self.weights(device)
        return ((gamma >= 0) & (alpha >= 0) & (gamma + alpha).isfinite()).all()

    def facts(self, ranks: Ranks, forget: Sequence[Tensor | None], retain: Sequence[Tensor | None]) -> str:
        """What has to be the same on all ``ranks``, in words, for :meth:`Ranks.sum_`; empty where there is one rank.

        Args:
            forget, retain: of each member its gradient, or None.
        """
        if not ranks.are_many:
            return ""
        weights = f"gamma {_distinct(self.gammas)}, retain_weight {_distinct(self.alphas)}"
        if not ranks.see_the_same_gradients:
            return f"{len(self.params)} parameters, {weights}"
        places = [[i for i, grad in enumerate(grads) if grad is not None] for grads in (forget, retain)]
        size = sum(p.numel() for p in self.params)
        everywhere = len(places[0]) == len(places[1]) == len(self.params)
        missing = "all of them" if everywhere else f"in the forget phase {places[0]}, in the retain phase {places[1]}"
        return f"{len(self.params)} parameters of {size} elements, gradients of {missing}; {weights}"


class Plan:
    """The parameters of a BLUR as flat lists, and the rows of its last step.

    Args:
        param_groups: of the base optimizer.

    Attributes:
        params: in the order of the param groups.
        groups: of each parameter, the index of its param group.
        dtensors: those of ``params`` that are distributed.
    """

    def __init__(self, param_groups: Sequence[dict[str, Any]]) -> None:
        self._lists = [list(group["params"]) for group in param_groups]
        self.params: list[Tensor] = [p for params in self._lists for p in params]
        self.groups = [index for index, params in enumerate(self._lists) for _ in params]
        self.dtensors = [p for p in self.params if is_dtensor(p)]
        self._rows: Rows | None = None
        self._part: tuple[list[bool] | None, bool] = (None, False)
        self._weights: list[Any] = []

    def holds(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Whether these groups have the parameters of this plan still. accelerate, for one, replaces the lists."""
        return len(param_groups) == len(self._lists) and all(
            same_objects(group["params"], kept) for group, kept in zip(param_groups, self._lists, strict=True)
        )

    def name(self, index: int) -> str:
        """A parameter's place, for an error message."""
        starts = [0, *accumulate(map(len, self._lists))]
        group = self.groups[index]
        return f'param_groups[{group}]["params"][{index - starts[group]}]'

    def rows(self, param_groups: Sequence[dict[str, Any]], takes_part: list[bool] | None, per_parameter: bool) -> Rows:
        """The rows of a step, those of the last one where they are the same.

        Args:
            takes_part: of each parameter; None where all do.
        """
        names = [own_name(name, group) for group in param_groups for name in ("gamma", "retain_weight")]
        weights = [param_groups[i // 2][name] for i, name in enumerate(names)]
        part = (takes_part, per_parameter)
        if self._rows is None or part != self._part:
            self._rows = self._make_rows(names, weights, takes_part, per_parameter)
        elif not _same_weights(weights, self._weights):
            made = self._make_rows(names, weights, takes_part, per_parameter)
            self._rows = replace(self._rows, gammas=made.gammas, alphas=made.alphas)
        self._part, self._weights = part, weights
        return self._rows

    def _make_rows(
        self, names: list[str], weights: list[Any], takes_part: list[bool] | None, per_parameter: bool
    ) -> Rows:
        chosen = range(len(self.params)) if takes_part is None else [i for i, part in enumerate(takes_part) if part]
        params = self.params if takes_part is None else [self.params[i] for i in chosen]
        groups = [self.groups[i] for i in chosen]
        row_groups = groups if per_parameter else list(range(len(self._lists)))
        checked = list(map(_checked, names, weights))
        gammas, alphas = checked[0::2], checked[1::2]
        rows = list(range(len(params))) if per_parameter else groups
        return Rows(params, rows, groups, [gammas[g] for g in row_groups], [alphas[g] for g in row_groups])


def _same_weights(some: list[Any], others: list[Any]) -> bool:
    # A tensor's value may have been changed in place.
    return not any(isinstance(weight, Tensor) for weight in (*some, *others)) and some == others


def _checked(name: str, value: Any) -> Weight:
    # To read a value from a device would synchronise; there it is checked beside the dots.
    return value if isinstance(value, Tensor) and value.device.type != "cpu" else check_weight(name, value)


def _distinct(weights: Sequence[Weight]) -> list[Any]:
    return sorted({weight for weight in weights if not isinstance(weight, Tensor)})


def filled(values: Sequence[Weight], device: torch.device) -> Tensor:
    """``torch.tensor(values)`` without its host-to-device copy, which would synchronise: runs become fills."""
    runs: list[tuple[Weight, int]] = []
    for value in values:
        if runs and (runs[-1][0] is value or (not isinstance(value, Tensor) and runs[-1][0] == value)):
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    empty = torch.empty(0, dtype=torch.float64, device=device)
    return torch.cat(
        [
            empty,
            *(
                value.detach().to(device, torch.float64).reshape(1).expand(count)
                if isinstance(value, Tensor)
                else empty.new_full((count,), value)
                for value, count in runs
            ),
        ]
    )
