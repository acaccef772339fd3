"""Whether one loop over memory visits the same element of a parameter, of its state and of its gradients.

Only then a kernel can update all of them in one pass. Others are stepped by the base itself, or by PyTorch's operators.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from blur_optim.kernels.layout import dense_alike, is_dense
from blur_optim.parallel.ranks import PLAIN, to_local
from blur_optim.step.base_state import BaseState
from blur_optim.step.pairs import Pairs
from blur_optim.step.plan import any_missing

_FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_HALVES = frozenset((torch.bfloat16, torch.float16))
_dtype_of = attrgetter("dtype")


def which_fit(
    state: BaseState, params: Sequence[Tensor], pairs: Pairs, moments: list[list[Any]], contiguous: bool
) -> list[bool]:
    """Whether each of ``pairs`` fits; an empty list where all do.

    Args:
        state: of ``pairs.params``. It remembers what has been found of the moments.
        params: the local tensors of ``pairs.params``.
        moments: for each kind of state its tensors, None where a parameter has none.
        contiguous: every gradient is known to be.
    """
    dtypes, grad_dtypes = set(map(_dtype_of, params)), set(map(_dtype_of, pairs.retain))
    alike = len(dtypes) == 1 and dtypes <= _FLOATS and set(map(type, params)) <= PLAIN
    alike = alike and (grad_dtypes == dtypes or (dtypes == {torch.float32} and grad_dtypes <= _HALVES))
    if alike and contiguous and all(map(Tensor.is_contiguous, params)):
        if state.known_to_fit(dtypes, moments) and all(_still_fit(values, dtypes) for values in moments):
            return []
        if all(_is_plain(m, dtypes) for values in moments for m in values if m is not None):
            state.remember_to_fit(dtypes, moments)
            return []
    found = [
        fits(params[i], pairs.forget[i], pairs.retain[i], [to_local(m[i]) for m in moments if m[i] is not None])
        for i in range(len(pairs))
    ]
    return [] if all(found) else found


def fits(param: Tensor, forget: Tensor, retain: Tensor, moments: Sequence[Tensor]) -> bool:
    """The same of one pair; all tensors are local, the gradients real."""
    if is_traceable_wrapper_subclass(param):
        return False  # With a dispatch of its own (torchao's weights of 8 bits): its memory is something else.
    dtype = param.dtype
    if dtype not in _FLOATS or (retain.dtype != dtype and (dtype != torch.float32 or retain.dtype not in _HALVES)):
        return False
    if any(moment.dtype != dtype for moment in moments):
        return False
    others = [*(grad for grad in (forget, retain) if grad.numel()), *moments]
    return is_dense(param) and all(dense_alike(param, t) for t in others)


def lacks_largest(base: Optimizer, entries: Mapping[str, list[Any]], groups: Sequence[int]) -> bool:
    """Whether a parameter whose group has amsgrad has its state, but no ``max_exp_avg_sq``: it was made without.

    Args:
        entries: of the state, those that are read in a step; with amsgrad in a group, these are among them.
        groups: the param group of each parameter.
    """
    largest = entries.get("max_exp_avg_sq", [])
    return any_missing(largest) and any(
        most is None and step is not None and base.param_groups[group].get("amsgrad")
        for most, step, group in zip(largest, entries["step"], groups, strict=True)
    )


def _still_fit(moments: list[Any], dtypes: set[torch.dtype]) -> bool:
    """Whether those that are there still do: ``data`` may have given a tensor other strides, or another dtype."""
    present = [m for m in moments if m is not None] if any_missing(moments) else moments
    return all(map(Tensor.is_contiguous, present)) and dtypes.issuperset(map(_dtype_of, present))


def _is_plain(moment: Tensor, dtypes: set[torch.dtype]) -> bool:
    local = to_local(moment)
    return local.dtype in dtypes and local.is_contiguous()
