"""BLUR as a method of open-unlearning (https://github.com/locuslab/open-unlearning): one import, one YAML file.

Importing this registers the handler ``BLUR``. The tests use a stand-in of that project's trainers; docs/integrations.md
says what else was run.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from blur_optim.integrations.objectives import Loss, Reference, make_forget_loss, make_retain_loss, make_rmu_losses
from blur_optim.integrations.trainer_step import BLURStepMixin, blur_options

FORGET_LOSSES = {"GradAscent": "ga", "GradDiff": "ga", "NPO": "npo", "SimNPO": "simnpo", "DPO": "dpo"}
RETAIN_LOSSES = {"NLL": "nll", "KL": "kl"}
_NEED_REFERENCE = ("NPO", "DPO", "RMU")


def make_trainer(base: type) -> type:
    """Return BLUR as a subclass of open-unlearning's trainer.

    Args:
        base: ``trainer.unlearn.base.UnlearnTrainer``, or any Trainer whose batches are ``{"forget": ..., "retain":
            ...}``. Its evaluation stays.
    """

    class BLUR(BLURStepMixin, base):
        """Unlearning with BLUR (arXiv:2506.08164) around one of the project's methods.

        Its ``method_args``, those of the project by the project's names:

        Args:
            forget_loss: ``"GradDiff"`` (or ``"GradAscent"``), ``"NPO"``, ``"SimNPO"``, ``"DPO"`` or ``"RMU"``.
            retain_loss_type: ``"NLL"``, ``"KL"``, or for RMU ``"EMBED_DIFF"``, the distance of activations.
            gamma: weight of the forget gradient.
            alpha: weight of the retain gradient.
            beta, delta: of the forget loss, as the project defines them: SimNPO's ``delta`` stands beside
                ``beta``'s product there.
            rule, normalize, scope, stash, backend: BLUR's, see :class:`blur_optim.BLUR`.
            module_regex, trainable_params_regex, steering_coeff: RMU's layer, what is trained, the norm of its vector.
                Gradient checkpointing is not reentrant with RMU, whatever its arguments say.

        Raises:
            ValueError: there is no loss of that name, or the Trainer is set up in a way that BLUR refuses.
        """

        def __init__(
            self,
            *args: Any,
            forget_loss: str = "NPO",
            retain_loss_type: str = "NLL",
            gamma: float = 1.0,
            alpha: float = 1.0,
            beta: float | None = None,
            delta: float = 0.0,
            rule: str = "blur",
            normalize: bool = False,
            scope: str = "global",
            stash: str = "reference",
            backend: str | None = None,
            module_regex: str = r"model\.layers\.7",
            trainable_params_regex: Sequence[str] = (r"model\.layers\.(5|6|7)\.mlp\.down_proj\.weight",),
            steering_coeff: float = 20.0,
            **kwargs: Any,
        ) -> None:
            super().__init__(*args, **kwargs)
            options = blur_options(
                gamma=gamma,
                retain_weight=alpha,
                rule=rule,
                normalize=normalize,
                scope=scope,
                stash=stash,
                backend=backend,
            )
            self.ref_model = None
            if forget_loss in _NEED_REFERENCE or retain_loss_type in ("KL", "EMBED_DIFF"):
                self.ref_model = copy.deepcopy(self.model).requires_grad_(False).eval().to(self.args.device)
            reference = Reference(self.ref_model, self.accelerator.autocast)
            if forget_loss == "RMU":
                assert self.ref_model is not None
                losses = make_rmu_losses(
                    self.model, self.ref_model, module_regex, coefficient=steering_coeff, seed=self.args.seed
                )
                forget, retain = losses
                _freeze_others(self.model, list(trainable_params_regex))
                _checkpoint_without_reentry(self.args)
            else:
                forget = _named_forget_loss(forget_loss, reference, beta, delta)
                retain = None
            if retain_loss_type != "EMBED_DIFF" or retain is None:
                retain = make_retain_loss(_translated("retain_loss_type", retain_loss_type, RETAIN_LOSSES), reference)
            self.start_blur(forget, retain, **options)

        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            """Where a loss of a pair is asked for outside training: the weighted sum."""
            if "forget" not in inputs:
                return super().compute_loss(model, inputs, *args, **kwargs)
            forget = self.compute_forget_loss(model, _answers(inputs["forget"]))
            retain = self.compute_retain_loss(model, inputs["retain"])
            options = self.blur_options
            return options["gamma"] * forget + options["retain_weight"] * retain

        def compute_forget_loss(self, model: nn.Module, batch: Any) -> Tensor:
            return super().compute_forget_loss(model, _answers(batch))

    return BLUR


def register() -> type:
    """Add the handler ``BLUR`` to the registry of open-unlearning, whose ``src`` has to be on the path.

    Returns:
        The trainer class.
    Raises:
        ImportError: there is no ``trainer`` package with a registry.
    """
    try:
        trainers = importlib.import_module("trainer")
        base = importlib.import_module("trainer.unlearn.base").UnlearnTrainer
        registry: dict[str, Any] = trainers.TRAINER_REGISTRY
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "open-unlearning must be on the path, for its `trainer` package to be imported. Put `import "
            "blur_optim.integrations.open_unlearning` at the end of its src/trainer/__init__.py."
        ) from error
    registry["BLUR"] = make_trainer(base)
    return registry["BLUR"]  # type: ignore[no-any-return]


def _answers(batch: Any) -> Any:
    """The project calls an answer and the one to give instead ``original`` and ``alternate``."""
    if "original" in batch and "alternate" in batch:
        return {"chosen": batch["alternate"], "rejected": batch["original"]}
    return batch


def _named_forget_loss(name: str, reference: Reference, beta: float | None, delta: float) -> Loss:
    translated = _translated("forget_loss", name, {**FORGET_LOSSES, "RMU": ""})
    # The project's SimNPO takes its margin inside the product with beta, ours outside.
    return make_forget_loss(translated, reference, beta=beta, delta=delta * (2.5 if beta is None else beta))


def _freeze_others(model: nn.Module, patterns: Sequence[str]) -> None:
    """Leave gradients to the parameters that are to be trained, so that nothing is computed for the others."""
    found = False
    for name, parameter in model.named_parameters():
        fits = any(re.fullmatch(pattern, name) for pattern in patterns)
        parameter.requires_grad_(fits)
        found = found or fits
    if not found:
        raise ValueError(f"`trainable_params_regex` must fit the names of parameters, got none for {list(patterns)}.")


def _checkpoint_without_reentry(args: Any) -> None:
    """Let activation checkpointing leave gradients to what is captured inside a layer, and below it to nothing.

    Its reentrant kind, transformers' default before 5, first runs layers without gradients: what RMU captures within a
    layer would have none, nor, before 5, what it captures of a whole one.
    """
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")  # The older one is an alias since 5.
    name = next(name for name in names if hasattr(args, name))
    setattr(args, name, {**(getattr(args, name) or {}), "use_reentrant": False})


def _translated(argument: str, name: str, names: dict[str, str]) -> str:
    if name not in names:
        raise ValueError(f"`{argument}` must be one of {sorted(names)}, got {name!r}.")
    return names[name]


register()
