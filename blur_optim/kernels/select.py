"""The signature that every backend has, and the choice of one."""

import os
from collections.abc import Sequence
from typing import Protocol, cast

from torch import Tensor

from blur_optim.kernels import foreach, reference

#: Environment variable that overrides the default backend (an explicit ``backend=`` argument wins over it).
BACKEND_VARIABLE = "BLUR_OPTIM_BACKEND"


class Backend(Protocol):
    """Two operations on equally long lists of real, strided tensors that live on one device.

    ``forget[i]`` and ``retain[i]`` have the same shape and dtype. Either may be *absent*, written as a tensor of 0
    elements beside one that has some, and then counts as zeros. ``rows[i]`` names the row of the result or of the
    coefficients that tensor i belongs to; rows ascend.
    """

    def multi_tensor_dots(
        self, forget: Sequence[Tensor], retain: Sequence[Tensor], rows: Sequence[int], num_rows: int
    ) -> Tensor:
        r"""Compute the three dots of each row.

        Returns:
            ``[num_rows, 3]`` float64 on the tensors' device:
            :math:`\langle g_r, g_f\rangle, \|g_f\|^2, \|g_r\|^2`. The same bits for the same inputs, whatever the
            number of threads. No host synchronisation.
        """

    def multi_tensor_blend_(
        self, retain: Sequence[Tensor], forget: Sequence[Tensor], coefficients: Tensor, rows: Sequence[int]
    ) -> None:
        """Write ``a * forget[i] + b * retain[i]`` into ``retain[i]``, or into ``forget[i]`` where retain is absent.

        Args:
            coefficients: ``[num_rows, 2]`` float64 on the tensors' device: (a, b) of each row. They are applied in
                float32, in float64 to float64 tensors, and the result is rounded once to the tensors' dtype.
        """


BACKENDS = {"foreach": cast(Backend, foreach), "reference": cast(Backend, reference)}


def select_backend(name: str | None = None) -> Backend:
    """Return the backend called ``name``, else the one that ``BLUR_OPTIM_BACKEND`` names, else ``"foreach"``.

    Raises:
        ValueError: there is no backend of that name.
    """
    source = "backend" if name is not None else BACKEND_VARIABLE
    name = name or os.environ.get(BACKEND_VARIABLE) or "foreach"
    if name not in BACKENDS:
        raise ValueError(f"`{source}` must be one of {sorted(BACKENDS)}, got {name!r}.")
    return BACKENDS[name]
