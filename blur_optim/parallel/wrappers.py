"""What wrappers and engines keep back from ``p.grad``, found from the parameters alone.

BLUR never sees the model, and with plain training need not: what a backward leaves unreduced, the next one picks up.
Here the next backward is that of another loss, so such a gradient would end in the wrong one without a sign.

Only private attributes tell. Each is read where it exists and passed over where a version of torch lacks it, and no
module is imported for it: what is not loaded wraps nothing.
"""

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from blur_optim.parallel.data_parallel import DataParallel
from blur_optim.parallel.engines import REMEDY, Engines
from blur_optim.parallel.fsdp1 import has_unreduced_fsdp1
from blur_optim.parallel.fsdp2 import drop_held_back, holds_back


class Wrappers:
    """The wrappers around these parameters, and whether they have reduced what a phase computed."""

    def __init__(self) -> None:
        self._data_parallel, self._engines = DataParallel(), Engines()

    def begin(self, params: Sequence[Tensor]) -> None:
        """A phase begins.

        Raises:
            RuntimeError: an engine keeps the gradients of ``params``.
        """
        self._engines.begin(params)
        self._data_parallel.begin(params)

    def end(self, params: Sequence[Tensor], dtensors: Sequence[Tensor], phase: str) -> None:
        """A phase ends; its gradients are then in ``p.grad``.

        Args:
            dtensors: those of ``params`` that are DTensors, which are all that fully_shard may hold back.

        Raises:
            RuntimeError: gradients of it are not averaged over the ranks yet.
        """
        if holds_back(dtensors):
            raise RuntimeError(
                f"The {phase} phase must end with its gradients reduced, got gradients that FSDP still holds back. "
                f"Before the last backward of the {phase} phase call model.set_requires_gradient_sync(True), and with "
                "HSDP model.set_requires_all_reduce(True)."
            )
        if self._engines.end(params):
            raise RuntimeError(
                f"The {phase} phase must end with its gradients reduced, got those of this rank alone: the DeepSpeed "
                "engine averages in the last micro-batch of its gradient_accumulation_steps, which it counts by its "
                f"own steps. {REMEDY} Or set gradient_accumulation_steps to 1."
            )
        if has_unreduced_fsdp1(params) or self._data_parallel.end():
            _refuse_no_sync(phase)

    def holds_back(self, dtensors: Sequence[Tensor]) -> bool:
        """Whether there are gradients that are not in ``p.grad`` yet."""
        return holds_back(dtensors)

    def drop(self, dtensors: Sequence[Tensor]) -> None:
        """Drop what is held back, as ``p.grad = None`` drops the rest."""
        drop_held_back(dtensors)


def _refuse_no_sync(phase: str) -> NoReturn:
    raise RuntimeError(
        f"The {phase} phase must end with its gradients reduced, got those of this rank alone. Run forward and "
        "backward of each loss in the phase itself, through the wrapped model, and outside no_sync() for the last "
        "micro-batch of each of the two phases."
    )
