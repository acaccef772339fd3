"""From two sets of gradients to one: dots, coefficients, blend. The numbers of BLUR, without its bookkeeping."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from blur_optim.kernels import select_backend
from blur_optim.step.pairs import PairedGradients
from blur_optim.step.plan import Rows
from blur_optim.step.rules import Dots, update_norm_sq
from blur_optim.step.settings import Settings


class MetricSums(NamedTuple):
    r"""What the dots in the metric say of each row, or of each parameter: ``[rows]`` float64 tensors.

    Args:
        dots: :math:`\langle g_r, P g_f\rangle, \langle g_f, P g_f\rangle, \langle g_r, P g_r\rangle`.
        forget_sq, forget_fourth: the sums of :math:`(P g_f)^2` and :math:`(P g_f)^4` over the coordinates.
        numel: the number of coordinates.
    """

    dots: Dots
    forget_sq: Tensor
    forget_fourth: Tensor
    numel: Tensor

    @classmethod
    def of(cls, table: Tensor) -> "MetricSums":
        return cls(Dots(*table[:, 3:6].unbind(1)), table[:, 6], table[:, 7], table[:, 9])


@dataclass(frozen=True)
class Projection:
    """What :func:`project` computed.

    Args:
        dots: three ``[rows]`` tensors, each row's own part.
        a, b: ``[rows]``, clipping included; NaN where ``found_inf`` is set.
        update_norm: 0-d, clipping included.
        found_inf: 0-d float32, 1 where a dot is not finite. The form that fused optimizers take.
        params: those that took part, in the order of the param groups.
        parameter_dots: three ``[len(params)]`` tensors, where they were asked for.
        in_metric, parameters_in_metric: the same in the metric of the retain loss, where the step has one.
    """

    dots: Dots
    a: Tensor
    b: Tensor
    update_norm: Tensor
    found_inf: Tensor
    params: list[Tensor]
    parameter_dots: Dots | None = None
    in_metric: MetricSums | None = None
    parameters_in_metric: MetricSums | None = None

    @property
    def coefficients(self) -> Tensor:
        """``[rows, 2]``: (a, b)."""
        return torch.stack([self.a, self.b], dim=1)


def project(gradients: PairedGradients, settings: Settings, grad_scale: Tensor | float | None = None) -> Projection:
    """Compute the coefficients of the update from one pass over both gradients, which are not modified.

    Args:
        grad_scale: factor that both losses were multiplied with. The update carries it too; dots, norms, clipping and
            the coefficients are those without it.

    No host synchronisation. One all-reduce where parameters are sharded.
    """
    table = gradients.ranks.sum_(take_dots(gradients, settings), gradients.facts)
    return solve(table, gradients.rows, settings, grad_scale)


def take_dots(gradients: PairedGradients, settings: Settings) -> Tensor:
    """``[rows, 3]`` float64: <g_r, g_f>, |g_f|^2, |g_r|^2 of each row, this rank's part.

    With ``record_alignment``: of each member.
    """
    by_member = settings.record_alignment
    rows = len(gradients.rows.params if by_member else gradients.rows.gammas)
    table = torch.zeros(rows, 3, dtype=torch.float64, device=gradients.device)
    for pairs in gradients.batches():
        places = pairs.members if by_member else pairs.rows
        backend = select_backend(settings.backend, pairs.device)
        dots = backend.multi_tensor_dots(pairs.forget, pairs.retain, places, rows, pairs.scales)
        table += dots.to(table.device, non_blocking=True).mul_(pairs.weight)
    return table


def blend_(gradients: PairedGradients, coefficients: Tensor, backend: str | None) -> None:
    """Replace ``retain`` of every pair by the update (``forget``, where retain is absent), in one pass.

    Args:
        coefficients: ``[rows, 2]``.
    """
    for pairs in gradients.batches():
        here = coefficients.to(pairs.device, non_blocking=True)
        chosen = select_backend(backend, pairs.device)
        chosen.multi_tensor_blend_(pairs.retain, pairs.forget, here, pairs.rows, pairs.scales)


def solve(table: Tensor, rows: Rows, settings: Settings, grad_scale: Tensor | float | None = None) -> Projection:
    """The scalar part: from the dots, as :func:`take_dots` has them, to the coefficients."""
    gamma, alpha = rows.weights(table.device)
    found_inf = (~(table.isfinite().all() & rows.are_sound(table.device))).float()
    if grad_scale is not None:
        table = table / grad_scale / grad_scale
    parameter_dots = Dots(*table.unbind(1)) if settings.record_alignment else None
    table = rows.sums(table) if settings.record_alignment else table
    own = Dots(*table.unbind(1))
    shared = Dots(*table.sum(0).expand_as(table).unbind(1)) if settings.sum_rows else own
    a, b = settings.row_rule(shared, gamma, alpha)
    # What is not finite must show in the update too: a GradScaler lowers its scale only if it finds it there, and dots
    # overflow before gradients do.
    a, b = (torch.where(found_inf > 0, torch.nan, x) for x in (a, b))
    projection = Projection(own, a, b, a.new_zeros(()), found_inf, rows.params, parameter_dots)
    return clipped(projection, settings.max_grad_norm)


def clipped(projection: Projection, max_grad_norm: float | None) -> Projection:
    """Compute the norm of the update from the dots, and scale the coefficients where it is larger than allowed."""
    a, b = projection.a, projection.b
    norm = update_norm_sq(projection.dots, a, b).sum().sqrt()
    if max_grad_norm is None:
        return replace(projection, update_norm=norm)
    # The formula of torch.nn.utils.clip_grad_norm_, its 1e-6 included.
    clip = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    return replace(projection, a=a * clip, b=b * clip, update_norm=norm * clip)
