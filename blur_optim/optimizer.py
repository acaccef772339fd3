"""BLUR: the torch.optim-style wrapper. What happens inside a step is the matter of :mod:`blur_optim.step`."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import AdamW, Optimizer

from blur_optim.kernels import select_backend
from blur_optim.optimizer_wrapper import OptimizerWrapper
from blur_optim.parallel.fsdp2 import refuse_gathered
from blur_optim.step.base import check_base, make_base, named_apart
from blur_optim.step.base_state import apart
from blur_optim.step.dynamo import OutsideGraphs, outside
from blur_optim.step.metric import (
    BETA,
    MEAN,
    check_beta,
    check_metric_base,
    check_metric_stash,
    metric_defaults,
    warn_of_weights,
)
from blur_optim.step.metric_step import MetricStep
from blur_optim.step.phases import Phase
from blur_optim.step.plan import check_weight
from blur_optim.step.recompute import refuse_phases
from blur_optim.step.rules import UserRule
from blur_optim.step.settings import Settings, check_choice
from blur_optim.step.stash import STASHES
from blur_optim.step.statistics import StepStatistics
from blur_optim.step.two_phase import Closure, TwoPhaseStep


class BLUR(OptimizerWrapper):
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
        metric: ``"euclidean"``, the paper, or ``"retain"``: gradients are compared, and the step is taken, in the
            metric of the retain loss; see below.
        damping: :math:`\delta` of the retain metric; >= 0.
        **base_kwargs: go to ``base``: ``lr``, ``weight_decay``, ``fused``, ... Where ``base`` has an argument of a name
            above (``max_grad_norm``, ``normalize``), bind it: ``base=functools.partial(Base, max_grad_norm=1.0)``.
            Where it has a hyperparameter ``gamma`` or ``retain_weight``, as MARS, the param groups hold the base's
            under that name, and BLUR's as ``blur_gamma`` or ``blur_retain_weight``. Several optimizers over parts of
            one model are a base as :class:`blur_optim.ChainedOptimizer`.

    With ``metric="retain"`` the base is AdamW, Adam or SGD, and its second moments are those of :math:`g_r` alone:

    .. math::
        v \leftarrow \beta_2 v + (1-\beta_2)\,g_r^2, \qquad P = 1/(\sqrt{\hat v + \delta\bar v} + \epsilon), \qquad
        \theta \leftarrow \theta - \mathrm{lr}\,P\,\hat m,

    where m averages u as before, :math:`\hat v` is v with its bias corrected, :math:`\bar v` its mean over all
    coordinates as the step before left it. The rule sees the dots in the metric, :math:`\langle x, P y\rangle`, of
    :math:`s\,g_f` and :math:`g_r`, and its a is multiplied with :math:`s = 1/\max(\mathrm{rms}(P g_f), 10^{-8})`, over
    the coordinates of the scope. So :math:`\gamma` means the same for every loss and model: the root mean square of the
    forget term's step, in units of lr. With the rule ``"blur"``, whatever :math:`g_r` is,
    :math:`\langle g_f, P u\rangle = \gamma s \langle g_f, P g_f\rangle`: to first order, that times lr is what the
    forget loss falls by in the step that is taken, momentum aside. ``normalize``, as the rule ``"normalized"``, divides
    by the norms in the metric, :math:`\sqrt{\langle g, P g\rangle}` over the scope: s drops out, its floor too, and
    :math:`\gamma` is the length in the metric of the whole forget term's step, in units of lr.

    ``max_grad_norm`` clips :math:`\|u\|` there too, as ``clip_grad_norm_`` would after the phases; v sees :math:`g_r`
    unclipped, so a limit that is always exceeded acts as a smaller lr. Weight decay is the base's: AdamW's shrinks the
    parameters, the others' joins u, not v. :math:`\beta_2` is the base's; for SGD ``metric_beta`` in the param groups,
    0.99. :math:`\bar v` is in the param groups (``retain_mean_sq``), so that a resumed run has the same bits.

    Warns:
        UserWarning: with ``metric="retain"``, a weight of a size that speaks of having been tuned without it.

    Raises:
        TypeError: ``base`` is not an optimizer, needs a closure of its own, or takes gradients in hooks in backward.
        ValueError: a value is out of range, or ``params`` are copies that FSDP2 has gathered for a forward pass.
    """

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
        metric: str = "euclidean",
        damping: float = 0.01,
        **base_kwargs: Any,
    ) -> None:
        check_weight("gamma", gamma)
        check_weight("retain_weight", retain_weight)
        self.rule, self.normalize, self.scope = rule, normalize, scope
        self.max_grad_norm, self.backend = max_grad_norm, backend
        self.metric, self.damping = metric, damping
        self._settings()  # For its checks.
        check_choice("stash", stash, STASHES)
        self._stash = stash
        made = make_base(params, base, base_kwargs)
        check_base(made)
        if metric == "retain":  # Before anything is written into a base that somebody else made.
            check_metric_stash(stash)
            check_metric_base(made)
        own = named_apart(made, {"gamma": gamma, "retain_weight": retain_weight})
        super().__init__(made, {**own, **(metric_defaults(made) if metric == "retain" else {})})
        self._two_phase = self._make_two_phase()
        if metric == "retain":
            warn_of_weights(made)
        params = self._two_phase.plan.params
        refuse_gathered(params)
        for device in {p.device for p in params}:
            select_backend(backend, device)

    @outside
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
            self._two_phase.step_on_update(self.amp_attributes())
            return None
        return self._two_phase.step(forget, retain, self._settings(), self.amp_attributes())

    @outside
    def forget(self) -> AbstractContextManager[None]:
        """Open the forget phase: every backward pass of the forget loss belongs in this context.

        Raises:
            RuntimeError: another phase is open, a forget phase waits for its retain phase, ``p.grad`` still holds
                the last update, or ``stash="recompute"``, which needs closures.
        """
        refuse_phases(self.stash)
        return OutsideGraphs(self._two_phase.forget_phase(self._settings()))

    @outside
    def retain(self, grad_scale: GradScaler | Tensor | float | None = None) -> AbstractContextManager[None]:
        """Open the retain phase: every backward pass of the retain loss belongs in this context.

        On exit ``p.grad`` holds the update; ``step()`` and ``zero_grad()`` follow.

        Args:
            grad_scale: under a loss scale, the GradScaler, or the factor that both losses were multiplied with. Needed
                where the update depends on the size of the gradients: for ``max_grad_norm``, ``normalize``, a rule of
                your own, and for ``statistics`` in true units. ``scaler.step(opt)`` then unscales the update.

        Raises:
            RuntimeError: no forget phase precedes, or gradients appeared since it ended.
        """
        return OutsideGraphs(self._two_phase.retain_phase(self._settings, grad_scale))

    @property
    def stash(self) -> str:
        """Where the forget gradients wait; may be set between two steps."""
        return self._stash

    @stash.setter
    def stash(self, value: str) -> None:
        self.configure(stash=value)

    @property
    def statistics(self) -> StepStatistics | None:
        """What the last projection saw, as device tensors; None before the first. Reading them is what synchronises."""
        last = self._two_phase.last
        return None if last is None else StepStatistics.of(last, self._two_phase.skipped)

    def configure(self, **options: Any) -> None:
        """Change arguments of the constructor between two steps, all or none. An update not stepped on is dropped.

        Args:
            **options: ``rule``, ``normalize``, ``scope``, ``max_grad_norm``, ``stash``, ``backend``, ``damping``.
                ``gamma`` and ``retain_weight`` are changed in the param groups; ``metric`` stays, for the state is made
                for it.

        Raises:
            TypeError: there is no such argument.
            ValueError: a value is out of range.
            RuntimeError: a step is under way.
        """
        names = ("rule", "normalize", "scope", "max_grad_norm", "stash", "backend", "damping")
        if unknown := sorted(options.keys() - set(names)):
            raise TypeError(f"`configure` takes {', '.join(names)}, got {unknown}.")
        inside = self._two_phase
        if inside.phases.current not in (Phase.IDLE, Phase.PROJECTED):
            raise RuntimeError(f"{sorted(options)} must be set between two steps, now {inside.phases.current.value}.")
        attributes = {"_stash" if name == "stash" else name: value for name, value in options.items()}
        before = {name: getattr(self, name) for name in attributes}
        self.__dict__.update(attributes)
        try:
            self._settings()
            check_choice("stash", self._stash, STASHES)
            if self.metric == "retain":
                check_metric_stash(self._stash)
            for device in {p.device for p in inside.params()}:
                select_backend(self.backend, device)
        except Exception:
            self.__dict__.update(before)
            raise
        self._renew(inside.skipped)

    def params_by_group(self) -> list[list[Tensor]]:
        """The parameters whose gradients are combined, by param group; the same that ``statistics.params`` are of."""
        return [list(group["params"]) for group in self.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients. Outside a phase this also discards forget gradients that wait for their retain phase."""
        super().zero_grad(set_to_none)
        self._two_phase.reset()

    def check_own(self, name: str, value: Any) -> None:
        """Refuse a ``gamma`` or ``retain_weight`` that is no finite number >= 0."""
        if name == BETA:
            check_beta(value)
        elif name != MEAN:
            check_weight(name, value)

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict; the bare base optimizer can load it."""
        found = super().state_dict()
        return {**found, "state": apart(found["state"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of BLUR or of the bare base, which leaves ``gamma`` and ``retain_weight`` as they are here.

        Warns:
            UserWarning: it comes from a run with the other metric, where ``exp_avg_sq`` meant something else. With
                ``metric="retain"`` the first step says so. Or there is an update in ``p.grad`` that was not stepped on,
                made in the metric of the state before: it is dropped.
        """
        super().load_state_dict(state_dict)
        self._two_phase.loaded(state_dict["param_groups"])

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        # Gradients under way stay here, and what is known of ranks and wrappers.
        return {**state, "_two_phase": None, "_skipped": state["_two_phase"].skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        skipped = state.pop("_skipped")
        super().__setstate__(state)
        self._renew(skipped)

    def _renew(self, skipped: Tensor) -> None:
        self._two_phase = self._make_two_phase()
        self._two_phase.skipped = skipped

    def __repr__(self) -> str:
        metric = "" if self.metric == "euclidean" else f", metric={self.metric!r}"
        return f"BLUR (rule={self.rule!r}, normalize={self.normalize}, scope={self.scope!r}{metric}) over {self.base!r}"

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler.step asks every optimizer for this, and on one that does not unscale by itself it leaves no other
        # trace: the one chance to notice that u was made without knowing the loss scale that it depends on.
        self._two_phase.check_scale_is_known()
        return super()._step_supports_amp_scaling

    def _make_two_phase(self) -> TwoPhaseStep:
        return (MetricStep if self.metric == "retain" else TwoPhaseStep)(self.base, self.stash, self.backend)

    def _settings(self) -> Settings:
        # Made anew for each step: the attributes are the user's to change between two.
        own = self.rule, self.normalize, self.scope, self.max_grad_norm, self.backend, self.record_alignment
        return Settings(*own, self.metric, self.damping)
