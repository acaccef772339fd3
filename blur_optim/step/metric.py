r"""The metric of the retain loss: dots in it, and the coefficients that a rule makes of them.

:math:`M = \mathrm{diag}(\sqrt{\hat v + \delta\bar v} + \epsilon)` and :math:`P = M^{-1}`, where :math:`\hat v` is the
bias-corrected running mean of :math:`g_r^2` and :math:`\bar v` its mean over all coordinates, as the step before left
it. It is the denominator of Adam, in which the forget gradient has no part. See docs/method.md.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from blur_optim.kernels import BACKENDS, Backend, select_backend
from blur_optim.optimizer_wrapper import supports_amp_scaling
from blur_optim.parallel.ranks import to_local
from blur_optim.step.fused import fits
from blur_optim.step.gradients import Pair, PairedGradients
from blur_optim.step.plan import Rows, filled
from blur_optim.step.projection import MetricSums, Projection, clipped
from blur_optim.step.rules import Dots
from blur_optim.step.settings import Settings
from blur_optim.step.stash import real

#: The param groups' entry with the mean of v-hat, 0-d float64; NaN before the first step. Its presence says that
#: ``exp_avg_sq`` is the second moment of the retain gradient.
MEAN = "retain_mean_sq"
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
# SGD has no eps.
_EPS = 1e-8
# Columns of the table beside those of the kernels' dots.
_COLUMNS = 10


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
        if not group.get("eps", _EPS) >= 1e-30:
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


def check_beta(value: Any) -> None:
    """Refuse a rate of v that is none."""
    if not (isinstance(value, Real) and 0 <= float(value) < 1):
        raise ValueError(f"`{BETA}` must be a number in [0, 1), got {value!r}.")


def beta2(group: dict[str, Any]) -> float:
    """The rate of v in this param group."""
    return float(group["betas"][1] if "betas" in group else group[BETA])


def init_state(base: Optimizer, params: Iterable[Tensor]) -> None:
    """Make the state of ``params``, those with a gradient, as the base makes it; for SGD v and its step count too."""
    if not isinstance(base, SGD):
        for group in base.param_groups:
            cast(Any, base)._init_group(group, *([] for _ in range(6)))
        return
    for p in params:
        state = base.state[p]
        if "exp_avg_sq" not in state:
            device = to_local(p).device if supports_amp_scaling(base) else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)


def numbers(
    base: Optimizer,
    pairs: Sequence[Pair],
    mean: Tensor | None,
    damping: float,
    grad_scale: Tensor | float | None = None,
) -> Tensor:
    """The kernels' ``metric`` for ``pairs``, for the step that is next by their counts.

    Args:
        mean: of v-hat; None: no damping.
        grad_scale: what both losses were multiplied with.
    """
    device = pairs[0].device
    groups = [base.param_groups[pair.group] for pair in pairs]
    rate = filled([beta2(group) for group in groups], device)
    steps = torch.stack([base.state[pair.param]["step"] for pair in pairs]).to(device, torch.float64, non_blocking=True)
    rest = 1 - rate
    if grad_scale is not None:
        rest = rest / grad_scale / grad_scale
    damp = torch.zeros_like(rate) if mean is None else (damping * mean.to(device)).expand_as(rate)
    eps = filled([float(group.get("eps", _EPS)) for group in groups], device)
    return torch.stack([rate, rest, 1 / (1 - rate ** (steps + 1)), damp, eps], dim=1)


def given(metric: Tensor) -> Tensor:
    """``metric`` with v taken as it is: it has advanced already."""
    return torch.cat([torch.ones_like(metric[:, :1]), torch.zeros_like(metric[:, :1]), metric[:, 2:]], dim=1)


def take_metric_dots(
    base: Optimizer,
    gradients: PairedGradients,
    settings: Settings,
    mean: Tensor | None,
    grad_scale: Tensor | float | None,
) -> Tensor:
    """``[rows, 10]`` float64: the kernels' nine dots of each row and its number of elements, this rank's part.

    With ``record_alignment``: of each member.
    """
    rows = len(gradients.rows.params if settings.record_alignment else gradients.rows.gammas)
    table = torch.zeros(rows, _COLUMNS, dtype=torch.float64, device=gradients.device)
    for batch in gradients.batches():
        device = batch.device
        for kernels, pairs in by_kernels(base, batch.each(), settings.backend):
            own_rows = [pair.member if settings.record_alignment else pair.row for pair in pairs]
            dots = kernels.multi_tensor_metric_dots(
                [pair.forget for pair in pairs],
                [pair.retain for pair in pairs],
                moments(base, pairs, "exp_avg_sq"),
                largest_moments(base, pairs),
                own_rows,
                rows,
                numbers(base, pairs, mean, settings.damping, grad_scale),
                block_scales(pairs),
            )
            counts = [0.0] * rows
            for row, pair in zip(own_rows, pairs, strict=True):
                counts[row] += max(pair.forget.numel(), pair.retain.numel())
            part = torch.cat([dots, filled(counts, device)[:, None]], dim=1)
            table += part.to(table.device, non_blocking=True).mul_(batch.weight)
    return table


def by_kernels(base: Optimizer, pairs: Sequence[Pair], backend: str | None) -> Iterator[tuple[Backend, list[Pair]]]:
    """The pairs of one device with the backend for them: foreach for those that others do not take.

    Whether there is amsgrad or not is one for all pairs of a list.
    """
    chosen = select_backend(backend, pairs[0].device)
    kinds: dict[tuple[bool, bool], list[Pair]] = {}
    for pair in pairs:
        state = base.state[pair.param]
        kinds.setdefault((fits(pair, state), bool(base.param_groups[pair.group].get("amsgrad"))), []).append(pair)
    for (is_usual, _), mine in kinds.items():
        yield chosen if is_usual else BACKENDS["foreach"], mine


def block_scales(pairs: Sequence[Pair]) -> list[Tensor]:
    """The kernels' ``scales``: empty where nothing is int8."""
    if all(pair.scales is None for pair in pairs):
        return []
    return [pair.retain if pair.scales is None else pair.scales for pair in pairs]


def moments(base: Optimizer, pairs: Iterable[Pair], name: str) -> list[Tensor]:
    """The state called ``name``, real and local."""
    return [real(to_local(base.state[pair.param][name])) for pair in pairs]


def largest_moments(base: Optimizer, pairs: Sequence[Pair]) -> list[Tensor]:
    has_largest = bool(pairs and base.param_groups[pairs[0].group].get("amsgrad"))
    return moments(base, pairs, "max_exp_avg_sq") if has_largest else []


def mean_of(table: Tensor, found_inf: Tensor, before: Tensor | None) -> Tensor:
    """0-d: the mean of v-hat after this step; as ``before`` where the step is skipped or saw no element."""
    total = table.sum(0)
    mean = total[8] / total[9]
    kept = torch.full_like(mean, torch.nan) if before is None else before.to(mean)
    return torch.where((found_inf > 0) | (total[9] == 0), kept, mean)


def solve_in_metric(table: Tensor, rows: Rows, settings: Settings, grad_scale: Tensor | float | None) -> Projection:
    r"""The scalar part: from the dots, as :func:`take_metric_dots` has them, to the coefficients.

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
