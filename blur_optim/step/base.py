"""The base optimizer: made or checked, and stepped with what mixed precision wants it to know."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer

from blur_optim.optimizer_wrapper import lent, supports_amp_scaling
from blur_optim.parallel.engines import REMEDY, is_engine


def make_base(params: Any, base: Callable[..., Optimizer] | Optimizer, kwargs: dict[str, Any]) -> Optimizer:
    """Return ``base(params, **kwargs)``, or ``base`` itself where it is an instance.

    Raises:
        TypeError, ValueError: as :class:`blur_optim.BLUR` says.
    """
    _refuse_engine(base)
    if isinstance(params, Optimizer):
        raise TypeError(f"`params` must be parameters, got the optimizer {type(params).__name__}. Pass base=... alone.")
    if isinstance(params, torch.nn.Module):
        raise TypeError("`params` must be parameters, got a module. Pass model.parameters().")
    if isinstance(base, Optimizer):
        if kwargs:
            raise TypeError(
                f"`base` is an instance, so {sorted(kwargs)} cannot reach it. Pass a class, or set them there."
            )
        if params is not None:
            _check_same_params(list(params), base)
        return base
    if not callable(base):
        raise TypeError(f"`base` must be an optimizer class, factory or instance, got {base!r}.")
    if params is None:
        raise TypeError("`params` must be given, unless `base` is an optimizer instance.")
    try:
        return base(params, **kwargs)
    except TypeError as error:
        if "alpha" in kwargs and "alpha" in str(error):
            raise TypeError(f"{error}. The paper's alpha is called `retain_weight` here.") from error
        raise


def check_base(base: object) -> None:
    """Refuse what cannot be stepped on ``p.grad`` alone."""
    _refuse_engine(base)
    if not isinstance(base, Optimizer):
        raise TypeError(f"`base` must make a torch.optim.Optimizer, got {type(base).__name__}.")
    if isinstance(base, LBFGS):
        raise TypeError("`base` must step on p.grad without a closure of its own, which LBFGS needs.")


def step_base(base: Optimizer, found_inf: Tensor | None, amp: dict[str, Tensor | None]) -> None:
    """Step ``base`` unless ``found_inf`` is 1; None means that nothing was checked.

    Args:
        amp: what a GradScaler set on the wrapper: ``grad_scale`` and its own ``found_inf``, or nothing.

    A base that takes ``found_inf`` skips on the device. For any other the flag is read: one host synchronisation.
    """
    if found_inf is not None and (not supports_amp_scaling(base) or _starts_momentum(base)):
        if found_inf.item():
            return
        found_inf = None
    if not supports_amp_scaling(base):
        base.step()
        return
    if found_inf is not None:
        other = amp.get("found_inf")
        amp = {**amp, "found_inf": found_inf if other is None else torch.maximum(found_inf, other.to(found_inf))}
    with lent(base, amp):
        base.step()


def _refuse_engine(base: object) -> None:
    if is_engine(base):
        raise TypeError(
            f"`base` must step on p.grad, got {type(base).__name__}: this engine steps by itself, inside backward, on "
            f"gradients that it has collected from both losses. {REMEDY}"
        )


def _starts_momentum(base: Optimizer) -> bool:
    """Whether this step of SGD makes momentum buffers. The fused one leaves them uninitialised when it skips."""
    return isinstance(base, SGD) and any(
        p.grad is not None and base.state[p].get("momentum_buffer") is None
        for group in base.param_groups
        if group["momentum"] != 0
        for p in group["params"]
    )


def _check_same_params(params: list[Any], base: Optimizer) -> None:
    options = {key for item in params if isinstance(item, dict) for key in item} - {"params", "param_names"}
    if options:
        raise ValueError(
            f"`params` must not set {sorted(options)} beside an optimizer instance, whose groups are made already. Set "
            "them there, or pass a class as `base`."
        )
    if _ids(params) != _ids(base.param_groups):
        raise ValueError("`params` must be the parameters of `base`, got others. Leave `params` out.")


def _ids(params: Any) -> set[int]:
    """The identities of parameters, named parameters, and those in param groups."""
    ids: set[int] = set()
    for item in [params] if isinstance(params, Tensor) else params:
        if isinstance(item, dict):
            ids |= _ids(item["params"])
        else:
            ids.add(id(item[1] if isinstance(item, tuple) else item))
    return ids
