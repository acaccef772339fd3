"""What an optimizer around another one owes to torch. Nothing here knows of BLUR."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

#: What GradScaler leaves on an optimizer that unscales by itself.
_AMP_ATTRIBUTES = ("grad_scale", "found_inf")


class OptimizerWrapper(Optimizer):
    """Stand for the optimizer ``base``, which keeps all there is to keep.

    ``param_groups``, ``state``, ``defaults``, the hooks and the state dict are those of ``base``, not copies:
    schedulers, checkpoints, GradScaler and ``torch.distributed.checkpoint`` work as on ``base``, and either loads what
    the other saved. Hooks receive ``base``. What ``base`` offers beyond an Optimizer (``train()`` of a schedule-free
    one) is here too. Copies and pickles hold a copy of ``base``.

    A subclass overrides :meth:`step`, and comes to the base's own step by ``super().step()``::

        class SignOf(OptimizerWrapper):
            def step(self, closure=None):
                for group in self.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            p.grad.sign_()
                return super().step(closure)

    Args:
        base: the optimizer that is wrapped.
        own_defaults: hyperparameters of the wrapper. Each param group gets those that it lacks, so that schedulers may
            change them and checkpoints carry them. ``base`` must not have any of the same name.

    Raises:
        ValueError: ``base`` has a hyperparameter of one of these names.
    """

    def __init__(self, base: Optimizer, own_defaults: Mapping[str, Any] | None = None) -> None:
        # Optimizer.__init__ is not called: it would make param groups, state and hooks beside the base's.
        self.base = base
        self._own_defaults = dict(own_defaults or {})
        clash = sorted(self._own_defaults.keys() & base.defaults.keys())
        if clash:
            name = type(self).__name__
            raise ValueError(
                f"`base` must not have hyperparameters called {clash}, got {type(base).__name__}: {name} keeps its own "
                f"under these names. If a {name} wraps this optimizer already, use that one."
            )
        self._install_defaults()

    def check_own(self, name: str, value: Any) -> None:
        """Refuse a value of one of the wrapper's own hyperparameters; here all are taken."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the step of ``base``."""
        with lent(self.base, self.amp_attributes()):
            return self.base.step(closure)

    def amp_attributes(self) -> dict[str, Tensor | None]:
        """What a GradScaler has set on this wrapper and meant for ``base``: ``grad_scale`` and ``found_inf``."""
        return {name: self.__dict__[name] for name in _AMP_ATTRIBUTES if name in self.__dict__}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's param groups, with the wrapper's own hyperparameters in each."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The base optimizer's state; the wrapper adds none."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults, with the wrapper's own."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as ``base`` does."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the base optimizer; the wrapper's own hyperparameters default as for the others."""
        for name in self._own_defaults.keys() & param_group.keys():
            self.check_own(name, param_group[name])
        self.base.add_param_group(param_group)
        self._install_defaults()

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict; the bare base optimizer can load it."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this wrapper or of the bare base, which leaves the wrapper's hyperparameters as here."""
        present = [{name: group[name] for name in self._own_defaults} for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        for group, own in zip(self.param_groups, present, strict=True):
            for name, value in own.items():
                group.setdefault(name, value)

    def __getattr__(self, name: str) -> Any:
        # Hook registries, and whatever the base offers beyond Optimizer.
        if name == "base":  # Not there yet while unpickling.
            raise AttributeError(name)
        return getattr(self.base, name)

    def __getstate__(self) -> dict[str, Any]:
        # A step that a learning-rate scheduler wrapped is a closure over this object; torch drops it too.
        return {name: value for name, value in self.__dict__.items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__} over {self.base!r}"

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return supports_amp_scaling(self.base)

    def _install_defaults(self) -> None:
        for name, value in self._own_defaults.items():
            self.base.defaults.setdefault(name, value)
            for group in self.param_groups:
                self.check_own(name, group.setdefault(name, value))


def supports_amp_scaling(base: Optimizer) -> bool:
    """Whether ``base`` takes ``found_inf`` and ``grad_scale``, as torch's fused optimizers do.

    torch marks the optimizer that is made with ``fused=True``, and leaves the mark there when a checkpoint of an
    unfused one, or the user, says otherwise in a param group. Its step then asserts that neither is there.
    """
    marked = bool(getattr(base, "_step_supports_amp_scaling", False))
    return marked and all(group.get("fused", True) for group in base.param_groups)


@contextmanager
def lent(base: Optimizer, attributes: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Set ``attributes`` on ``base`` for the time of its step."""
    for name, value in attributes.items():
        setattr(base, name, value)
    try:
        yield
    finally:
        for name in attributes:
            delattr(base, name)
