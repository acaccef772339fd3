"""Where the forget gradients wait while the retain gradients are computed."""

from collections.abc import Iterable

from torch import Tensor


class ReferenceStash:
    """Keep the forget gradients by reference: the tensors move out of ``p.grad``, nothing is copied.

    A gradient that is a window into a larger buffer is copied after all, for its owner writes the next gradient to the
    same place: DistributedDataParallel(gradient_as_bucket_view=True) does, from its second step on. A copy that
    was not needed costs one read and one write; a missing one would replace g_f by g_r without a sign.

    Cost: one gradient set.
    """

    def __init__(self) -> None:
        self._grads: dict[Tensor, Tensor] = {}

    def take(self, params: Iterable[Tensor]) -> None:
        """Move the gradient of each of ``params`` here and leave ``p.grad = None``."""
        for p in params:
            if p.grad is not None:
                self._grads[p] = p.grad.clone() if _shares_storage(p.grad) else p.grad
                p.grad = None

    def pop(self, param: Tensor) -> Tensor | None:
        """Hand out the gradient of ``param``, or None where the forget phase left none."""
        return self._grads.pop(param, None)

    def clear(self) -> None:
        self._grads.clear()

    def __len__(self) -> int:
        return len(self._grads)


def _shares_storage(grad: Tensor) -> bool:
    return grad._is_view() or grad.untyped_storage().nbytes() > grad.numel() * grad.element_size()


#: The stashes by the name that ``BLUR(stash=...)`` takes.
STASHES = {"reference": ReferenceStash}
