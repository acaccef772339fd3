"""BLUR on a DeepSpeed engine: gradients are the engine's pieces, the step is the engine's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor

from blur_optim.integrations.deepspeed.setup import gradients_of
from blur_optim.integrations.deepspeed.two_phase import EngineStep
from blur_optim.kernels import select_backend
from blur_optim.optimizer import BLUR
from blur_optim.step.rules import UserRule
from blur_optim.step.statistics import StepStatistics


def check_metric(metric: str) -> None:
    """Refuse the metric of the retain loss with an engine.

    Raises:
        ValueError: ``metric`` is not ``"euclidean"``.
    """
    if metric != "euclidean":
        raise ValueError(
            f"`metric` must be 'euclidean' with an engine, got {metric!r}: the engine's optimizer makes its second "
            "moments of the update, and the retain metric needs those of the retain gradient. Use FSDP2 "
            "(fully_shard; fsdp=True in a Trainer)."
        )


class DeepSpeedBLUR(BLUR):
    r"""Step along the forget gradient and the part of the retain gradient that does not undo it, with ZeRO.

    .. math::
        u = a\,g_f + b\,g_r, \qquad a = \gamma - \alpha\,\langle g_r, g_f\rangle/\|g_f\|^2, \quad b = \alpha
        \qquad \text{(arXiv:2506.08164)}

    The dots are over all ranks. :math:`u` takes the place of the engine's averaged gradient, and ``engine.step()`` does
    the rest: the loss scale, ``gradient_clipping``, the optimizer of the configuration, its scheduler. ZeRO-0, 1, 2
    and 3, in float32, bfloat16 and, but for ZeRO-0, float16; with ``offload_optimizer`` on the CPU.

    Example::

        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(...), config=config)
        opt = DeepSpeedBLUR(engine, gamma=1.0)
        for forget_batches, retain_batches in data:
            for phase, batches, loss in ((opt.forget, forget_batches, npo), (opt.retain, retain_batches, nll)):
                with phase():
                    for batch in batches:
                        engine.backward(loss(engine, batch) / len(batches), scale_wrt_gas=False)
            opt.step()

    A phase may have any number of backward passes, whatever ``gradient_accumulation_steps`` says; with
    ``scale_wrt_gas=False`` the engine does not divide by that number. There is no ``zero_grad`` to call.

    After every step the engine's own account is compared with BLUR's: it has taken one step, on a gradient whose norm
    is that of the update.

    ``param_groups``, ``state`` and ``defaults`` are those of ``engine.basic_optimizer``, with ``gamma`` and
    ``retain_weight`` in each group. ``engine.save_checkpoint`` and ``engine.load_checkpoint`` keep them.

    Args:
        engine: what ``deepspeed.initialize`` returns first; under accelerate
            ``accelerator.deepspeed_engine_wrapped.engine``.
        gamma, retain_weight, rule, normalize, scope, backend: as :class:`blur_optim.BLUR` takes them.
        max_grad_norm: as there, instead of ``gradient_clipping`` in the configuration, which does the same.
        stash: as there, but for ``"recompute"``.
        metric, damping: ``"euclidean"``, which has no damping. In the retain metric the second moments are those of the
            retain gradient, and the engine's optimizer would make them of the update.

    Raises:
        TypeError: ``engine`` is none.
        ValueError: a value is out of range, or the engine is set up in a way that cannot be right with two gradients.
        ImportError: DeepSpeed lacks what is needed of it.
    """

    def __init__(
        self,
        engine: Any,
        *,
        gamma: float = 1.0,
        retain_weight: float = 1.0,
        rule: str | UserRule = "blur",
        normalize: bool = False,
        scope: str = "global",
        max_grad_norm: float | None = None,
        stash: str = "reference",
        backend: str | None = None,
        metric: str = "euclidean",
        damping: float = 0.01,
    ) -> None:
        check_metric(metric)
        if stash == "recompute":
            raise ValueError(
                "`stash` must not be 'recompute' with an engine, which has phases only. Use 'int8' or 'cpu'."
            )
        self._gradients = gradients_of(engine)
        self.engine = engine
        if max_grad_norm is not None and engine.gradient_clipping() > 0:
            raise ValueError(
                f"`max_grad_norm` must be None where the engine clips, got {max_grad_norm!r} beside a "
                f"gradient_clipping of {engine.gradient_clipping()!r}. Leave one of them out."
            )
        options: dict[str, Any] = {"gamma": gamma, "retain_weight": retain_weight, "rule": rule, "normalize": normalize}
        options |= {
            "scope": scope,
            "max_grad_norm": max_grad_norm,
            "stash": stash,
            "backend": backend,
            "damping": damping,
        }
        super().__init__(base=engine.basic_optimizer, **options)
        select_backend(backend, self._gradients.device)

    @contextmanager
    def forget(self) -> Iterator[None]:
        """Open the forget phase: every ``engine.backward`` of the forget loss belongs in this context.

        Raises:
            RuntimeError: as :meth:`blur_optim.BLUR.forget`; or the engine holds gradients, or steps in this context.
        """
        with super().forget():
            yield

    @contextmanager
    def retain(self, grad_scale: None = None) -> Iterator[None]:  # type: ignore[override]
        """Open the retain phase: every ``engine.backward`` of the retain loss belongs in this context.

        Args:
            grad_scale: None: the engine's own loss scale is known.

        Raises:
            RuntimeError: as :meth:`blur_optim.BLUR.retain`; or the engine steps in this context.
        """
        if grad_scale is not None:
            raise TypeError(f"`grad_scale` must be None, got {grad_scale!r}: the loss scale is the engine's.")
        with super().retain(self._gradients.loss_scale):
            yield

    def step(self, forget: None = None, retain: None = None, *, closure: None = None) -> None:  # type: ignore[override]
        """Let the engine step on the update: ``engine.step()``. No gradient is left afterwards.

        Where a gradient is not finite on any rank, all of them skip. Under float16 that is the engine's affair.

        Raises:
            TypeError: closures, which cannot be known to call ``engine.backward``.
            RuntimeError: the two phases have not both ended; or the engine has not stepped, or not on the update. In
                the latter case the parameters are wrong: load the last checkpoint.
        """
        if forget is not None or retain is not None or closure is not None:
            raise TypeError("`step` must be called without closures, got one. Use opt.forget() and opt.retain().")
        super().step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard what the engine has collected, and forget gradients that wait for their retain phase.

        Not needed between two steps. Within a phase it does nothing.
        """
        if not self._two_phase.phases.is_open:
            self._two_phase.discard()

    @property
    def statistics(self) -> StepStatistics | None:
        """What the last projection saw, over all ranks; ``params`` are the engine's."""
        seen = super().statistics
        if seen is None:
            return None
        own = {id(stand_in): p for stand_in, p in zip(self._two_phase.params(), self._gradients.params, strict=True)}
        return replace(seen, params=[own[id(stand_in)] for stand_in in seen.params])

    def configure(self, **options: Any) -> None:
        """As :meth:`blur_optim.BLUR.configure`, with the limits of the constructor's arguments."""
        self._check_arguments(options.get("stash"), options.get("max_grad_norm"))
        before = self._two_phase
        super().configure(**options)
        before.discard()

    def params_by_group(self) -> list[list[Tensor]]:
        """The parameters of the model, by param group; ``param_groups`` hold what the engine has made of them."""
        return [list(group) for group in self._gradients.groups]

    def state_dict(self) -> NoReturn:
        """Refused: ``engine.save_checkpoint`` keeps all there is, ``gamma`` and ``retain_weight`` included."""
        raise RuntimeError(
            "DeepSpeedBLUR has no state of its own. Use engine.save_checkpoint(), which keeps everything."
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> NoReturn:
        """Refused, as :meth:`state_dict`."""
        raise RuntimeError("DeepSpeedBLUR has no state of its own. Use engine.load_checkpoint().")

    def add_param_group(self, param_group: dict[str, Any]) -> NoReturn:
        """Refused: an engine has its param groups from the start."""
        raise RuntimeError("An engine has its param groups from the start. Pass them to deepspeed.initialize.")

    def _check_arguments(self, stash: str | None, max_grad_norm: float | None) -> None:
        if stash == "recompute":
            raise ValueError("`stash` must not be 'recompute' with an engine, which has phases only. Use 'int8'.")
        clipping = self.engine.gradient_clipping()
        if max_grad_norm is not None and clipping > 0:
            raise ValueError(
                f"`max_grad_norm` must be None where the engine clips, got {max_grad_norm!r} beside a "
                f"gradient_clipping of {clipping!r}. Leave one of them out."
            )

    def _make_two_phase(self) -> EngineStep:
        return EngineStep(self._gradients, self.base, self.stash, self.backend)
