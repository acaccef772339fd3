"""The pairs of a step in the metric, with the base's state in the form that kernels take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from blur_optim.kernels import BACKENDS, Backend, select_backend
from blur_optim.optimizer_wrapper import supports_amp_scaling
from blur_optim.parallel.ranks import to_local, to_locals
from blur_optim.step.base_state import BaseState, Counts
from blur_optim.step.fitting import lacks_largest, which_fit
from blur_optim.step.metric import AHEAD, DEFAULT_EPS, beta2
from blur_optim.step.pairs import Pairs
from blur_optim.step.plan import any_missing, filled
from blur_optim.step.stash import real

if TYPE_CHECKING:
    from typing_extensions import Self  # Of typing since 3.11.


@dataclass
class MetricPairs(Pairs):
    """Pairs with the state of their parameters, real and local.

    Args:
        locals: the parameters' own local tensors.
        exp_avgs: empty for SGD.
        max_exp_avg_sqs: None where a param group is without amsgrad, empty where all are.
        momentum_buffers: None where there is none yet, empty for Adam.
        usual: whether each is such that kernels take it; empty where all are. Others are left to foreach.
        steps: ``[n]`` float32: the number of this step, from 1.
        metric: ``[n, 5]``, as kernels take it.
    """

    locals: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor | None] = field(default_factory=list)
    momentum_buffers: list[Tensor | None] = field(default_factory=list)
    usual: list[bool] = field(default_factory=list)
    steps: Tensor = field(default_factory=lambda: torch.empty(0))
    metric: Tensor = field(default_factory=lambda: torch.empty(0, 5))

    def select(self, indices: Sequence[int]) -> Self:
        chosen = super().select(indices)
        # No index on the device: that would be a copy from the host, which synchronises.
        chosen.steps = torch.stack([self.steps[i] for i in indices])
        chosen.metric = torch.stack([self.metric[i] for i in indices])
        return chosen

    def part(self, start: int, stop: int) -> Self:
        chosen = super().part(start, stop)
        if chosen is not self:
            chosen.steps, chosen.metric = self.steps[start:stop], self.metric[start:stop]
        return chosen

    def by_kernels(self, backend: str | None) -> Iterator[tuple[Backend, Self]]:
        """In lists that one kernel call takes, with the backend for them; all on one device.

        Whether there is amsgrad or not is one for all pairs of a list.
        """
        chosen = select_backend(backend, self.device)
        if not self.usual and not any_missing(self.max_exp_avg_sqs):
            yield chosen, self
            return
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for i in range(len(self)):
            has_largest = bool(self.max_exp_avg_sqs) and self.max_exp_avg_sqs[i] is not None
            kinds.setdefault((not self.usual or self.usual[i], has_largest), []).append(i)
        for (is_usual, has_largest), indices in kinds.items():
            mine = self.select(indices)
            if not has_largest:
                mine.max_exp_avg_sqs = []
            yield chosen if is_usual else BACKENDS["foreach"], mine


class MetricState:
    """The state of one base optimizer in the metric, and what is kept of it from step to step."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        self._state: BaseState | None = None
        self._fills: dict[str, tuple[list[int], list[float], Tensor]] = {}
        self._sizes: tuple[list[int], list[int], Tensor] | None = None

    @contextmanager
    def made_for(self, pairs: Pairs) -> Iterator[None]:
        """With the state that the dots read; what is new of it is gone again where they, or the rule, fail."""
        params, needed = pairs.params, ("exp_avg_sq", "step", AHEAD)
        if not any(map(any_missing, self._read(params, needed))):
            yield
            return
        if any(group.get("amsgrad") for group in self.base.param_groups):
            self._read(params, ("max_exp_avg_sq", "step"))
            self._check_largest(pairs)
        before = {p: dict(self.base.state[p]) if p in self.base.state else None for p in params}
        try:
            init_state(self.base, params)
            yield
        except BaseException:
            for p, state in before.items():
                if state is None:
                    self.base.state.pop(p, None)
                else:
                    self.base.state[p] = state
            raise

    def attached(self, pairs: Pairs, contiguous: bool) -> MetricPairs:
        """The pairs with their state, which is there; ``steps`` and ``metric`` are not filled in yet."""
        sgd, groups = isinstance(self.base, SGD), self.base.param_groups
        amsgrad = [bool(group.get("amsgrad")) for group in groups]
        names = ["momentum_buffer" if sgd else "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if any(amsgrad) else [])]
        moments = self._read(pairs.params, (*names, "step", AHEAD))[: len(names)]
        self._check_largest(pairs)
        if any(amsgrad) and not all(amsgrad):
            moments[2] = [t if amsgrad[g] else None for t, g in zip(moments[2], pairs.groups, strict=True)]
        assert self._state is not None
        if any_missing(moments[1]):
            raise RuntimeError(
                "p.grad must hold the update alone when opt.step() is called, got a gradient of a parameter for which "
                "neither phase left one. With metric='retain' every gradient belongs in one of the two phases."
            )
        usual = which_fit(self._state, to_locals(pairs.params), pairs, moments, contiguous)
        params, first, second, *largest = (_reals(ts, bool(usual)) for ts in (pairs.params, *moments))
        return MetricPairs(
            **vars(pairs),
            locals=cast(list[Tensor], params),
            exp_avgs=[] if sgd else cast(list[Tensor], first),
            exp_avg_sqs=cast(list[Tensor], second),
            max_exp_avg_sqs=largest[0] if largest else [],
            momentum_buffers=first if sgd else [],
            usual=usual,
        )

    def fill_in(
        self, pairs: MetricPairs, mean: Tensor | None, damping: float, grad_scale: Tensor | float | None = None
    ) -> None:
        """Fill in ``steps`` and ``metric`` for the step that is next by the counts of ``pairs``, just attached.

        Args:
            mean: of v-hat; None: no damping.
            grad_scale: what both losses were multiplied with.
        """
        seen, rate = self._fill_steps(pairs)
        rest = 1 - rate
        if grad_scale is not None:
            rest = rest / grad_scale / grad_scale
        self._fill_metric(pairs, rate, rest, 1 / (1 - rate ** (seen + 1)), mean, damping)

    def fill_in_given(self, pairs: MetricPairs, mean: Tensor, damping: float) -> None:
        """The same, with v taken as it is: it has advanced already."""
        seen, rate = self._fill_steps(pairs)
        self._fill_metric(pairs, torch.ones_like(rate), torch.zeros_like(rate), 1 / (1 - rate**seen), mean, damping)

    def counts(self, name: str) -> Counts:
        """``"step"`` or ``AHEAD`` of the pairs that were attached last."""
        assert self._state is not None
        return self._state.counts(name)

    def sizes(self, pairs: Pairs, rows: list[int], num_rows: int) -> Tensor:
        """``[rows]`` float64: the number of elements of each row."""
        numels = list(map(max, map(Tensor.numel, pairs.forget), map(Tensor.numel, pairs.retain)))
        known = self._sizes
        if known is not None and known[0] is rows and known[1] == numels and known[2].device == pairs.device:
            return known[2]
        counts = [0.0] * num_rows
        for row, numel in zip(rows, numels, strict=True):
            counts[row] += numel
        self._sizes = rows, numels, filled(counts, pairs.device)
        return self._sizes[2]

    def _read(self, params: Sequence[Tensor], names: Sequence[str]) -> list[list[Any]]:
        if self._state is None or not self._state.holds(self.base, params):
            self._state = BaseState(self.base, params)
        return self._state.read(names)

    def _check_largest(self, pairs: Pairs) -> None:
        """Refuse a step that would count and feed v before a kernel finds that amsgrad has nothing to go by."""
        assert self._state is not None
        if lacks_largest(self.base, self._state.entries, pairs.groups):
            raise RuntimeError(
                "`amsgrad` must be False in a param group whose state was made without it, got True: there is no "
                "`max_exp_avg_sq`. Set it where the optimizer is made; or, to begin with the second moment of now, "
                "state[p]['max_exp_avg_sq'] = state[p]['exp_avg_sq'].clone() for each parameter of the group."
            )

    def _fill_steps(self, pairs: MetricPairs) -> tuple[Tensor, Tensor]:
        """Fill in ``steps``; ``[n]`` float64: the retain gradients that v has seen, and the rate of v."""
        taken = self.counts("step").read(pairs.device, torch.float32)
        pairs.steps = taken + 1
        seen = taken.double() + self.counts(AHEAD).read(pairs.device, torch.float64)
        return seen, self._filled("beta2", [beta2(group) for group in self.base.param_groups], pairs)

    def _fill_metric(
        self, pairs: MetricPairs, rate: Tensor, rest: Tensor, correction: Tensor, mean: Tensor | None, damping: float
    ) -> None:
        damp = torch.zeros_like(rate) if mean is None else (damping * mean.to(pairs.device)).expand_as(rate)
        eps = self._filled("eps", [float(group.get("eps", DEFAULT_EPS)) for group in self.base.param_groups], pairs)
        pairs.metric = torch.stack([rate, rest, correction, damp, eps], dim=1)

    def _filled(self, name: str, by_group: list[float], pairs: Pairs) -> Tensor:
        """``[n]`` float64, the value of each pair's group; the tensor of the last step where nothing has changed."""
        known = self._fills.get(name)
        if known is not None and known[0] is pairs.groups and known[1] == by_group and known[2].device == pairs.device:
            return known[2]
        values = filled([by_group[group] for group in pairs.groups], pairs.device)
        self._fills[name] = pairs.groups, by_group, values
        return values


def init_state(base: Optimizer, params: Sequence[Tensor]) -> None:
    """Make the state of ``params``, those with a gradient, as the base makes it, for SGD v and its step count too."""
    if not isinstance(base, SGD):
        for group in base.param_groups:
            cast(Any, base)._init_group(group, *([] for _ in range(6)))
    for p in params:
        state, device = base.state[p], to_local(p).device
        if "exp_avg_sq" not in state:
            where = device if supports_amp_scaling(base) else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=where)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if AHEAD not in state:
            state[AHEAD] = torch.zeros((), dtype=torch.float32, device=device)


def _reals(tensors: Sequence[Any], unusual: bool) -> list[Any]:
    """Local tensors, complex ones as their parts; None stays."""
    if not unusual and not any_missing(tensors):
        return to_locals(tensors)
    return [None if t is None else real(to_local(t)) for t in tensors]
