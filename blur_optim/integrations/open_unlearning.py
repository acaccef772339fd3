"""BLUR around the methods of open-unlearning (https://github.com/locuslab/open-unlearning): one import, YAML files.

Importing this registers the handler ``BLUR``. It makes a subclass of the project's own trainer for a method, so that
data, losses, reference model and evaluation are the project's, and a BLUR run differs from its baseline in the update
alone. docs/integrations.md has the commands, examples/open_unlearning the YAML files.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

from torch import Tensor, nn

from blur_optim.integrations.split_loss import SplitLoss
from blur_optim.integrations.trainer_step import BLURStepMixin, blur_options
from blur_optim.step.plan import own_name

#: The ``method_args`` that are BLUR's. Every other one is the method's.
OPTIONS = tuple(name for name in inspect.signature(blur_options).parameters if name not in ("gamma", "retain_weight"))
_DEFAULTS = {"rule": "blur", "normalize": False, "scope": "global", "stash": "reference", "backend": None}
# A name for two: what descends the negative loss with a retain loss beside it.
_SYNONYMS = {"GradAscent": "GradDiff"}


@functools.cache
def make_trainer(method: Any, grad_diff: Any) -> type:
    """Return BLUR as a subclass of a method of open-unlearning.

    Args:
        method: one of the project's trainers: a subclass of its ``GradDiff``, or one that only forgets (``CEU``), to
            which ``GradDiff``'s retain loss is added.
        grad_diff: ``trainer.unlearn.grad_diff.GradDiff``.
    Raises:
        TypeError: the method has a ``training_step`` of its own, which BLUR's would replace.
    """
    owner = next(c for c in method.__mro__ if "training_step" in vars(c))
    if owner.__module__.partition(".")[0] != "transformers":
        raise TypeError(
            f"`forget_loss` must name a method without a training_step of its own, which BLUR's would replace, got "
            f"{method.__name__}, whose is {owner.__module__}.{owner.__name__}'s."
        )
    only_forgets = not issubclass(method, grad_diff)
    # The mixin's compute_retain_loss would hide the project's.
    retain_loss = grad_diff.compute_retain_loss if only_forgets else method.compute_retain_loss
    name = f"BLUR_{method.__name__}"
    own = {"method": method, "only_forgets": only_forgets, "compute_retain_loss": retain_loss}
    own |= {"__doc__": _ProjectStep.__doc__, "__module__": __name__}
    return type(name, (_ProjectStep, method, *((grad_diff,) if only_forgets else ())), own)


class _ProjectStep(BLURStepMixin):
    """A method of the project with BLUR's step (arXiv:2506.08164) in the place of the weighted sum.

    Its ``method_args`` are those of the method, by the project's names and with the project's defaults: ``gamma`` and
    ``alpha`` weigh the two gradients. Beside them ``rule``, ``normalize``, ``scope``, ``stash``, ``backend``,
    ``metric``, ``damping``: see :class:`blur_optim.BLUR`.

    Raises:
        ValueError: an option is none that BLUR takes, or the Trainer is set up in a way that BLUR refuses.
    """

    oldest_transformers = "4.51.3"
    #: The project's class, and whether it has no retain loss of its own.
    method: Any
    only_forgets: bool
    #: The project's weights of the two losses.
    gamma: float
    alpha: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name, default) for name, default in _DEFAULTS.items()}
        options |= {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        # Before 2026 the project gave its Trainer no data set for the evaluations that its evaluators do.
        if kwargs.get("evaluators") and kwargs.get("eval_dataset") is None:
            kwargs["eval_dataset"] = []
        super().__init__(*args, **kwargs)
        options = blur_options(gamma=float(self.gamma), retain_weight=float(self.alpha), **options)
        self.start_blur(_unused, _unused, **options)
        self._split = SplitLoss(self, self.method, self.only_forgets)
        _checkpoint_without_reentry(self.args)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Wrap the optimizer; what it does not train (RMU's other layers) needs no gradient."""
        optimizer = super().create_optimizer(*args, **kwargs)
        # What accelerate puts in the place of an optimizer that DeepSpeed makes itself has no groups.
        groups = getattr(self.optimizer, "param_groups", None)
        trained = {id(p) for group in groups or () for p in group["params"]}
        for parameter in self.model.parameters() if groups else ():
            parameter.requires_grad_(id(parameter) in trained)
        return optimizer

    def _phase_loss(self, model: nn.Module, side: str, batch: Any) -> Tensor:
        inputs = self._prepare_inputs(batch)  # type: ignore[attr-defined]
        if side == "forget":
            return self._split.forget(model, inputs)
        group = self.blur.param_groups[0]
        return self._split.retain(model, inputs, group[own_name("retain_weight", group)])

    def _run_phase(self, model: nn.Module, side: str, batches: list[dict[str, Any]]) -> Tensor:
        if side == "forget":
            self._split.begin()
        elif self._split.has_own_weights:
            # The same on all processes, as every coefficient has to be.
            weight = self.accelerator.reduce(self._split.retain_weight(), "mean").item()
            for group in self.blur.param_groups:
                group.update({own_name("gamma", group): 1.0, own_name("retain_weight", group): weight})
        return super()._run_phase(model, side, batches)


def register() -> Any:
    """Add the handler ``BLUR`` to the registry of open-unlearning, whose ``src`` has to be on the path.

    Returns:
        The handler: called with ``forget_loss``, the name of a method in the registry, and what the project gives to
        that method's trainer, it returns the trainer.
    Raises:
        ImportError: there is no ``trainer`` package with a registry.
    """
    try:
        registry: dict[str, Any] = importlib.import_module("trainer").TRAINER_REGISTRY
        grad_diff = importlib.import_module("trainer.unlearn.grad_diff").GradDiff
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "open-unlearning must be on the path, for its `trainer` package to be imported. Put `import "
            "blur_optim.integrations.open_unlearning` at the end of its src/trainer/__init__.py."
        ) from error

    def blur(*args: Any, forget_loss: str, **kwargs: Any) -> Any:
        return make_trainer(_find(forget_loss, registry), grad_diff)(*args, **kwargs)

    registry["BLUR"] = blur
    return blur


def _find(name: str, registry: dict[str, Any]) -> Any:
    """The method's class.

    Raises:
        ValueError: there is no method of that name that forgets.
    """
    base = importlib.import_module("trainer.unlearn.base").UnlearnTrainer
    methods = {n: c for n, c in registry.items() if inspect.isclass(c) and issubclass(c, base)}
    if name not in methods:
        raise ValueError(
            f"`forget_loss` must be a method of the project, one of {sorted(methods)}, got {name!r}. With defaults: "
            f"[{name}] in the YAML, handler: BLUR and forget_loss say which one."
        )
    return methods[_SYNONYMS.get(name, name)]


def _unused(*_: Any) -> Tensor:
    raise AssertionError("The project's own losses are used.")


def _checkpoint_without_reentry(args: Any) -> None:
    """Let activation checkpointing leave gradients to what is captured inside a layer, and below it to nothing.

    Its reentrant kind, transformers' default before 5, first runs layers without gradients: what RMU captures within a
    layer would have none, nor, before 5, what it captures of a whole one.
    """
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")  # The older one is an alias since 5.
    name = next(name for name in names if hasattr(args, name))
    setattr(args, name, {**(getattr(args, name) or {}), "use_reentrant": False})


register()
