"""What one step saw: norms, cosine, coefficients, as device tensors that cost nothing until they are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blur_optim.step.projection import MetricSums, Projection
from blur_optim.step.rules import Dots


@dataclass(frozen=True)
class StepStatistics:
    r"""Hold the dots and coefficients of a step and derive from them what people plot.

    Every property is a tensor on the gradients' device, computed when it is asked for; none synchronises with the host.
    Under a loss scale that BLUR was told of, all values are those of the unscaled gradients.

    Args:
        dots: three ``[rows]`` float64 tensors. One row per param group, or per parameter with ``scope="parameter"``.
        forget_coefficient: ``[rows]`` float64: a in :math:`u = a g_f + b g_r`, the paper's :math:`\xi`, after clipping.
        retain_coefficient: ``[rows]`` float64: b, after clipping.
        update_norm: 0-d float64: :math:`\|u\|`, after clipping.
        skipped: 0-d int64: steps skipped so far because a gradient was not finite.
        params: the parameters that took part, in the order of the param groups.
        parameter_dots: three ``[len(params)]`` float64 tensors, over all ranks, where ``BLUR.record_alignment`` was
            set before the step.
        in_metric, parameters_in_metric: the dots in the metric of the retain loss and how :math:`P g_f` is spread, with
            ``metric="retain"``; of the rows and of the parameters.
    """

    dots: Dots
    forget_coefficient: Tensor
    retain_coefficient: Tensor
    update_norm: Tensor
    skipped: Tensor
    params: Sequence[Tensor] = ()
    parameter_dots: Dots | None = None
    in_metric: MetricSums | None = None
    parameters_in_metric: MetricSums | None = None

    @classmethod
    def of(cls, p: Projection, skipped: Tensor) -> "StepStatistics":
        """What the projection ``p`` saw, after ``skipped`` skipped steps."""
        in_metric = p.in_metric, p.parameters_in_metric
        # A copy, for `skipped` counts on.
        return cls(p.dots, p.a, p.b, p.update_norm, skipped.clone(), p.params, p.parameter_dots, *in_metric)

    @property
    def dot_retain_forget(self) -> Tensor:
        r"""0-d: :math:`\langle g_r, g_f\rangle` over all parameters."""
        return self.dots.retain_forget.sum()

    @property
    def forget_norm(self) -> Tensor:
        r"""0-d: :math:`\|g_f\|` over all parameters."""
        return self.dots.forget_norm_sq.sum().sqrt()

    @property
    def retain_norm(self) -> Tensor:
        r"""0-d: :math:`\|g_r\|` over all parameters."""
        return self.dots.retain_norm_sq.sum().sqrt()

    @property
    def cosine(self) -> Tensor:
        r"""0-d: :math:`\langle g_r, g_f\rangle / (\|g_f\|\|g_r\|)`; 0 where a gradient is zero, NaN where one
        is not finite."""
        norms = self.forget_norm * self.retain_norm
        return torch.where(norms == 0, 0.0, self.dot_retain_forget / norms)

    @property
    def row_cosines(self) -> Tensor:
        """``[rows]``: the cosine within each row; 0 where a gradient is zero, NaN where one is not finite."""
        return _cosines(self.dots)

    @property
    def parameter_cosines(self) -> Tensor | None:
        """``[len(params)]``: the cosine within each parameter, whatever the scope; None unless they were taken."""
        return None if self.parameter_dots is None else _cosines(self.parameter_dots)

    # In the metric of the retain loss; None with metric="euclidean". The two tell different stories: the cosine of the
    # plain dots is that of the large gradients, this one weighs each coordinate by what the retain loss makes of it.

    @property
    def metric_forget_norm(self) -> Tensor | None:
        r"""0-d: :math:`\sqrt{\langle g_f, P g_f\rangle}` over all parameters."""
        return None if self.in_metric is None else self.in_metric.dots.forget_norm_sq.sum().sqrt()

    @property
    def metric_retain_norm(self) -> Tensor | None:
        r"""0-d: :math:`\sqrt{\langle g_r, P g_r\rangle}` over all parameters."""
        return None if self.in_metric is None else self.in_metric.dots.retain_norm_sq.sum().sqrt()

    @property
    def metric_cosine(self) -> Tensor | None:
        r"""0-d: :math:`\langle g_r, P g_f\rangle` over the product of the two norms in the metric; 0 where one is 0."""
        if self.in_metric is None:
            return None
        return _cosines(Dots(*(dots.sum() for dots in self.in_metric.dots)))

    @property
    def parameter_metric_cosines(self) -> Tensor | None:
        """``[len(params)]``: the cosine in the metric within each parameter; None unless they were taken."""
        return None if self.parameters_in_metric is None else _cosines(self.parameters_in_metric.dots)

    @property
    def effective_share(self) -> Tensor | None:
        r"""0-d: how evenly :math:`x = P g_f` is spread over the n coordinates, :math:`(\sum x^2)^2 / (n \sum x^4)`.

        The share of the coordinates that would carry it if each of them carried as much: 1 where all do, 1/3 for
        normally distributed ones, 1/n where it is all in one. 0 where there is nothing.
        """
        if self.in_metric is None:
            return None
        square, fourth, numel = (x.sum() for x in self.in_metric[1:])
        return torch.where(fourth > 0, square.square() / (numel * fourth), 0.0)

    def to_dict(self) -> dict[str, float | list[float]]:
        """Read everything with one device-to-host copy, the only synchronisation of this class.

        Returns:
            Floats; the two coefficients are lists where there is more than one row.
        """
        result = read_tensors(self.tensors())
        for name in ("forget_coefficient", "retain_coefficient"):
            values = result[name]
            result[name] = values[0] if isinstance(values, list) and len(values) == 1 else values
        return result

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`to_dict` reads, by name, still on the device."""
        names: tuple[str, ...] = ("forget_norm", "retain_norm", "dot_retain_forget", "cosine", "update_norm", "skipped")
        names += ("forget_coefficient", "retain_coefficient")
        if self.in_metric is not None:
            names += ("metric_forget_norm", "metric_retain_norm", "metric_cosine", "effective_share")
        return {name: getattr(self, name) for name in names}


def read_tensors(tensors: Mapping[str, Tensor]) -> dict[str, float | list[float]]:
    """Read 0-d and 1-d tensors as floats and lists, with one device-to-host copy for each device."""
    values: dict[str, float | list[float]] = dict.fromkeys(tensors, 0.0)
    for device in {t.device for t in tensors.values()}:
        mine = {name: t for name, t in tensors.items() if t.device == device}
        packed = torch.cat([t.detach().double().reshape(-1) for t in mine.values()]).tolist()
        for name, t in mine.items():
            values[name] = packed[: t.numel()] if t.dim() else packed[0]
            del packed[: t.numel()]
    return values


def _cosines(dots: Dots) -> Tensor:
    norms = dots.forget_norm_sq.sqrt() * dots.retain_norm_sq.sqrt()
    return torch.where(norms == 0, 0.0, dots.retain_forget / norms)
