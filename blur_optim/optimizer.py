"""BLUR: the torch.optim-style wrapper. Phases, closures and everything an Optimizer owes to its surroundings."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import AdamW, Optimizer

from blur_optim.kernels import select_backend
from blur_optim.parallel.ranks import Ranks
from blur_optim.parallel.wrappers import Wrappers, drop_held_back, holds_back, is_gathered
from blur_optim.step.base import check_base, make_base, step_base, supports_amp_scaling
from blur_optim.step.fused import fused_step, why_not_fused
from blur_optim.step.gradients import PairedGradients, Rows, check_gradients, check_weight, pair_gradients
from blur_optim.step.phases import Phase, Phases
from blur_optim.step.projection import Projection, Projector, blend_, project
from blur_optim.step.recompute import recompute
from blur_optim.step.rules import RETAIN_NORM_FREE, RULES, Rule, UserRule, on_unit_gradients, per_row
from blur_optim.step.stash import STASHES
from blur_optim.step.statistics import StepStatistics

Closure = Callable[[], Any]
SCOPES = ("global", "group", "parameter")


class BLUR(Optimizer):
    r"""Step along the forget gradient and the part of the retain gradient that does not undo it.

    .. math::
        u = a\,g_f + b\,g_r, \qquad a = \gamma - \alpha\,\langle g_r, g_f\rangle/\|g_f\|^2, \quad b = \alpha
        \qquad \text{(arXiv:2506.08164)}

    ``base`` applies :math:`u` as if it were the gradient. ``param_groups``, ``state``, ``defaults``, ``state_dict``
    and hooks are the base optimizer's own; hooks receive the base optimizer.

    Example::

        opt = BLUR(model.parameters(), base=torch.optim.AdamW, gamma=1.0, lr=1e-5)
        forget_loss, retain_loss = opt.step(forget_closure, retain_closure)

    Args:
        params: what ``base`` takes: parameters, named parameters or param groups. A group may carry its own ``gamma``
            and ``retain_weight``. Leave it out where ``base`` is an instance.
        base: an optimizer class, a factory called as ``base(params, **base_kwargs)``, or an optimizer instance.
        gamma: weight of the forget gradient; >= 0. Kept in every param group, so schedulers may change it.
        retain_weight: :math:`\alpha`, weight of the retain gradient; >= 0. Kept in every param group.
        rule: ``"blur"``, ``"retain_first"``, ``"conflict"``, ``"barrier"``, ``"weighted_sum"``, ``"normalized"``, or a
            callable ``(dots, gamma, alpha) -> (a, b)`` on 0-d float64 tensors; see :mod:`blur_optim.step.rules`.
        normalize: apply the rule to :math:`g_f/\|g_f\|` and :math:`g_r/\|g_r\|`.
        scope: over what the dots are summed: ``"global"`` (the paper), ``"group"`` or ``"parameter"``.
        max_grad_norm: clip :math:`\|u\|` to this, as ``clip_grad_norm_`` would, without its pass. None: no clipping.
        stash: where the forget gradients wait: ``"reference"`` as they are, ``"bfloat16"`` or ``"int8"`` compressed,
            ``"cpu"`` in host memory, ``"recompute"`` by evaluating the retain closure twice; see docs/memory.md.
        backend: kernels to use, see :mod:`blur_optim.kernels.select`; None takes the default.
        **base_kwargs: go to ``base``: ``lr``, ``weight_decay``, ``fused``, ... Where ``base`` has an argument of a name
            above (``max_grad_norm``, ``normalize``), bind it: ``base=functools.partial(Base, max_grad_norm=1.0)``.

    Raises:
        TypeError: ``base`` is not an optimizer, or needs a closure of its own.
        ValueError: a value is out of range, or ``params`` are copies that FSDP2 has gathered for a forward pass.
    """

    _last: Projection | None
    _found_inf: Tensor | None
    _witness: tuple[Tensor, Tensor | None] | None
    _zeros: list[tuple[Tensor, int]]
    _warned = False
    #: Take the dots of each parameter too, in the same pass, for ``statistics``; on all ranks or on none.
    record_alignment = False

    def __init__(
        self,
        params: Any = None,
        base: Callable[..., Optimizer] | Optimizer = AdamW,
        *,
        gamma: float = 1.0,
        retain_weight: float = 1.0,
        rule: str | UserRule = "blur",
        normalize: bool = False,
        scope: str = "global",
        max_grad_norm: float | None = None,
        stash: str = "reference",
        backend: str | None = None,
        **base_kwargs: Any,
    ) -> None:
        # Optimizer.__init__ is not called: it would make param groups, state and hooks beside the base's.
        check_weight("gamma", gamma)
        check_weight("retain_weight", retain_weight)
        _check_choice("scope", scope, SCOPES)
        _check_choice("stash", stash, STASHES)
        if max_grad_norm is not None and not (isinstance(max_grad_norm, Real) and max_grad_norm > 0):
            raise ValueError(f"`max_grad_norm` must be a positive number or None, got {max_grad_norm!r}.")
        _make_rule(rule, normalize)
        self.rule, self.normalize, self.scope = rule, normalize, scope
        self.max_grad_norm, self.stash, self.backend = max_grad_norm, stash, backend
        self.base = make_base(params, base, base_kwargs)
        self._own_defaults = {"gamma": gamma, "retain_weight": retain_weight}
        check_base(self.base, self._own_defaults)
        if is_gathered(self._params()):
            raise ValueError(
                "`params` must be the sharded parameters, got copies that FSDP has gathered for a forward pass. "
                "Call reshard() on the model first, or make BLUR before the first forward."
            )
        for device in {p.device for p in self._params()}:
            select_backend(backend, device)
        self._install_defaults()
        self._skipped = torch.zeros((), dtype=torch.int64)
        self._begin()

    # -- The step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, forget: Closure | None = None, retain: Closure | None = None, *, closure: None = None
    ) -> tuple[Any, Any] | None:
        """Take one optimizer step.

        Args:
            forget, retain: functions of no argument that compute a loss, call ``backward`` (as often as they like) and
                return the loss. Where one leaves no gradient and returns a differentiable loss, ``backward`` is called
                for it. They run with gradients enabled, ``forget`` first. No gradient is left afterwards.
                Without them: the step of the base optimizer on ``p.grad``, which holds the update after ``with
                opt.forget()`` and ``with opt.retain()``. With neither phase before it this is not BLUR but the base
                optimizer alone, and warned of once.
            closure: None, the value by which checkpointing code and engines call every optimizer.

        Returns:
            What the two closures returned, tensors detached; None without closures.

        Raises:
            TypeError: one closure instead of two.
            RuntimeError: the step is called inside a phase or between the two, or gradients of unknown origin are
                present. A closure's own exception passes through; parameters and state are then as before.
        """
        if closure is not None or (forget is None) != (retain is None):
            raise TypeError(
                "`step` must be given two closures, step(forget, retain), or none after the forget and retain phases, "
                "got one. BLUR needs the two gradients apart: split the closure in two."
            )
        if forget is None or retain is None:
            with self._abandoning_on_error():
                self._phases.check_step()
                self._check_is_update()
                self._warn_if_no_phase()
                self._base_step()
            return None
        self._drop_zeros()
        with self._abandoning_on_error():
            self._phases.check_closures(self._has_gradients())
            self._check_no_scaler()
        with self._forget_phase():
            forget_loss = self._evaluate(forget, "forget", self._has_gradients)
        with self._abandoning_on_error():
            self._phases.begin_retain(self._has_gradients())
            self._wrappers.begin(self._params())
            if self.stash == "recompute":
                retain_loss, gradients, projection = self._recompute(retain)
            else:
                retain_loss = self._evaluate(retain, "retain", self._has_gradients)
                self._end_retain()
                gradients, projection = self._project(None)
            self._update(gradients, projection)
            del gradients
        self._discard()
        return forget_loss, retain_loss

    @contextmanager
    def forget(self) -> Iterator[None]:
        """Open the forget phase: every backward pass of the forget loss belongs in this context.

        Raises:
            RuntimeError: another phase is open, a forget phase waits for its retain phase, ``p.grad`` still holds
                the last update, or ``stash="recompute"``, which needs closures.
        """
        if self.stash == "recompute":
            raise RuntimeError(
                "`stash` must not be 'recompute' with phases, which cannot be run a second time. Use "
                "opt.step(forget, retain), or stash='int8'."
            )
        with self._forget_phase():
            yield

    @contextmanager
    def _forget_phase(self) -> Iterator[None]:
        self._drop_zeros()
        with self._abandoning_on_error():
            self._phases.begin_forget(self._has_gradients())
            self._wrappers.begin(self._params())
            yield
            self._phases.end_forget()
            self._wrappers.end(self._params(), "forget")
            check_gradients(self.param_groups)
            self._stash.take(self._params())

    @contextmanager
    def retain(self, grad_scale: GradScaler | Tensor | float | None = None) -> Iterator[None]:
        """Open the retain phase: every backward pass of the retain loss belongs in this context.

        On exit ``p.grad`` holds the update; ``step()`` and ``zero_grad()`` follow.

        Args:
            grad_scale: under a loss scale, the GradScaler, or the factor that both losses were multiplied with. Needed
                where the update depends on the size of the gradients: for ``max_grad_norm``, ``normalize``, a rule of
                your own, and for ``statistics`` in true units. ``scaler.step(opt)`` then unscales the update.

        Raises:
            RuntimeError: no forget phase precedes, or gradients appeared since it ended.
        """
        with self._abandoning_on_error():
            self._phases.begin_retain(self._has_gradients())
            self._wrappers.begin(self._params())
            yield
            self._end_retain()
            with torch.no_grad():
                gradients, projection = self._project(grad_scale)
                blend_(gradients, projection.coefficients, self.backend)

    @property
    def statistics(self) -> StepStatistics | None:
        """What the last projection saw, as device tensors; None before the first. Reading them is what synchronises."""
        if self._last is None:
            return None
        p = self._last
        return StepStatistics(p.dots, p.a, p.b, p.update_norm, self._skipped, p.params, p.parameter_dots)

    # -- What an Optimizer owes to its surroundings ------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's param groups, with ``gamma`` and ``retain_weight`` in each."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The base optimizer's state; BLUR adds none."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults, with ``gamma`` and ``retain_weight``."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients. Outside a phase this also discards forget gradients that wait for their retain phase."""
        self.base.zero_grad(set_to_none)
        if not self._phases.is_open:
            drop_held_back(self._params())
            self._end_step()
            self._zeros = [(p.grad, p.grad._version) for p in self._params() if p.grad is not None]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the base optimizer; ``gamma`` and ``retain_weight`` default as for the others."""
        for name in self._own_defaults.keys() & param_group.keys():
            check_weight(name, param_group[name])
        self.base.add_param_group(param_group)
        self._install_defaults()

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict; the bare base optimizer can load it."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of BLUR or of its bare base; groups without ``gamma`` and ``retain_weight`` keep theirs."""
        present = [{name: group[name] for name in self._own_defaults} for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        for group, weights in zip(self.param_groups, present, strict=True):
            for name, value in weights.items():
                group.setdefault(name, value)

    def __getattr__(self, name: str) -> Any:
        # Hook registries, and whatever the base offers beyond Optimizer (train() and eval() of a schedule-free one).
        if name == "base":  # Not there yet while unpickling.
            raise AttributeError(name)
        return getattr(self.base, name)

    def __getstate__(self) -> dict[str, Any]:
        # A step that a learning-rate scheduler wrapped is a closure over this object; torch drops it too.
        per_step = (
            "_phases",
            "_ranks",
            "_wrappers",
            "_stash",
            "_found_inf",
            "_scale_needed",
            "_zeros",
            "_last",
            "_witness",
            "step",
        )
        return {name: value for name, value in self.__dict__.items() if name not in per_step}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __repr__(self) -> str:
        return f"BLUR (rule={self.rule!r}, normalize={self.normalize}, scope={self.scope!r}) over {self.base!r}"

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler.step asks every optimizer for this, and on one that does not unscale by itself it leaves no other
        # trace: the one chance to notice that u was made without knowing the loss scale that it depends on.
        if self._phases.current is Phase.PROJECTED and self._scale_needed:
            raise RuntimeError(
                "BLUR must know the loss scale for `max_grad_norm`, `normalize` and rules that depend on the size "
                "of the gradients. Pass the GradScaler to the retain phase: with opt.retain(grad_scale=scaler)."
            )
        return supports_amp_scaling(self.base)

    # -- Inside a step -----------------------------------------------------------------------------------------------

    def _evaluate(self, closure: Closure, name: str, has_gradients: Callable[[], bool]) -> Any:
        with torch.enable_grad():
            loss = closure()
            missing = loss is not None and not has_gradients() and not holds_back(self._params())
            if missing and isinstance(loss, Tensor) and loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
                missing = False
        if not missing:
            # Detached, so that the graph of the forget loss does not live through the retain phase.
            return loss.detach() if isinstance(loss, Tensor) else loss
        raise RuntimeError(
            f"`{name}` must call backward, or return a differentiable loss, got {loss!r} and no gradient. Return None "
            "where there is nothing to compute in this step."
        )

    def _project(self, grad_scale: GradScaler | Tensor | float | None) -> tuple[PairedGradients, Projection]:
        """Take the coefficients from the gradients of both phases; what is left is to apply them."""
        check_gradients(self.param_groups)
        self._ranks.update(self._params())
        # Every rank needs the same rows, also where a parameter has no gradient on this one.
        rows = Rows.of(
            self.param_groups,
            lambda p: self._ranks.are_many or p.grad is not None or self._stash.get(p) is not None,
            self.scope == "parameter",
        )
        gradients = pair_gradients(rows, self._stash, self._ranks)
        if isinstance(grad_scale, GradScaler):
            # The scale as a device tensor: get_scale() would read it on the host.
            grad_scale = grad_scale.scale(torch.ones((), device=gradients.device))
        projection = project(gradients, self._settings(), grad_scale)
        self._record(gradients, projection)
        depends_on_size = self.normalize or self.rule == "normalized" or callable(self.rule)
        self._scale_needed = grad_scale is None and (depends_on_size or self.max_grad_norm is not None)
        return gradients, projection

    def _recompute(self, retain: Closure) -> tuple[Any, PairedGradients, Projection]:
        self._ranks.update(self._params())
        loss, gradients, projection, applied = recompute(
            lambda has_gradients: self._evaluate(retain, "retain", has_gradients),
            self.param_groups,
            self._stash,
            self._settings(),
            not self.normalize and self.rule in RETAIN_NORM_FREE,
            self.scope == "parameter",
            self._ranks,
        )
        self._end_retain()
        self._record(gradients, projection)
        return loss, gradients, applied

    def _end_retain(self) -> None:
        self._phases.end_retain()
        self._wrappers.end(self._params(), "retain")

    def _settings(self) -> Projector:
        rule = _make_rule(self.rule, self.normalize)
        return Projector(self.backend, rule, self.scope == "global", self.max_grad_norm, self.record_alignment)

    def _record(self, gradients: PairedGradients, projection: Projection) -> None:
        self._last, self._found_inf = projection, projection.found_inf
        self._skipped = self._found_inf.long() + self._skipped.to(self._found_inf.device)
        # The smallest, for it is kept alive.
        smallest = min((pair.param for pair in gradients.pairs), key=lambda p: p.numel(), default=None)
        self._witness = None if smallest is None else (smallest, smallest.grad)

    def _update(self, gradients: PairedGradients, projection: Projection) -> None:
        if not why_not_fused(self.base, gradients, self.backend):
            fused_step(self.base, gradients, projection, self.backend)
            return
        blend_(gradients, projection.coefficients, self.backend)
        gradients.clear()  # The forget gradients: the base's step must not find them in memory.
        self._base_step()

    def _base_step(self) -> None:
        # GradScaler leaves these two on an optimizer that unscales by itself.
        amp: dict[str, Tensor | None] = {
            name: self.__dict__[name] for name in ("grad_scale", "found_inf") if name in self.__dict__
        }
        # What was found in the update holds for as long as p.grad is that update, so also for a second step on it.
        is_update = self._witness is not None and self._witness[0].grad is self._witness[1]
        step_base(self.base, self._found_inf if is_update else None, amp)

    # -- Bookkeeping -------------------------------------------------------------------------------------------------

    def _params(self) -> Iterator[Tensor]:
        # Read anew each time: accelerate replaces the lists in the groups.
        return (p for group in self.param_groups for p in group["params"])

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._params()) or holds_back(self._params())

    def _check_no_scaler(self) -> None:
        if "grad_scale" in self.__dict__:
            raise RuntimeError(
                "A GradScaler cannot step with closures: it looks for gradients before they run. Scale both losses in "
                "`with opt.forget()` and `with opt.retain(grad_scale=scaler)`, then call scaler.step(opt)."
            )

    def _check_is_update(self) -> None:
        # Without a gradient in either phase there is no update: what is in p.grad has come from somewhere else.
        if self._phases.current is Phase.PROJECTED and self._witness is None and self._has_gradients():
            raise RuntimeError(
                "opt.step() must find in p.grad what the phases left there, nothing, got gradients. An engine that "
                "collects gradients in buffers of its own, such as DeepSpeed, has put both phases into one."
            )

    def _warn_if_no_phase(self) -> None:
        # torch.distributed.checkpoint makes the state by such a step, with a rate of 0.
        if self._phases.current is not Phase.IDLE or self._warned or not self._has_gradients():
            return
        if any(group.get("lr", 1.0) != 0 for group in self.param_groups):
            self._warned = True
            warnings.warn(
                f"opt.step() had no phases before it: {type(self.base).__name__} stepped on what was in p.grad, not "
                "BLUR. Give it two closures, or compute the gradients in `with opt.forget()` and `with opt.retain()`.",
                stacklevel=4,
            )

    def _drop_zeros(self) -> None:
        """Drop what ``zero_grad(set_to_none=False)`` left, unless something has been added to it since."""
        zeros = {id(grad) for grad, version in self._zeros if grad._version == version}
        for p in self._params() if zeros else ():
            if id(p.grad) in zeros:
                p.grad = None
        self._zeros = []

    def _install_defaults(self) -> None:
        for name, value in self._own_defaults.items():
            self.base.defaults.setdefault(name, value)
            for group in self.param_groups:
                check_weight(name, group.setdefault(name, value))

    def _begin(self) -> None:
        self._phases = Phases()
        self._ranks, self._wrappers = Ranks(), Wrappers()
        self._stash = STASHES[self.stash]()
        self._last = None
        self._end_step()

    def _end_step(self) -> None:
        self._stash.clear()
        self._phases.current = Phase.IDLE
        self._found_inf = self._witness = None
        self._scale_needed = False
        self._zeros = []

    def _discard(self) -> None:
        """Drop every gradient, stashed or not, and with them the step."""
        for p in self._params():
            p.grad = None
        drop_held_back(self._params())
        self._end_step()

    @contextmanager
    def _abandoning_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._discard()
            raise


def _make_rule(rule: str | UserRule, normalize: bool) -> Rule:
    if callable(rule):
        made = per_row(rule)
    else:
        _check_choice("rule", rule, RULES)
        made = RULES[rule]
    return on_unit_gradients(made) if normalize else made


def _check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {sorted(choices)}, got {value!r}.")
