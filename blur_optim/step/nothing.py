"""Steps that cannot move anything, and how they are known where to know it costs nothing."""

from collections.abc import Sequence

from torch import Tensor

from blur_optim.step.pairs import PairedGradients
from blur_optim.step.projection import Projection


def unreached(name: str, params: Sequence[Tensor]) -> RuntimeError:
    """The error for a closure whose loss leaves no gradient on ``params``."""
    trainable = sum(p.requires_grad for p in params)
    return RuntimeError(
        f"`{name}` must return a loss of this optimizer's parameters, got one whose backward reached none of them "
        f"({trainable} of {len(params)} require grad). Is it the loss of another model, or of a copy?"
    )


def why_nothing_moves(gradients: PairedGradients, projection: Projection) -> str:
    """Say why a step does nothing, or nothing to forget; an empty string where it does, or where a GPU would know."""
    if not gradients.pairs:
        return (
            "BLUR took a step, but neither phase left a gradient on any of its parameters. Were they run on another "
            "model, or is everything frozen (an adapter loaded for inference)?"
        )
    norms = projection.dots.forget_norm_sq
    is_known = type(norms) is Tensor and norms.is_cpu  # A fake tensor has no values.
    if is_known and any(map(Tensor.numel, gradients.pairs.forget)) and not any(norms.tolist()):
        return (
            "BLUR took a step, but the forget gradient is zero everywhere, so there is nothing to forget. Is every "
            "label masked?"
        )
    return ""
