"""What is compared: a forget loss, a retain loss, and how their two gradients are combined."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from shared_lib.errors import InputError
from torch import nn

from blur_optim import BLUR

from .baselines import Dampening, DualMoments, ForgetGain, PrimalDual, RetainNormal
from .retain_metric import RetainMetric
from .robust import AveragedCosine, AveragedDots, Bloop
from .torchjd_rules import pcgrad, upgrad
from .two_gradients import TwoGradients

FORGET_LOSSES = ("ga", "npo", "simnpo", "dpo", "rmu", "hinge", "margin")
RETAIN_LOSSES = ("nll", "kl", "rmu")
FORGET_ONLY = "forget-only"
BASELINE = "weighted_sum"

RETAIN_METRIC: dict[str, Any] = {"metric": "retain", "betas": (0.9, 0.99)}
DAMPINGS, BETAS = ("0.1", "0.001", "0"), ("0.9", "0.999")  # beside 0.01 and 0.99
#: By name: options of BLUR. A class under "rule" is called for every run anew, for it remembers.
COMBINATIONS: dict[str, dict[str, Any]] = {
    BASELINE: {"rule": "weighted_sum"},
    "blur": {"rule": "blur"},
    "normalized": {"rule": "normalized"},
    "blur-normalized": {"rule": "blur", "normalize": True},
    "blur-per-parameter": {"rule": "blur", "scope": "parameter"},
    "conflict": {"rule": "conflict"},
    "conflict-normalized": {"rule": "conflict", "normalize": True},
    "barrier": {"rule": "barrier"},
    "retain_first": {"rule": "retain_first"},
    "averaged-dots": {"rule": AveragedDots},
    "averaged-cosine": {"rule": AveragedCosine},
    "upgrad": {"rule": upgrad},
    "pcgrad": {"rule": pcgrad},
    "forget-gain": {"rule": ForgetGain},
    "blur-metric": {"rule": "blur", **RETAIN_METRIC},
    "metric-per-parameter": {"rule": "blur", **RETAIN_METRIC, "scope": "parameter"},
    "sum-metric": {"rule": "weighted_sum", **RETAIN_METRIC},
    "normalized-metric": {"rule": "normalized", **RETAIN_METRIC},
    "metric-warm-v": {"rule": "blur", **RETAIN_METRIC},
    **{f"metric-damping-{value}": {"rule": "blur", **RETAIN_METRIC, "damping": float(value)} for value in DAMPINGS},
    **{f"metric-beta-{value}": {"rule": "blur", **RETAIN_METRIC, "betas": (0.9, float(value))} for value in BETAS},
}
#: By name: batches of retain rows whose gradients the metric sees before the first step, which by itself begins cold.
SEEN_BEFORE = {"metric-warm-v": 50}
#: By name: what makes an update of its own, of parameters, ``gamma`` and AdamW's options.
OWN: dict[str, Callable[..., TwoGradients]] = {
    "bloop": Bloop,
    "dual-moments": DualMoments,
    "retain-normal": RetainNormal,
    "primal-dual": PrimalDual,
    "dampening": Dampening,
}


#: By name: options of RetainMetric, for what the library's ``metric="retain"`` has no option to leave out or exchange.
ABLATIONS: dict[str, dict[str, Any]] = {
    "metric-of-sum": {"second_moment_of": "sum"},
    "metric-power-1": {"power": 1.0},
    "metric-no-floor": {"floor": 0.0},
    "metric-damped-by-tensor": {"damping_scope": "parameter"},
}


class Method(NamedTuple):
    """One way to unlearn. Its id, such as ``npo+nll/blur``, is how tables and files name it."""

    forget_loss: str
    retain_loss: str
    combine: str

    @property
    def id(self) -> str:
        losses = self.forget_loss if self.combine == FORGET_ONLY else f"{self.forget_loss}+{self.retain_loss}"
        return f"{losses}/{self.combine}"

    @property
    def baseline(self) -> Method:
        """The weighted sum of the same losses."""
        return self._replace(combine=BASELINE)


def parse_method(text: str) -> Method:
    """Return the method with this id.

    Raises:
        InputError: there is none; says which parts there are.
    """
    losses, _, combine = text.partition("/")
    forget_loss, _, retain_loss = losses.partition("+")
    method = Method(forget_loss, retain_loss or ("rmu" if forget_loss == "rmu" else "nll"), combine)
    combinations = (*COMBINATIONS, *OWN, *ABLATIONS, FORGET_ONLY)
    if forget_loss in FORGET_LOSSES and method.retain_loss in RETAIN_LOSSES and combine in combinations:
        if (forget_loss == "rmu") != (method.retain_loss == "rmu"):
            raise InputError(f"--methods: rmu goes with rmu, got {text!r}. Its losses are distances of activations.")
        if method.id != text:  # Results are kept and compared by id: a second spelling would be a second method.
            raise InputError(f"--methods: write {method.id!r} for {text!r}.")
        return method
    raise InputError(
        f"--methods must be FORGET+RETAIN/COMBINATION, got {text!r}. FORGET is one of {', '.join(FORGET_LOSSES)}; "
        f"RETAIN of {', '.join(RETAIN_LOSSES)}; COMBINATION of {', '.join(combinations)}."
    )


def make_optimizer(
    method: Method, params: Iterable[nn.Parameter], weight: float, lr: float, steps: int
) -> BLUR | TwoGradients:
    """Return what takes ``step(forget, retain)``, over AdamW; gamma is ``weight`` and alpha 1 in every combination."""
    adamw: dict[str, Any] = {"base": torch.optim.AdamW, "lr": lr, "weight_decay": 0.01}
    if method.combine == FORGET_ONLY:
        return BLUR(params, rule="weighted_sum", gamma=1.0, retain_weight=0.0, **adamw)
    if method.combine == "dampening":
        return Dampening(params, gamma=weight, steps=steps, **adamw)
    if method.combine in OWN:
        return OWN[method.combine](params, gamma=weight, **adamw)
    if method.combine in ABLATIONS:
        return RetainMetric(params, gamma=weight, **ABLATIONS[method.combine], **adamw)
    options = dict(COMBINATIONS[method.combine])
    if isinstance(options["rule"], type):
        options["rule"] = options["rule"]()
    return BLUR(params, gamma=weight, **options, **adamw)


def weight_scale(method: Method, unit_scale: float) -> float:
    """Return the largest weight that may be of use: the grid of weights goes down from it.

    Found on the tuning seed of TOFU. NPO and DPO are sums over an answer's tokens, of which there are some tens; the
    others are means, and unit gradients know no size.
    """
    if "metric" in method.combine or method.combine in ("dampening", "dual-moments"):  # Adam knows no size either.
        return 1.0
    if "normalized" in method.combine:
        return unit_scale
    return {"npo": 0.1, "dpo": 0.1, "rmu": 3.0, "margin": 0.01}.get(method.forget_loss, 1.0)
