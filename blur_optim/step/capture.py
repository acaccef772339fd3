"""CUDA graphs: what cannot be captured right is refused while a capture runs, by name."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from blur_optim.kernels import BACKENDS, select_backend
from blur_optim.optimizer_wrapper import supports_amp_scaling
from blur_optim.step.plan import own_name
from blur_optim.step.settings import Settings
from blur_optim.step.stash import HostStash, Stash


def check_capture(
    base: Optimizer, params: Sequence[Tensor], stash: Stash, settings: Settings, by_phases: bool, recomputes: bool
) -> None:
    """Refuse a step that a replay of the graph would not repeat.

    A replay does on the device what the capture did, and nothing on the host. What the host reads or decides is decided
    once and for all, what it counts is not counted, and what it copies from its memory may be gone.

    Raises:
        RuntimeError: with what to change.
    """
    reason = (
        _of_settings(base, params, stash, settings, recomputes) or _of_base(base, params, by_phases) or _of_groups(base)
    )
    if reason:
        raise RuntimeError(
            f"This step cannot be captured in a CUDA graph: {reason} (Warm up with a few steps outside of the capture, "
            "on a stream of its own. Numbers in the param groups are fixed by a capture: give tensors on the device "
            "for `lr`, `gamma` and `retain_weight` to change them between replays.)"
        )


def _of_settings(base: Optimizer, params: Sequence[Tensor], stash: Stash, settings: Settings, recomputes: bool) -> str:
    if settings.metric != "euclidean":
        return "metric='retain' keeps the mean of a step for the next on the host. Use metric='euclidean'."
    if recomputes:
        return "stash='recompute' compares two evaluations on the host. Use stash='int8' or 'reference'."
    if isinstance(stash, HostStash):
        return "stash='cpu' makes its buffers on the host. Use stash='int8' or 'reference'."
    device = params[0].device if params else torch.device("cpu")
    if select_backend(settings.backend, device) is BACKENDS["triton"]:
        return "backend='triton' copies a table from host memory that a replay reads again. Use 'native' or 'foreach'."
    return ""


def _of_base(base: Optimizer, params: Sequence[Tensor], by_phases: bool) -> str:
    name = type(base).__name__
    if not supports_amp_scaling(base):
        return f"{name} asks the host whether to skip the step. Make it with fused=True."
    if type(base) not in (AdamW, Adam, SGD):
        return f"of {name} it is not known. Use AdamW, Adam or SGD with fused=True."
    if by_phases and any(group.get("capturable") is False for group in base.param_groups):
        return f"{name} refuses to step on p.grad in a capture. Make it with capturable=True, or step with closures."
    # Nothing is looked up in the state: that of SGD without momentum is empty.
    needs_state = not isinstance(base, SGD) or any(group["momentum"] != 0 for group in base.param_groups)
    if needs_state and not all(base.state.get(p) for p in params if p.requires_grad):
        return f"the state of {name} is not made yet. Take a step first."
    return ""


def _of_groups(base: Optimizer) -> str:
    for index, group in enumerate(base.param_groups):
        for name in ("lr", *(own_name(name, group) for name in ("gamma", "retain_weight"))):
            value: Any = group[name]
            if isinstance(value, Tensor) and value.device.type == "cpu":
                return (
                    f"`{name}` of param_groups[{index}] is a tensor on the CPU, whose value would be fixed or its "
                    "memory read again. Give a number, or a tensor on the device."
                )
    return ""
