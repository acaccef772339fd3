r"""Combination rules: from three dot products to the two weights of the update.

Every update of this library is :math:`u = a\,g_f + b\,g_r`. A *rule* computes :math:`(a, b)` from the dots
:math:`\langle g_r, g_f\rangle, \|g_f\|^2, \|g_r\|^2` and the weights :math:`\gamma` (forget) and :math:`\alpha`
(retain). It is scalar arithmetic on the device: no rule reads a gradient, so no rule costs an extra pass.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Dots(NamedTuple):
    """The three dot products of the forget and the retain gradient.

    Tensors of one shape, 0-d or ``[rows]``, float64, on one device.
    """

    retain_forget: Tensor
    forget_norm_sq: Tensor
    retain_norm_sq: Tensor


Coefficients = tuple[Tensor, Tensor]
#: ``(dots, gamma, alpha) -> (a, b)``, elementwise over tensors of one shape.
Rule = Callable[[Dots, Tensor, Tensor], Coefficients]
#: A rule of the user's own: the same on 0-d float64 tensors, free to branch, and free to return numbers.
UserRule = Callable[[Dots, Tensor, Tensor], tuple[Tensor | float, Tensor | float]]


def blur(dots: Dots, gamma: Tensor, alpha: Tensor) -> Coefficients:
    r"""Combine by the paper's rule: forget first, retain within what does not undo it.

    .. math:: a = \gamma - \alpha \langle g_r, g_f \rangle / \|g_f\|^2, \qquad b = \alpha    (arXiv:2506.08164)
    """
    return _projected(gamma, alpha, dots.retain_forget, dots.forget_norm_sq), alpha


def retain_first(dots: Dots, gamma: Tensor, alpha: Tensor) -> Coefficients:
    r"""Combine with the roles exchanged (a variant in the original code): retain first.

    .. math:: a = \gamma, \qquad b = \alpha - \gamma \langle g_r, g_f \rangle / \|g_r\|^2
    """
    return gamma, _projected(alpha, gamma, dots.retain_forget, dots.retain_norm_sq)


def conflict(dots: Dots, gamma: Tensor, alpha: Tensor) -> Coefficients:
    r"""Combine by :func:`blur` where the gradients conflict, :math:`\langle g_r, g_f\rangle < 0`, else by the sum."""
    a, b = blur(dots, gamma, alpha)
    return torch.where(dots.retain_forget < 0, a, gamma), b


def barrier(dots: Dots, gamma: Tensor, alpha: Tensor) -> Coefficients:
    r"""Combine by the dynamic barrier: never step up the forget loss to please the retain loss.

    .. math:: a = \max(\gamma - \alpha \langle g_r, g_f \rangle / \|g_f\|^2, 0), \qquad b = \alpha  (arXiv:2105.09304)
    """
    a, b = blur(dots, gamma, alpha)
    return a.clamp(min=0), b


def weighted_sum(dots: Dots, gamma: Tensor, alpha: Tensor) -> Coefficients:
    r"""Combine by the weighted sum, the usual baseline: :math:`a = \gamma, b = \alpha`."""
    return gamma, alpha


def normalized(dots: Dots, gamma: Tensor, alpha: Tensor) -> Coefficients:
    r"""Combine the unit gradients.

    .. math:: a = \gamma / \|g_f\|, \qquad b = \alpha / \|g_r\|                      (NGDiff, arXiv:2410.22086)
    """
    return on_unit_gradients(weighted_sum)(dots, gamma, alpha)


#: The rules by the name that ``BLUR(rule=...)`` takes.
RULES: dict[str, Rule] = {
    rule.__name__: rule for rule in (blur, retain_first, conflict, barrier, weighted_sum, normalized)
}


#: Those that never look at the norm of the retain gradient.
RETAIN_NORM_FREE = frozenset({"blur", "conflict", "barrier", "weighted_sum"})


def on_unit_gradients(rule: Rule) -> Rule:
    r"""Wrap ``rule`` so that it combines :math:`g_f/\|g_f\|` and :math:`g_r/\|g_r\|`.

    A gradient of norm zero gets the weight zero.
    """

    def unit_rule(dots: Dots, gamma: Tensor, alpha: Tensor) -> Coefficients:
        inverse_forget = _inverse_norm(dots.forget_norm_sq)
        inverse_retain = _inverse_norm(dots.retain_norm_sq)
        unit_dots = Dots(
            dots.retain_forget * inverse_forget * inverse_retain,
            (inverse_forget > 0).to(dots.forget_norm_sq),
            (inverse_retain > 0).to(dots.retain_norm_sq),
        )
        a, b = rule(unit_dots, gamma, alpha)
        return a * inverse_forget, b * inverse_retain

    return unit_rule


def per_row(rule: UserRule) -> Rule:
    """Turn a rule on 0-d tensors into one on ``[rows]`` by calling it once a row.

    Raises:
        TypeError: ``rule`` does not return two numbers or 0-d tensors.
    """

    def row_rule(dots: Dots, gamma: Tensor, alpha: Tensor) -> Coefficients:
        columns = zip(*dots, gamma, alpha, strict=True)
        rows = [_checked(rule(Dots(*row[:3]), row[3], row[4]), like=row[0]) for row in columns]
        return torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows])

    return row_rule


def update_norm_sq(dots: Dots, a: Tensor, b: Tensor) -> Tensor:
    r"""Compute the squared norm of :math:`a g_f + b g_r` from the dots alone.

    .. math:: \|u\|^2 = (a + bc)^2 \|g_f\|^2 + b^2 (\|g_r\|^2 - c \langle g_r, g_f\rangle), \quad
              c = \langle g_r, g_f\rangle / \|g_f\|^2

    The part along :math:`g_f` and the part orthogonal to it: neither can come out negative by rounding, which the
    expanded square can.
    """
    ratio = torch.where(dots.forget_norm_sq > 0, dots.retain_forget / dots.forget_norm_sq, 0.0)
    orthogonal = (dots.retain_norm_sq - ratio * dots.retain_forget).clamp(min=0)
    return (a + b * ratio).square() * dots.forget_norm_sq + b.square() * orthogonal


def _projected(own: Tensor, other: Tensor, dot: Tensor, norm_sq: Tensor) -> Tensor:
    """``own - other * dot / norm_sq``, or 0 where the norm is too small for a finite float32 result."""
    weight = own - other * dot / norm_sq
    return torch.where((norm_sq > 0) & weight.float().isfinite(), weight, 0.0)


def _inverse_norm(norm_sq: Tensor) -> Tensor:
    inverse = norm_sq.rsqrt()
    return torch.where((norm_sq > 0) & inverse.float().isfinite(), inverse, 0.0)


def _checked(result: object, like: Tensor) -> Coefficients:
    """What a user's rule returned, as two 0-d tensors."""
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"`rule` must return a tuple (a, b), got {result!r}. The update is a * g_f + b * g_r.")
    a, b = (torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in result)
    if a.dim() or b.dim():
        raise TypeError(f"`rule` must return numbers or 0-d tensors, got shapes {tuple(a.shape)} and {tuple(b.shape)}.")
    return a, b
