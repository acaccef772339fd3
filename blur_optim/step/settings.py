"""What the numbers of a step depend on beside its gradients: the arguments of BLUR, checked and put together."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

from blur_optim.step.plan import check_weight
from blur_optim.step.rules import RETAIN_NORM_FREE, RULES, Rule, UserRule, on_unit_gradients, per_row

SCOPES = ("global", "group", "parameter")
METRICS = ("euclidean", "retain")


@dataclass(frozen=True)
class Settings:
    """The arguments of :class:`blur_optim.BLUR` that the numbers depend on.

    Args:
        rule, normalize, scope, max_grad_norm, backend, metric, damping: as BLUR takes them.
        record_alignment: take the dots of each parameter, and add them up to those of the rows.

    Raises:
        ValueError: one is out of range.
    """

    rule: str | UserRule = "blur"
    normalize: bool = False
    scope: str = "global"
    max_grad_norm: float | None = None
    backend: str | None = None
    record_alignment: bool = False
    metric: str = "euclidean"
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, SCOPES)
        norm = self.max_grad_norm
        if norm is not None and not (isinstance(norm, Real) and norm > 0):
            raise ValueError(f"`max_grad_norm` must be a positive number or None, got {norm!r}.")
        if not callable(self.rule):
            check_choice("rule", self.rule, RULES)
        check_choice("metric", self.metric, METRICS)
        check_weight("damping", self.damping)

    @cached_property
    def row_rule(self) -> Rule:
        """From ``[rows]`` dots to ``[rows]`` coefficients."""
        rule = per_row(self.rule) if callable(self.rule) else RULES[self.rule]
        return on_unit_gradients(rule) if self.normalize else rule

    @property
    def row_per_parameter(self) -> bool:
        """A row for each parameter, else one for each param group."""
        return self.scope == "parameter"

    @property
    def sum_rows(self) -> bool:
        """The rule sees the sums over all rows rather than each row's own dots."""
        return self.scope == "global"

    @property
    def needs_scale(self) -> bool:
        """The update depends on the size of the gradients, so that a loss scale has to be known."""
        depends = self.normalize or self.rule == "normalized" or callable(self.rule) or self.max_grad_norm is not None
        return depends or self.metric != "euclidean"

    @property
    def needs_retain_norm(self) -> bool:
        """The rule looks at the norm of the retain gradient."""
        return self.normalize or self.rule not in RETAIN_NORM_FREE


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse a name that is not among ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {sorted(choices)}, got {value!r}.")
