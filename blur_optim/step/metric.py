r"""The metric of the retain loss: dots in it, and the coefficients that a rule makes of them.

:math:`M = \mathrm{diag}(\sqrt{\hat v + \delta\bar v} + \epsilon)` and :math:`P = M^{-1}`, where :math:`\hat v` is the
bias-corrected running mean of :math:`g_r^2` and :math:`\bar v` its mean over all coordinates, as the step before left
it. It is the denominator of Adam, in which the forget gradient has no part. See docs/method.md.
"""

import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from blur_optim.step.plan import Rows
from blur_optim.step.projection import MetricSums, Projection, clipped
from blur_optim.step.rules import Dots
from blur_optim.step.settings import Settings

#: The param groups' entry with the mean of v-hat, 0-d float64; NaN before the first step. Its presence says that
#: ``exp_avg_sq`` is the second moment of the retain gradient.
MEAN = "retain_mean_sq"
#: The state's entry, 0-d, that counts the retain gradients that v has seen beyond the steps that were taken. By phases
#: it sees one before the step, which may then not be taken; its bias correction goes by what it has seen.
AHEAD = "retain_ahead"
#: The param groups' entry with beta2, where the base has none of its own.
BETA = "metric_beta"
#: beta2 for SGD. Between .9 and .999 it makes no difference that could be measured.
DEFAULT_BETA = 0.99
#: The smallest rms of P g_f that the forget gradient is divided by. P g_r is of order 1, so a forget gradient this much
#: weaker than the retain gradient is done with: from there on the forget term fades as its loss wants it to. Without it
#: a bounded loss, whose gradient falls exponentially, is scaled up until float32 overflows.
SMALLEST_RMS = 1e-8
#: Weights that are usual here, where they are steps in units of lr; one outside was likely tuned for plain gradients.
USUAL_WEIGHTS = 0.01, 10.0
#: SGD has no eps.
DEFAULT_EPS = 1e-8


def check_metric_base(base: Optimizer) -> None:
    """Refuse a base that the metric cannot be made for.

    Raises:
        TypeError: ``base`` is not exactly AdamW, Adam or SGD.
        ValueError: a param group is capturable or differentiable, has tensors for betas or momentum, or no eps.
    """
    if type(base) not in (AdamW, Adam, SGD):
        raise TypeError(
            f"`base` must be AdamW, Adam or SGD with metric='retain', got {type(base).__module__.partition('.')[0]}'s "
            f"{type(base).__name__}: the step is taken with a second moment of the retain gradient alone, which its "
            "own step would feed with the update. Use metric='euclidean', or one of these three of torch.optim."
        )
    for group in base.param_groups:
        for name in ("capturable", "differentiable"):
            if group.get(name):
                raise ValueError(
                    f"`{name}` must be False with metric='retain', got True. The step is taken by kernels."
                )
        for name in ("betas", "momentum", "eps", "weight_decay"):
            value = group.get(name, 0.0)
            if any(isinstance(each, Tensor) for each in (value if isinstance(value, tuple | list) else (value,))):
                raise ValueError(f"`{name}` must be a number with metric='retain', got a tensor.")
        if not group.get("eps", DEFAULT_EPS) >= 1e-30:
            raise ValueError(
                f"`eps` must be 1e-30 or more with metric='retain', got {group['eps']!r}: where no retain gradient has "
                "been seen and nothing is damped, it is all that the step is divided by."
            )


def check_metric_stash(stash: str) -> None:
    """Refuse to forget the retain gradients before they have been fed to v."""
    if stash == "recompute":
        raise ValueError(
            "`stash` must not be 'recompute' with metric='retain', which needs the whole retain gradient beside the "
            "forget gradient: its second moments are the metric. Use stash='int8' or 'bfloat16'."
        )


def metric_defaults(base: Optimizer) -> dict[str, Any]:
    """What the param groups hold beside ``gamma`` and ``retain_weight``."""
    mean = {MEAN: torch.full((), torch.nan, dtype=torch.float64)}
    return mean if "betas" in base.defaults else {**mean, BETA: DEFAULT_BETA}


def warn_of_weights(base: Optimizer) -> None:
    """Say so where a weight is of a size that means something else here than it does for plain gradients.

    Warns:
        UserWarning: ``gamma`` or ``retain_weight`` of a param group is outside of ``USUAL_WEIGHTS``; 0 is a choice, and
            so is a small ``retain_weight``.
    """
    least, most = USUAL_WEIGHTS
    for name, term, usual in (("gamma", "forget", "0.3 to 1"), ("retain_weight", "retain", "1")):
        low = least if name == "gamma" else 0.0
        values = {float(g[name]) for g in base.param_groups if isinstance(g[name], Real)}
        if unusual := sorted(value for value in values if value and not low <= value <= most):
            warnings.warn(
                f"`{name}` is {unusual[-1]:g}. With metric='retain' it is the size of the {term} term's step in units "
                f"of lr, whatever the scale of its loss, and {usual} is usual: a value that was tuned without the "
                "metric does not carry over. See docs/method.md.",
                stacklevel=3,
            )


