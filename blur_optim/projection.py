"""From two sets of gradients to one: dots, coefficients, blend. The numbers of BLUR, without its bookkeeping."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blur_optim.gradients import Pair, PairedGradients
from blur_optim.kernels import Backend
from blur_optim.rules import Dots, Rule, update_norm_sq


@dataclass(frozen=True)
class Projector:
    """The settings of :class:`blur_optim.BLUR` that the numbers depend on.

    Args:
        rule: from ``[rows]`` dots to ``[rows]`` coefficients.
        sum_rows: the rule sees the sums over all rows (``scope="global"``) rather than each row's own dots.
    """

    backend: Backend
    rule: Rule
    sum_rows: bool
    max_grad_norm: float | None


@dataclass(frozen=True)
class Projection:
    """What :func:`project_` computed on the way.

    Args:
        dots: three ``[rows]`` tensors, each row's own part.
        a, b: ``[rows]``, clipping included.
        update_norm: 0-d, clipping included.
        found_inf: 0-d float32, 1 where a dot is not finite. The form that fused optimizers take.
    """

    dots: Dots
    a: Tensor
    b: Tensor
    update_norm: Tensor
    found_inf: Tensor


def project_(gradients: PairedGradients, settings: Projector, grad_scale: Tensor | float | None = None) -> Projection:
    """Replace ``retain`` of every pair by the update (``forget``, where retain is absent).

    Args:
        grad_scale: factor that both losses were multiplied with. The update carries it too; dots, norms, clipping and
            the coefficients are those without it.

    Cost: one pass that reads both gradients, one that reads both and writes one. No host synchronisation.
    """
    by_device: dict[torch.device, list[Pair]] = defaultdict(list)
    for pair in gradients.pairs:
        by_device[pair.device].append(pair)

    table = torch.zeros(len(gradients.gammas), 3, dtype=torch.float64, device=gradients.device)
    for pairs in by_device.values():
        table += _dots(pairs, len(table), settings.backend).to(table.device, non_blocking=True)

    gamma, alpha = (_filled(values, table.device) for values in (gradients.gammas, gradients.alphas))
    projection = _solve(table, gamma, alpha, settings, grad_scale)
    coefficients = torch.stack([projection.a, projection.b], dim=1)
    for device, pairs in by_device.items():
        settings.backend.multi_tensor_blend_(
            [pair.retain for pair in pairs],
            [pair.forget for pair in pairs],
            coefficients.to(device, non_blocking=True),
            [pair.row for pair in pairs],
        )
    return projection


def _dots(pairs: Sequence[Pair], rows: int, backend: Backend) -> Tensor:
    return backend.multi_tensor_dots(
        [pair.forget for pair in pairs], [pair.retain for pair in pairs], [pair.row for pair in pairs], rows
    )


def _solve(
    table: Tensor, gamma: Tensor, alpha: Tensor, settings: Projector, grad_scale: Tensor | float | None
) -> Projection:
    """The scalar part: from the ``[rows, 3]`` dots to the coefficients."""
    found_inf = (~table.isfinite().all()).float()
    if grad_scale is not None:
        table = table / grad_scale / grad_scale
    own = Dots(*table.unbind(1))
    shared = Dots(*table.sum(0).expand_as(table).unbind(1)) if settings.sum_rows else own
    a, b = settings.rule(shared, gamma, alpha)
    norm = update_norm_sq(own, a, b).sum().sqrt()
    if settings.max_grad_norm is not None:
        # The formula of torch.nn.utils.clip_grad_norm_, its 1e-6 included.
        clip = (settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        a, b, norm = a * clip, b * clip, norm * clip
    return Projection(own, a, b, norm, found_inf)


def _filled(values: list[float], device: torch.device) -> Tensor:
    """``torch.tensor(values)`` without its host-to-device copy, which would synchronise: runs become fills."""
    runs: list[tuple[float, int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    empty = torch.empty(0, dtype=torch.float64, device=device)
    return torch.cat([empty, *(empty.new_full((count,), value) for value, count in runs)])
