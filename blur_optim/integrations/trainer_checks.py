"""What a Trainer and its losses must be like for BLUR's step inside it."""

from __future__ import annotations

import importlib
from typing import Any

from packaging import version
from torch import Tensor

_STEP_INSIDE_BACKWARD = ("lomo", "adalomo", "layerwise")


def checked_loss(name: str, loss: Any) -> Tensor:
    """Return what a loss function returned, if it is a loss: 0-d, or [GPUs] under DataParallel.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(loss, Tensor) or loss.dim() > 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"`{name}` must return the loss as a 0-d tensor, got {got}.")
    return loss


def check_transformers(oldest: str) -> None:
    """See that transformers is no older than ``oldest``.

    Raises:
        ImportError: it is.
    """
    found: str = importlib.import_module("transformers").__version__
    if version.parse(found) < version.parse(oldest):
        raise ImportError(
            f"`transformers` must be at least {oldest} for BLUR in a Trainer, got {found}: with 4.45 each gradient is "
            "divided by gradient_accumulation_steps twice, and nothing says so. `pip install "
            f"'transformers>={oldest}'`."
        )


def check_trainer(trainer: Any) -> None:
    """Refuse a Trainer that is set up for what BLUR cannot do.

    Raises:
        ImportError: transformers is too old.
        ValueError: an argument would be ignored, or make a step that is not BLUR's.
    """
    args = trainer.args
    check_transformers(trainer.oldest_transformers)
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise ValueError(
            "`compute_loss_func` must not be given: it knows one loss, and would never be called in training. Pass "
            "forget_loss= and retain_loss=, functions (model, batch) -> loss."
        )
    if not any(p.requires_grad for p in trainer.model.parameters()):
        raise ValueError(
            "`model` must have parameters to train, got none with requires_grad. Load an adapter for training: "
            "PeftModel.from_pretrained(..., is_trainable=True)."
        )
    name = str(getattr(args.optim, "value", args.optim))
    if name in _STEP_INSIDE_BACKWARD or name.endswith("layerwise"):
        raise ValueError(f"`optim` must step after backward, got {name!r}, which steps inside it. Use 'adamw_torch'.")
    if args.label_smoothing_factor:
        raise ValueError(
            f"`label_smoothing_factor` must be 0, got {args.label_smoothing_factor!r}: it would not reach the two "
            "losses. Pass a loss of your own."
        )
    if getattr(trainer.model, "is_loaded_in_4bit", False) and args.device.type == "cpu":
        raise ValueError(
            "`model` must not have bitsandbytes' 4-bit layers on a CPU: once run in eval mode, as the reference and "
            "every evaluation are, they pass on no gradient there. Use a GPU, or load without quantization."
        )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and (getattr(parallel, "cp_enabled", False) or getattr(parallel, "sp_enabled", False)):
        raise ValueError("BLUR has no context or sequence parallelism in a Trainer. Use data parallelism or FSDP2.")