def leave_metric(base: Optimizer, loaded_groups: Sequence[Mapping[str, Any]]) -> None:
    """After a state dict with these groups was loaded into a run without the metric: let go of what is of a run in it.

    Warns:
        UserWarning: there is something.
    """
    if not any(MEAN in group for group in loaded_groups):
        return
    is_sgd = type(base) is SGD  # It has no second moment of its own, nor counts steps.
    for group in base.param_groups:
        for name in (MEAN, BETA) if is_sgd else (MEAN,):
            group.pop(name, None)
    for state in base.state.values():
        for name in (AHEAD, "exp_avg_sq", "step") if is_sgd else (AHEAD,):
            state.pop(name, None)
    meaning = (
        "its learning rate was in units of the metric, which divided each step by the root of the retain gradient's "
        "second moment, and plain SGD does not divide. Pass metric='retain' here too, or set `lr` to one that was "
        "tuned for plain SGD."
        if is_sgd
        else "its `exp_avg_sq` is the second moment of the retain gradient, which may be smaller than that of the "
        "update by far, and the first steps larger. Pass metric='retain' here too, or lower the rate until it is "
        "forgotten."
    )
    warnings.warn(f"The loaded state comes from a run with metric='retain': {meaning}", stacklevel=4)


def check_beta(value: Any) -> None:
    """Refuse a rate of v that is none."""
    if not (isinstance(value, Real) and 0 <= float(value) < 1):
        raise ValueError(f"`{BETA}` must be a number in [0, 1), got {value!r}.")


def beta2(group: dict[str, Any]) -> float:
    """The rate of v in this param group."""
    return float(group["betas"][1] if "betas" in group else group[BETA])


def mean_of(table: Tensor, found_inf: Tensor, before: Tensor | None) -> Tensor:
    """0-d: the mean of v-hat after this step; as ``before`` where the step is skipped or saw no element."""
    total = table.sum(0)
    mean = total[8] / total[9]
    kept = torch.full_like(mean, torch.nan) if before is None else before.to(mean)
    return torch.where((found_inf > 0) | (total[9] == 0), kept, mean)


def solve_in_metric(table: Tensor, rows: Rows, settings: Settings, grad_scale: Tensor | float | None) -> Projection:
    r"""The scalar part: from the dots, as ``take_metric_dots`` has them, to the coefficients.

    The rule sees the dots in the metric of :math:`\hat g_f = s\,g_f` and :math:`g_r`, with
    :math:`s = 1/\mathrm{rms}(P g_f)` over the coordinates of its scope; its :math:`a` is multiplied with s.
    """
    gamma, alpha = rows.weights(table.device)
    # The fourth powers only say how P g_f is spread; where they overflow, nothing else need.
    sound = torch.cat([table[:, :7], table[:, 8:]], dim=1).isfinite().all()
    found_inf = (~(sound & rows.are_sound(table.device))).float()
    if grad_scale is not None:
        scale = torch.as_tensor(grad_scale, dtype=table.dtype, device=table.device).reshape(())
        one, square = torch.ones_like(scale), scale.square()
        table = table / torch.stack([*[square] * 7, square.square(), one, one])
    by_parameter = table if settings.record_alignment else None
    table = rows.sums(table) if settings.record_alignment else table
    shared = table.sum(0).expand_as(table) if settings.sum_rows else table
    in_metric = MetricSums.of(shared)
    rms = torch.where(in_metric.numel > 0, in_metric.forget_sq / in_metric.numel, 0.0).sqrt()
    s = 1 / rms.clamp(min=SMALLEST_RMS)
    dots = in_metric.dots
    scaled = Dots(s * dots.retain_forget, s * s * dots.forget_norm_sq, dots.retain_norm_sq)
    a, b = settings.row_rule(scaled, gamma, alpha)
    a = s * a
    a = torch.where(a.float().isfinite(), a, 0.0)
    a, b = (torch.where(found_inf > 0, torch.nan, x) for x in (a, b))
    own = Dots(*table[:, :3].unbind(1))
    projection = Projection(
        own,
        a,
        b,
        a.new_zeros(()),
        found_inf,
        rows.params,
        None if by_parameter is None else Dots(*by_parameter[:, :3].unbind(1)),
        MetricSums.of(table),
        None if by_parameter is None else MetricSums.of(by_parameter),
    )
    return clipped(projection, settings.max_grad_norm)
