"""fully_shard: the gradients that it holds back until a later backward reduces them, and its copies for a forward."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

_COMPOSABLE = "torch.distributed._composable_state"


def holds_back(params: Iterable[Tensor]) -> bool:
    """Whether FSDP2 holds gradients of ``params`` that are not in ``p.grad`` yet."""
    return any(
        getattr(group, "_partial_reduce_output", None) is not None or any(map(_is_unreduced, group.fsdp_params))
        for group in _groups_of(params)
    )


def drop_held_back(params: Iterable[Tensor]) -> None:
    """Drop what FSDP2 holds back, as ``p.grad = None`` drops the rest."""
    for group in _groups_of(params):
        if getattr(group, "_partial_reduce_output", None) is not None:
            group._partial_reduce_output = None
        for fsdp_param in filter(_is_unreduced, group.fsdp_params):
            fsdp_param.unsharded_accumulated_grad = None
            fsdp_param._unsharded_param.grad = None


def refuse_gathered(params: Iterable[Tensor]) -> None:
    """Refuse FSDP2's copies for one forward, which it drops again.

    Raises:
        ValueError: some of ``params`` are such copies.
    """
    if _COMPOSABLE not in sys.modules:
        return
    ids = {id(p) for p in params}
    copies = (getattr(f, "_unsharded_param", None) for group in _all_groups() for f in group.fsdp_params)
    if any(id(copy) in ids for copy in copies if copy is not None):
        raise ValueError(
            "`params` must be the sharded parameters, got copies that FSDP has gathered for a forward pass. Call "
            "reshard() on the model first, or make BLUR before the first forward."
        )


def _is_unreduced(fsdp_param: Any) -> bool:
    unsharded = getattr(fsdp_param, "_unsharded_param", None)
    return getattr(fsdp_param, "unsharded_accumulated_grad", None) is not None or (
        unsharded is not None and unsharded.grad is not None
    )


def _groups_of(params: Iterable[Tensor]) -> Iterator[Any]:
    """The FSDPParamGroups of ``params``."""
    ids = {id(p) for p in params if hasattr(p, "to_local")}
    if not ids or _COMPOSABLE not in sys.modules:
        return
    for group in _all_groups():
        if any(id(f.sharded_param) in ids for f in group.fsdp_params):
            yield group


def _all_groups() -> Iterator[Any]:
    for ref in list(sys.modules[_COMPOSABLE]._module_state_mapping.values()):
        state = ref()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # Before there could be several.
            groups = [getattr(state, "_fsdp_param_group", None)]
        yield from (group for group in groups if hasattr(group, "fsdp_params"))
