"""BLUR's step inside a transformers Trainer: what every Trainer subclass here has in common.

The Trainer's own loop runs as it is. It calls ``training_step`` for each micro-batch; here the micro-batches are only
collected until the last one before a step. Then all forget halves run, then all retain halves, and ``p.grad`` holds the
update: unscaling, clipping, the step, schedulers, logging and checkpoints are the Trainer's. Under DeepSpeed the
engine has the gradients, and steps; what the Trainer does of it then does nothing, as without BLUR.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from blur_optim.integrations.deepspeed.optimizer import DeepSpeedBLUR, check_metric
from blur_optim.integrations.objectives import Loss
from blur_optim.integrations.pairs import single_batches
from blur_optim.integrations.trainer_checks import check_trainer, checked_loss
from blur_optim.optimizer import BLUR
from blur_optim.step.plan import own_name
from blur_optim.step.rules import UserRule

#: Logged updates that were all clipped before it is said what that means in the retain metric.
_CLIPPED_BEFORE_SAID = 5


class BLURStepMixin:
    """Mixed into a Trainer, before it in the bases; batches are ``{"forget": ..., "retain": ...}``.

    :meth:`start_blur` has to be called at the end of ``__init__``.
    """

    # The Trainer's, as far as they are used here. Any, for transformers need not be installed to check types.
    args: Any
    accelerator: Any
    optimizer: Any
    state: Any
    #: Forget and retain loss of the last step, 0-d: means of this process's micro-batches.
    last_losses: tuple[Tensor, Tensor] | None = None
    _engine_blur: DeepSpeedBLUR | None = None
    _pending: list[dict[str, Any]]
    _loss_sums: Tensor
    _clipped = 0
    _said_of_clipping = False
    model: Any
    #: With older ones a gradient comes out wrong (4.45: divided by the accumulation twice) or a resumed run does.
    oldest_transformers = "4.57.6"

    def start_blur(self, forget_loss: Loss, retain_loss: Loss, **options: Any) -> None:
        """Set the losses, and the options with which :class:`blur_optim.BLUR` will wrap the Trainer's optimizer.

        Raises:
            ValueError: the Trainer is set up in a way that leaves no place for two gradients.
        """
        check_trainer(self)
        if getattr(self, "is_deepspeed_enabled", False):
            check_metric(options.get("metric", "euclidean"))
        self.forget_loss, self.retain_loss, self.blur_options = forget_loss, retain_loss, options
        self._pending, self._loss_sums, self.last_losses = [], torch.zeros(3), None

    def apply_options(self, changed: Collection[str]) -> None:
        """Let the options of the last :meth:`start_blur` hold for an optimizer that exists already.

        Args:
            changed: which of ``gamma`` and ``retain_weight`` to set in the param groups, where schedulers and
                checkpoints may have changed them.
        """
        blur, options = self.blur, self.blur_options
        if options["metric"] != blur.metric:
            raise ValueError(
                f"`metric` must be {blur.metric!r} in a second run of one trainer, whose optimizer has its state in "
                f"that metric, got {options['metric']!r}. Make another trainer."
            )
        in_groups = {"gamma", "retain_weight"}
        blur.configure(**{name: value for name, value in options.items() if name not in {*in_groups, "metric"}})
        for name in in_groups & set(changed):
            for param_group in blur.param_groups:
                param_group[own_name(name, param_group)] = options[name]

    def compute_forget_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The forget loss of one micro-batch, 0-d: descending it forgets. Override to compute another."""
        return self.forget_loss(model, batch)

    def compute_retain_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The retain loss of one micro-batch, 0-d. Override to compute another."""
        return self.retain_loss(model, batch)

    @property
    def blur(self) -> BLUR:
        """The optimizer, without what accelerate has put around it.

        Raises:
            RuntimeError: training has not begun, so there is none.
        """
        engine = self._engine
        if engine is not None and (self._engine_blur is None or self._engine_blur.engine is not engine):
            self._engine_blur = DeepSpeedBLUR(engine, **self.blur_options)
        found = _unwrapped(self.optimizer) if engine is None else self._engine_blur
        if not isinstance(found, BLUR):
            raise RuntimeError("There is no BLUR optimizer before trainer.train() or trainer.create_optimizer().")
        return found

    # -- What the Trainer calls --------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Wrap the optimizer that ``args.optim`` names, or that was passed in ``optimizers``, with BLUR.

        Under DeepSpeed it stays bare, for the engine takes its param groups apart.
        """
        super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if getattr(self, "is_deepspeed_enabled", False):
            return self.optimizer
        if not isinstance(_unwrapped(self.optimizer), BLUR):
            self.optimizer = BLUR(base=self.optimizer, **self.blur_options)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Keep a micro-batch; with the last before a step, run both phases.

        Returns:
            0-d, detached: gamma times the forget loss plus retain_weight times the retain loss, averaged over the
            micro-batches; 0 where the step is still to come. What BLUR descends has no such number.
        """
        self._pending.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._pending = self._pending, []
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        blur = self.blur
        with blur.forget():
            forget = self._run_phase(model, "forget", batches)
        # The scale, or under fp16 max_grad_norm, normalize and statistics would be those of scaled gradients.
        with blur.retain(grad_scale=self.accelerator.scaler):
            retain = self._run_phase(model, "retain", batches)
        if self._engine is not None:
            blur.step()  # The Trainer leaves it to accelerate's backward, which is not called.
        self.last_losses = forget, retain
        self._loss_sums = self._loss_sums.to(forget.device) + torch.stack([forget, retain, torch.ones_like(forget)])
        group = blur.param_groups[0]
        gamma, weight = (group[own_name(name, group)] for name in ("gamma", "retain_weight"))
        loss: Tensor = gamma * forget + weight * retain
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add ``forget_loss`` and ``retain_loss``, the means since the last log, and ``blur_*``, the last step's
        statistics, to what the Trainer logs of training."""
        # Evaluation and the summary at the end come here too, and not on every process.
        if {"loss", "learning_rate"} <= logs.keys():
            logs.update(self._training_logs())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the Trainer does. Gradients that it leaves (a score that is a gradient's norm) are dropped: they
        belong to neither loss."""
        is_clean = all(p.grad is None for p in self.model.parameters())
        try:
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]
        finally:
            if is_clean:
                self.model.zero_grad()

    def floating_point_ops(self, inputs: Any) -> int:
        """The Trainer's estimate, over both halves."""
        parts = [part for side in ("forget", "retain") for part in single_batches(inputs[side])]
        return sum(super(BLURStepMixin, self).floating_point_ops(part) for part in parts)  # type: ignore[misc]

    # -- Inside a step -----------------------------------------------------------------------------------------------

    def _run_phase(self, model: nn.Module, side: str, batches: list[dict[str, Any]]) -> Tensor:
        total = torch.zeros((), device=self.args.device)
        for position, batch in enumerate(batches, start=1):
            # Each phase has to end reduced over the processes, so the last backward of each is the one that syncs.
            with self._no_sync(model) if position < len(batches) else nullcontext():
                with self.compute_loss_context_manager():  # type: ignore[attr-defined]
                    loss = checked_loss(f"{side}_loss", self._phase_loss(model, side, batch)).mean() / len(batches)
                self._backward(loss)
            total += loss.detach()
        return total

    def _phase_loss(self, model: nn.Module, side: str, batch: dict[str, Any]) -> Tensor:
        half = self._prepare_inputs(batch[side])  # type: ignore[attr-defined]
        compute = self.compute_forget_loss if side == "forget" else self.compute_retain_loss
        return compute(model, half)

    def _no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        # An engine needs none, and does not have it in all stages.
        context: AbstractContextManager[Any] = nullcontext() if self._engine else self.accelerator.no_sync(model=model)
        return context

    def _backward(self, loss: Tensor) -> None:
        if self._engine is None:
            self.accelerator.backward(loss)
        else:
            self._engine.backward(loss, scale_wrt_gas=False)  # The loss has been divided.

    @property
    def _engine(self) -> Any:
        """DeepSpeed's, once there is one."""
        wrapped = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        return None if wrapped is None else wrapped.engine

    def _training_logs(self) -> dict[str, float]:
        forget, retain, steps = self.accelerator.reduce(self._loss_sums.to(self.args.device), "sum").tolist()
        self._loss_sums = torch.zeros(3)
        logs = {"forget_loss": forget / steps, "retain_loss": retain / steps} if steps else {}
        statistics = self.blur.statistics
        for name, value in {} if statistics is None else statistics.to_dict().items():
            # With one value for each param group: the Trainer has two, for weight decay, which mean nothing here.
            logs[f"blur_{name}"] = fmean(value) if isinstance(value, list) else value
        self._watch_clipping(logs.get("blur_update_norm", 0.0))
        return logs

    def _watch_clipping(self, update_norm: float) -> None:
        """Say once where clipping has become a smaller learning rate, which Adam's own denominator would undo."""
        limit = self.args.max_grad_norm
        if self._said_of_clipping or not limit or self.blur.metric != "retain":
            return
        self._clipped = self._clipped + 1 if update_norm > limit else 0
        if self._clipped == _CLIPPED_BEFORE_SAID and self.state.is_world_process_zero:
            self._said_of_clipping = True
            warnings.warn(
                f"The last {_CLIPPED_BEFORE_SAID} updates that were logged were all clipped, the last from a norm of "
                f"{update_norm:.3g} to max_grad_norm={limit:g}. With metric='retain' that is a learning rate of "
                f"{limit / update_norm:.2g} times the one given. Set max_grad_norm=0, or a limit above the usual "
                "blur_update_norm.",
                stacklevel=2,
            )


def _unwrapped(optimizer: Any) -> Any:
    return optimizer if isinstance(optimizer, BLUR) else getattr(optimizer, "optimizer", optimizer)


def blur_options(
    *,
    gamma: float,
    retain_weight: float,
    rule: str | UserRule,
    normalize: bool,
    scope: str,
    stash: str,
    backend: str | None,
    metric: str = "euclidean",
    damping: float = 0.01,
) -> dict[str, Any]:
    """The arguments of BLUR in a Trainer, checked before a model is loaded onto a device.

    Raises:
        ValueError, TypeError: a value is not one that BLUR takes, or ``stash`` is ``"recompute"``.
    """
    if stash == "recompute":
        raise ValueError(
            "`stash` must not be 'recompute' in a Trainer, whose step cannot be run a second time. Use 'int8' or 'cpu'."
        )
    options: dict[str, Any] = {"gamma": gamma, "retain_weight": retain_weight, "rule": rule, "normalize": normalize}
    options |= {"scope": scope, "stash": stash, "metric": metric, "damping": damping}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The optimizer itself will say it.
        BLUR([torch.zeros(1)], torch.optim.SGD, **options)  # To have them checked now; a backend depends on the device.
    return {**options, "backend": backend}
