"""The base optimizer: made or checked, and stepped with what mixed precision wants it to know."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

from blur_optim.optimizer_wrapper import lent, supports_amp_scaling
from blur_optim.parallel.engines import REMEDY, is_engine

# Where the host would wait for the device otherwise. On the CPU there is nothing to gain, and torch's fused kernels
# there visit other elements where a gradient's layout is not the parameter's.
_FUSED_DEVICES = frozenset(("cuda",))


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
    params, fused = _fused_by_default(params, base, kwargs)
    try:
        return base(params, **kwargs, **fused)
    except TypeError as error:
        if "alpha" in kwargs and "alpha" in str(error):
            raise TypeError(f"{error}. The paper's alpha is called `retain_weight` here.") from error
        raise


def _fused_by_default(
    params: Any, base: Callable[..., Optimizer], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """``params`` with its iterators as lists, and ``fused=True`` where it spares a wait and nothing was said.

    On a GPU the step counts of an unfused base are on the host, which therefore waits in each step to know whether it
    is skipped. BLUR's own update is what is computed either way.
    """
    said = {"fused", "foreach", "capturable", "differentiable"}
    if base not in (AdamW, Adam, SGD) or said & kwargs.keys() or isinstance(params, Tensor):
        return params, {}
    params = [_with_a_list(p) if isinstance(p, dict) else p for p in params]
    if any(isinstance(p, dict) and said & p.keys() for p in params):
        return params, {}
    tensors = [p[1] if isinstance(p, tuple) else p for p in _flat(params)]
    supported = tensors and all(
        isinstance(p, Tensor) and p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in tensors
    )
    return params, {"fused": True} if supported else {}


def _with_a_list(group: dict[str, Any]) -> dict[str, Any]:
    """The same object where it has no iterator: torch fills in the user's own dictionaries."""
    own = group.get("params", ())
    return group if isinstance(own, Tensor | list | tuple) else {**group, "params": list(own)}


def _flat(params: list[Any]) -> list[Any]:
    found: list[Any] = []
    for p in params:
        own = p.get("params", ()) if isinstance(p, dict) else (p,)
        found += [own] if isinstance(own, Tensor) else own
    return found


def check_differentiable(param_groups: Sequence[dict[str, Any]]) -> None:
    """Refuse a step that is to be differentiated.

    Raises:
        ValueError: a param group has ``differentiable=True``.
    """
    if any(group.get("differentiable") for group in param_groups):
        raise ValueError(
            "`differentiable` must be False, got True: the update is formed in place, outside of autograd, so a "
            "derivative through the step would miss the forget gradient. Step the base optimizer itself on an update "
            "that you form from the two gradients."
        )


def check_base(base: object) -> None:
    """Refuse what cannot be stepped on ``p.grad`` alone."""
    _refuse_engine(base)
    if not isinstance(base, Optimizer):
        raise TypeError(f"`base` must make a torch.optim.Optimizer, got {type(base).__name__}.")
    if isinstance(base, LBFGS) or _needs_closure(type(base)):
        name = type(base).__name__
        raise TypeError(f"`base` must step on p.grad without a closure of its own, which {name} needs.")
    check_differentiable(base.param_groups)
    if _hooks_backward(base):
        raise TypeError(
            f"`base` must take its gradients from p.grad when it steps, got {type(base).__name__}, which takes them in "
            "a hook during backward: of the two phases it would step on the last alone. What else saves memory: "
            "stash='int8' or 'cpu', or fully_shard; see docs/memory.md."
        )


def _needs_closure(kind: type[Optimizer]) -> bool:
    """Whether ``step`` cannot run without a closure: by its signature, or because it says so at once."""
    step = inspect.unwrap(kind.step)  # torch wraps it, for its hooks and in no_grad().
    closure = inspect.signature(step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty and closure.kind is not closure.VAR_KEYWORD:
        return True
    try:
        source = inspect.getsource(step)
    except (OSError, TypeError):  # Not written in Python, or not in a file.
        return False
    return re.search(r"assert closure\b|if closure is None:\s*(#.*\s*)*raise\b", source) is not None


def _hooks_backward(base: Optimizer) -> bool:
    """Whether a hook on a parameter is the base's own, as of those that offload gradients or step inside backward."""
    params = [p for group in base.param_groups for p in group["params"]]
    names = ("_post_accumulate_grad_hooks", "_backward_hooks")
    hooks = [hook for p in params for name in names for hook in (getattr(p, name, None) or {}).values()]
    return any(_refers_to(hook, base) for hook in hooks)


def _refers_to(function: Any, base: Optimizer) -> bool:
    held = [getattr(function, "__self__", None), *getattr(function, "args", ())]  # Of a method, of a partial.
    inner = getattr(function, "func", None)
    for cell in getattr(function, "__closure__", None) or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # Not filled yet.
            continue
    return any(thing is base for thing in held) or (inner is not None and _refers_to(inner, base))


def named_apart(base: Optimizer, own: dict[str, Any]) -> dict[str, Any]:
    """BLUR's hyperparameters under other names where ``base`` has one of the name.

    A base that has all of them is one that a BLUR wraps already, and is refused.
    """
    clash = own.keys() & base.defaults.keys()
    return own if clash == own.keys() else {f"blur_{n}" if n in clash else n: value for n, value in own.items()}


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


def check_no_scaler(amp: Mapping[str, Any]) -> None:
    """Refuse closures under a GradScaler.

    Raises:
        RuntimeError: it has left its mark on the optimizer.
    """
    if "grad_scale" in amp:
        raise RuntimeError(
            "A GradScaler cannot step with closures: it looks for gradients before they run. Scale both losses in "
            "`with opt.forget()` and `with opt.retain(grad_scale=scaler)`, then call scaler.step(opt)."
        )


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
