"""Several optimizers over parts of one model, as one: what a base made of Muon and AdamW is to BLUR."""

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from blur_optim.step.base import check_base


class ChainedOptimizer(Optimizer):
    """Step several optimizers, each over parameters of its own, one after another.

    Two BLURs over parts of a model would project each part on itself. One BLUR over this projects over the whole, as
    the method does, and lets each optimizer take its part of the update::

        def muon_and_adamw(named_parameters, lr):
            inner, others = [], []
            for name, p in named_parameters:
                (inner if p.ndim == 2 and "embed" not in name and "lm_head" not in name else others).append((name, p))
            return ChainedOptimizer(torch.optim.Muon(inner, lr=lr), torch.optim.AdamW(others, lr=lr))

        opt = BLUR(model.named_parameters(), base=muon_and_adamw, gamma=1.0, lr=1e-3)

    ``param_groups`` are those of all, one after another, and the same objects: schedulers act on them. ``state`` and
    ``state_dict`` hold what all of them do; the state dict has the form of any optimizer's.

    Args:
        *optimizers: at least one, over different parameters. To add a param group, add it to one of them.

    Raises:
        TypeError: one is no optimizer, needs a closure, or takes gradients in a hook during backward.
        ValueError: none is given, or a parameter belongs to two.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        if not optimizers:
            raise ValueError("`optimizers` must hold at least one optimizer, got none.")
        for optimizer in optimizers:
            check_base(optimizer)
        self.optimizers = optimizers
        params = [p for group in self.param_groups for p in group["params"]]
        if len({id(p) for p in params}) < len(params):
            raise ValueError("`optimizers` must be over different parameters, got some that belong to several.")
        # For the hooks; the groups and the state are those of the others.
        super().__init__(self.param_groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the step of each, in the order in which they were given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups of all."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        groups = iter(value)
        if value:  # Optimizer.__init__ begins with none.
            for optimizer in self.optimizers:
                optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]

    @property
    def state(self) -> Any:
        """The state of each parameter, wherever it is kept."""
        return _States(self.optimizers)

    @state.setter
    def state(self, value: MutableMapping[Tensor, Any]) -> None:
        for p, state in value.items():
            self.state[p] = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a group that is new: it has to be added to one of ``optimizers``."""
        if not any(param_group is group for group in self.param_groups):
            raise TypeError(
                "`param_group` must be added to one of `optimizers`, which says how it is to be stepped: "
                "opt.optimizers[0].add_param_group(...)."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` of optimizers like these returned.

        Raises:
            ValueError: it has another number of param groups, or of parameters in one.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        saved = list(state_dict["param_groups"])
        if len(saved) != len(self.param_groups):
            raise ValueError(
                f"`state_dict` must have the {len(self.param_groups)} param groups of all optimizers, got {len(saved)}."
            )
        for optimizer in self.optimizers:
            mine = [saved.pop(0) for _ in optimizer.param_groups]
            ids = {number for group in mine for number in group["params"]}
            state = {number: value for number, value in state_dict["state"].items() if number in ids}
            optimizer.load_state_dict({"state": state, "param_groups": mine})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers, "defaults": self.defaults}

    def __repr__(self) -> str:
        return f"ChainedOptimizer({', '.join(map(repr, self.optimizers))})"


class _States(MutableMapping[Tensor, Any]):
    """The states of several optimizers, by parameter."""

    def __init__(self, optimizers: tuple[Optimizer, ...]) -> None:
        self._optimizers = optimizers

    def __getitem__(self, param: Tensor) -> Any:
        return self._of(param)[param]

    def __setitem__(self, param: Tensor, value: Any) -> None:
        self._of(param)[param] = value

    def __delitem__(self, param: Tensor) -> None:
        del self._of(param)[param]

    def __iter__(self) -> Iterator[Tensor]:
        return (param for optimizer in self._optimizers for param in optimizer.state)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)

    def _of(self, param: Tensor) -> Any:
        for optimizer in self._optimizers:
            if any(param is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer.state
        raise KeyError(param)
