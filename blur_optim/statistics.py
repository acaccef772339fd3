"""What one step saw: norms, cosine, coefficients, as device tensors that cost nothing until they are read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from blur_optim.rules import Dots


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
    """

    dots: Dots
    forget_coefficient: Tensor
    retain_coefficient: Tensor
    update_norm: Tensor
    skipped: Tensor

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
        r"""0-d: :math:`\langle g_r, g_f\rangle / (\|g_f\|\|g_r\|)`; 0 where a gradient is zero."""
        norms = self.forget_norm * self.retain_norm
        return torch.where(norms > 0, self.dot_retain_forget / norms, 0.0)

    @property
    def row_cosines(self) -> Tensor:
        """``[rows]``: the cosine within each row; 0 where a gradient is zero."""
        norms = self.dots.forget_norm_sq.sqrt() * self.dots.retain_norm_sq.sqrt()
        return torch.where(norms > 0, self.dots.retain_forget / norms, 0.0)

    def to_dict(self) -> dict[str, float | list[float]]:
        """Read everything with one device-to-host copy, the only synchronisation of this class.

        Returns:
            Floats; the two coefficients are lists where there is more than one row.
        """
        scalars = ("forget_norm", "retain_norm", "dot_retain_forget", "cosine", "update_norm", "skipped")
        rows = len(self.forget_coefficient)
        packed = [getattr(self, name).double().reshape(1) for name in scalars]
        values = torch.cat([*packed, self.forget_coefficient, self.retain_coefficient]).tolist()
        result: dict[str, float | list[float]] = dict(zip(scalars, values, strict=False))
        result["forget_coefficient"] = _item_or_list(values[len(scalars) : len(scalars) + rows])
        result["retain_coefficient"] = _item_or_list(values[len(scalars) + rows :])
        return result


def _item_or_list(values: list[float]) -> float | list[float]:
    return values[0] if len(values) == 1 else values
