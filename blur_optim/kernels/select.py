"""The signature that every backend has, and the choice of one for a device."""

import os
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from blur_optim.kernels import foreach, native, reference, triton

#: Environment variable that overrides the choice (an explicit ``backend=`` argument wins over it).
BACKEND_VARIABLE = "BLUR_OPTIM_BACKEND"


class Backend(Protocol):
    """Operations on equally long lists of real, strided tensors that live on one device.

    ``forget[i]`` and ``retain[i]`` have the same shape and dtype. Either may be *absent*, written as a tensor of 0
    elements beside one that has some, and then counts as zeros. ``rows[i]`` names the row of the result or of the
    coefficients that tensor i belongs to; rows ascend.

    A forget gradient beside a present retain gradient may be compressed: bfloat16 instead of float32 or float64, or
    int8 with ``scales[i]`` as :mod:`blur_optim.kernels.blocks` says. It is read as it is; no decompressed copy is made.
    ``scales`` has an entry for every pair (any tensor where the gradient is not int8), or is empty.
    """

    def multi_tensor_dots(
        self,
        forget: Sequence[Tensor],
        retain: Sequence[Tensor],
        rows: Sequence[int],
        num_rows: int,
        scales: Sequence[Tensor] = (),
    ) -> Tensor:
        r"""Compute the three dots of each row.

        Returns:
            ``[num_rows, 3]`` float64 on the tensors' device:
            :math:`\langle g_r, g_f\rangle, \|g_f\|^2, \|g_r\|^2`. The same bits for the same inputs, whatever the
            number of threads. No host synchronisation.
        """

    def multi_tensor_blend_(
        self,
        retain: Sequence[Tensor],
        forget: Sequence[Tensor],
        coefficients: Tensor,
        rows: Sequence[int],
        scales: Sequence[Tensor] = (),
    ) -> None:
        """Write ``a * forget[i] + b * retain[i]`` into ``retain[i]``, or into ``forget[i]`` where retain is absent.

        Args:
            coefficients: ``[num_rows, 2]`` float64 on the tensors' device: (a, b) of each row. They are applied in
                float32, in float64 to float64 tensors, and the result is rounded once to the tensors' dtype.
        """

    def multi_tensor_compress_(
        self, values: Sequence[Tensor], scales: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> None:
        """Compress gradients: read each once, write the result.

        Args:
            values: int8 or bfloat16, of the shapes and strides of ``grads``, which are dense. bfloat16 is rounded to
                the nearest, ties to even.
            scales: of the int8 ones, as :mod:`blur_optim.kernels.blocks` says; empty where all are bfloat16. The
                integers and scales have the same bits in every backend.
        """

    # In the metric of the retain loss. ``metric`` is ``[len(forget), 5]`` float64 on the tensors' device: for each
    # tensor beta2, the weight of r^2 in the second moment (1 - beta2, over the square of the loss scale), the inverse
    # of its bias correction, the damping, eps. With the second moment s = beta2 v + weight r^2 that this step makes
    # (with amsgrad the largest so far), P = 1 / (sqrt(s * correction + damping) + eps). An absent retain gradient
    # counts as zeros: v decays.

    def multi_tensor_metric_dots(
        self,
        forget: Sequence[Tensor],
        retain: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor],
        rows: Sequence[int],
        num_rows: int,
        metric: Tensor,
        scales: Sequence[Tensor] = (),
    ) -> Tensor:
        r"""Compute the dots of each row in the metric, beside the plain ones, in one pass over g_f, g_r and v.

        Args:
            exp_avg_sqs: v before this step, in the parameters' dtype. Not modified.
            max_exp_avg_sqs: likewise, or empty without amsgrad.

        Returns:
            ``[num_rows, 9]`` float64: :math:`\langle g_r, g_f\rangle, \|g_f\|^2, \|g_r\|^2`, then
            :math:`\langle g_r, P g_f\rangle, \langle g_f, P g_f\rangle, \langle g_r, P g_r\rangle`, then
            :math:`\sum (P g_f)^2, \sum (P g_f)^4`, and the sum of the bias-corrected s.
        """

    def multi_tensor_metric_blend_(
        self,
        retain: Sequence[Tensor],
        forget: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        coefficients: Tensor,
        rows: Sequence[int],
        metric: Tensor,
        found_inf: Tensor | None,
        scales: Sequence[Tensor] = (),
    ) -> None:
        """Do what :meth:`multi_tensor_blend_` does, and write s into ``exp_avg_sqs`` in the same pass.

        Args:
            found_inf: 0-d float32; where it is not 0 the second moments stay as they are.
        """

    def metric_adamw_(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor],
        forget: Sequence[Tensor],
        retain: Sequence[Tensor],
        rows: Sequence[int],
        coefficients: Tensor,
        steps: Tensor,
        lr: Tensor,
        metric: Tensor,
        *,
        beta1: float,
        weight_decay: float,
        amsgrad: bool,
        maximize: bool,
        decoupled: bool,
        found_inf: Tensor | None,
        scales: Sequence[Tensor] = (),
    ) -> None:
        """Take the step of AdamW (``decoupled``) or Adam with P in place of its denominator.

        ``exp_avgs`` average ``a * forget + b * retain``; ``exp_avg_sqs`` become s, in which no forget gradient is. With
        beta2 1 and weight 0 in ``metric``, v is taken as it is. Arguments as for :meth:`FusedBackend.fused_adamw_`.
        """

    def metric_sgd_(
        self,
        params: Sequence[Tensor],
        momentum_buffers: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        forget: Sequence[Tensor],
        retain: Sequence[Tensor],
        rows: Sequence[int],
        coefficients: Tensor,
        lr: Tensor,
        metric: Tensor,
        *,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        maximize: bool,
        first_step: bool,
        found_inf: Tensor | None,
        scales: Sequence[Tensor] = (),
    ) -> None:
        """Take the step of SGD with each element of what it moves by multiplied with P; ``exp_avg_sqs`` become s.

        Arguments as for :meth:`FusedBackend.fused_sgd_`.
        """


