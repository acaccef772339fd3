"""TorchJD's aggregators as rules: their weights depend on the Gramian alone, which is the three dots."""

import torch
from torch import Tensor

from blur_optim.step.rules import Dots


def upgrad(dots: Dots, gamma: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    r"""UPGrad (arXiv:2406.16232): project :math:`\gamma g_f` and :math:`\alpha g_r` on each other's half space."""
    from torchjd.aggregation import UPGradWeighting

    return _weights(UPGradWeighting(pref_vector=torch.ones(2, dtype=torch.float64)), dots, gamma, alpha)


def pcgrad(dots: Dots, gamma: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    r"""PCGrad (arXiv:2001.06782) of :math:`\gamma g_f` and :math:`\alpha g_r`."""
    from torchjd.aggregation import PCGradWeighting

    return _weights(PCGradWeighting(), dots, gamma, alpha)


def _weights(weighting: torch.nn.Module, dots: Dots, gamma: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    dot = gamma * alpha * dots.retain_forget
    gramian = torch.stack([gamma**2 * dots.forget_norm_sq, dot, dot, alpha**2 * dots.retain_norm_sq]).reshape(2, 2)
    if not gramian.isfinite().all():  # A skipped step; a solver would raise.
        return gamma, alpha
    forget, retain = weighting(gramian)
    return forget * gamma, retain * alpha