class FusedBackend(Backend, Protocol):
    """A backend that also updates parameters from both gradients; the update itself is never written to memory."""

    def fused_adamw_(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor],
        forget: Sequence[Tensor],
        retain: Sequence[Tensor],
        rows: Sequence[int],
        coefficients: Tensor,
        steps: Tensor,
        lr: Tensor,
        *,
        beta1: float,
        beta2: float,
        weight_decay: float,
        eps: float,
        amsgrad: bool,
        maximize: bool,
        decoupled: bool,
        found_inf: Tensor | None,
        scales: Sequence[Tensor] = (),
    ) -> None:
        """Take the step of torch.optim.AdamW (``decoupled``) or Adam on ``a * forget + b * retain``.

        Args:
            params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs: as torch keeps them, modified in place. The last is empty
                without ``amsgrad``.
            steps: ``[len(params)]`` float32 on the device: the number of this step, from 1.
            lr: 0-d float64 on the device.
            found_inf: 0-d float32 on the device; where it is not 0 nothing is modified.
        """

    def fused_sgd_(
        self,
        params: Sequence[Tensor],
        momentum_buffers: Sequence[Tensor],
        forget: Sequence[Tensor],
        retain: Sequence[Tensor],
        rows: Sequence[int],
        coefficients: Tensor,
        lr: Tensor,
        *,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        maximize: bool,
        first_step: bool,
        found_inf: Tensor | None,
        scales: Sequence[Tensor] = (),
    ) -> None:
        """Take the step of torch.optim.SGD on ``a * forget + b * retain``.

        Args:
            momentum_buffers: modified in place; empty without momentum. On the ``first_step`` of a parameter its buffer
                is only written.
        """


BACKENDS = {
    "foreach": cast(Backend, foreach),
    "reference": cast(Backend, reference),
    "native": cast(FusedBackend, native),
    "triton": cast(FusedBackend, triton),
}


def why_not(name: str, device: torch.device) -> str:
    """Say why the backend called ``name`` cannot serve ``device``; an empty string where it can."""
    if name == "native":
        return native.why_not(device)
    if name == "triton":
        return triton.why_not(device)
    return ""


def select_backend(name: str | None, device: torch.device) -> Backend:
    """Return the backend called ``name``, else the one ``BLUR_OPTIM_BACKEND`` names, else the fastest for ``device``.

    Raises:
        ValueError: there is no backend of that name.
        ImportError: the backend of that name does not work here; the message says why.
    """
    source = "backend" if name is not None else BACKEND_VARIABLE
    name = name or os.environ.get(BACKEND_VARIABLE) or None
    if name is None:
        return BACKENDS[_fastest(device)]
    if name not in BACKENDS:
        raise ValueError(f"`{source}` must be one of {sorted(BACKENDS)}, got {name!r}.")
    if reason := why_not(name, device):
        raise ImportError(f"`{source}` is {name!r}, which is not available: {reason}")
    return BACKENDS[name]


def _fastest(device: torch.device) -> str:
    if not native.why_not(device):
        return "native"
    # On the CPU there is only Triton's interpreter, which is for tests.
    return "triton" if device.type == "cuda" and not triton.why_not(device) else "foreach"
