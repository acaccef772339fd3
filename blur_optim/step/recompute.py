"""``stash="recompute"``: one gradient set, and the retain closure evaluated twice.

The first evaluation only measures: each retain gradient is dotted with the waiting forget gradient as soon as backward
has accumulated it, and dropped. Then the forget gradients become ``p.grad``, scaled by a / b, and the second evaluation
accumulates the retain gradients onto them; b times the result is the update. The random state is replayed, so that
dropout drops the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._guards import active_fake_mode

from blur_optim.kernels import select_backend
from blur_optim.parallel.ranks import Ranks, settle_gradient, to_local
from blur_optim.step.gradients import check_dense, pair_gradients
from blur_optim.step.pairs import PairedGradients
from blur_optim.step.plan import Plan, Rows
from blur_optim.step.projection import Projection, blend_, clipped, solve, take_dots
from blur_optim.step.rules import Dots
from blur_optim.step.settings import Settings
from blur_optim.step.stash import Stash, real

#: Evaluates the retain closure; its argument says whether a backward has run since.
Evaluate = Callable[[Callable[[], bool]], Any]

# Below this share of |a| a zero b would not show in float32, and p.grad stays far from overflow.
_SMALLEST_SHARE = 2.0**-60


class Recomputed(NamedTuple):
    """What :func:`recompute` leaves: ``projection`` as it is, and ``applied`` to the retain side of ``gradients``."""

    loss: Any
    gradients: PairedGradients
    projection: Projection
    applied: Projection


def recompute(
    evaluate: Evaluate,
    plan: Plan,
    param_groups: Sequence[dict[str, Any]],
    stash: Stash,
    settings: Settings,
    ranks: Ranks,
) -> Recomputed:
    """Evaluate the retain closure twice, for the projection and for the update.

    Where several backward passes accumulate the retain gradient, its norm is not known before the second evaluation.

    Raises:
        TypeError: a gradient is float16, whose range a / b times it may leave.
        RuntimeError: the closure is not repeatable, or accumulates under a rule that needs the norm first; or a wrapper
            reduces gradients after backward has accumulated them.
    """
    params = plan.params
    if not ranks.see_the_same_gradients:
        raise RuntimeError(
            "`stash` must not be 'recompute' under FullyShardedDataParallel, whose parameters get their gradients "
            "after backward's hooks. Use fully_shard, or stash='int8'."
        )
    measured = _Measured(stash, settings.backend)
    before = _random_states(params)
    with _after_each_gradient(params, measured.take):
        loss = evaluate(lambda: bool(measured.dots))
    _check_final(params)
    with_retain = set(measured.dots)
    measured.take_forget_alone(params)
    after = _random_states(params)
    if measured.repeated and settings.needs_retain_norm:
        raise RuntimeError(
            "`stash` is 'recompute', the retain closure runs several backward passes, and this rule needs the norm of "
            "their sum, which is never in memory as a whole. Use stash='int8', or one backward pass."
        )

    takes_part = None if ranks.are_many else [p in measured.dots for p in params]
    rows = plan.rows(param_groups, takes_part, settings.row_per_parameter)
    has_retain = [p if p in with_retain else None for p in rows.params]
    facts = rows.facts(ranks, stash.has(rows.params), has_retain)
    table = ranks.sum_(measured.table(rows, ranks, settings.record_alignment), facts)
    # The norm of a sum is known after the second evaluation.
    projection = solve(table, rows, replace(settings, max_grad_norm=None) if measured.repeated else settings)
    b = _nonzero_b(projection)
    share = torch.where(b == 0, 0.0, projection.a / b)
    blend_(pair_gradients(rows, stash, ranks), torch.stack([share, share], dim=1), settings.backend)

    _set_random_states(params, before)
    backwards: list[Tensor] = []
    with _after_each_gradient(params, backwards.append):
        again = evaluate(lambda: bool(backwards))
    for p in params:
        settle_gradient(p, "a parameter")
    _check_repeated(loss, again, after, _random_states(params))
    gradients = pair_gradients(rows, stash, ranks)
    if measured.repeated:
        summed = ranks.sum_(take_dots(gradients, settings), facts)[:, 2]
        projection = clipped(_with_retain_norm(projection, rows, summed, share), settings.max_grad_norm)
    return Recomputed(loss, gradients, projection, replace(projection, b=_nonzero_b(projection)))


def refuse_phases(stash: str) -> None:
    """Refuse to open a phase.

    Raises:
        RuntimeError: ``stash`` is "recompute".
    """
    if stash == "recompute":
        raise RuntimeError(
            "`stash` must not be 'recompute' with phases, which cannot be run a second time. Use "
            "opt.step(forget, retain), or stash='int8'."
        )


class _Measured:
    """The dots of every parameter, taken while its retain gradient is there."""

    def __init__(self, stash: Stash, backend: str | None) -> None:
        self.stash, self.backend = stash, backend
        self.dots: dict[Tensor, Tensor] = {}
        #: Whether a parameter had several retain gradients, whose sum has a norm that their norms do not tell.
        self.repeated = False

    @torch.no_grad()
    def take(self, param: Tensor) -> None:
        """Dot ``param.grad`` with the forget gradient and drop it. Backward calls this."""
        assert param.grad is not None
        check_dense(param.grad, "a parameter")
        settle_gradient(param, "a parameter")
        retain = real(to_local(param.grad))
        param.grad = None
        dots = self._dots(self._forget(param, retain), retain)
        if param in self.dots:
            self.repeated = True
            dots[1] = 0.0
            dots += self.dots[param]
        self.dots[param] = dots

    def take_forget_alone(self, params: Iterable[Tensor]) -> None:
        for p in params:
            if p not in self.dots and self.stash.get(p) is not None:
                forget = self._forget(p, p)
                self.dots[p] = self._dots(forget, forget.new_empty(0))

    def table(self, rows: Rows, ranks: Ranks, by_parameter: bool) -> Tensor:
        """``[rows, 3]``, or ``[members, 3]``: this rank's part."""
        found: list[list[Tensor]] = [[] for _ in (rows.params if by_parameter else rows.gammas)]
        device = next(iter(self.dots.values())).device if self.dots else rows.device
        for member, (p, row) in enumerate(zip(rows.params, rows.rows, strict=True)):
            if p in self.dots:
                found[member if by_parameter else row].append(
                    self.dots[p].to(device, non_blocking=True) * ranks.weight(p)
                )
        zero = torch.zeros(3, dtype=torch.float64, device=device)
        return torch.stack([torch.stack([zero, *dots]).sum(0) for dots in found]) if found else zero[None][:0]

    def _forget(self, param: Tensor, like: Tensor) -> Tensor:
        stashed = self.stash.get(param)
        if stashed is None:
            return like.new_empty(0)
        if stashed.dtype == torch.float16:
            raise TypeError(
                "`stash='recompute'` must have float32 or bfloat16 gradients, got float16, in which the scaled forget "
                "gradient may overflow. Use stash='int8'."
            )
        return real(to_local(stashed.values))

    def _dots(self, forget: Tensor, retain: Tensor) -> Tensor:
        return select_backend(self.backend, forget.device).multi_tensor_dots([forget], [retain], [0], 1)[0]


def _nonzero_b(projection: Projection) -> Tensor:
    """b, or where it is 0 what stands for it: the forget gradient has to be divided by it. 0 where a is 0 too."""
    return torch.where(projection.b == 0, projection.a.abs() * _SMALLEST_SHARE, projection.b)


def _with_retain_norm(projection: Projection, rows: Rows, summed: Tensor, share: Tensor) -> Projection:
    r"""Fill in :math:`\|g_r\|^2` of each row, from :math:`\|s g_f + g_r\|^2` and what was known before."""
    if projection.parameter_dots is None:
        return replace(projection, dots=_filled_in(projection.dots, summed, share))
    shares = torch.cat([share[row : row + 1] for row in rows.rows])
    by_parameter = _filled_in(projection.parameter_dots, summed, shares)
    dots = Dots(*rows.sums(torch.stack(by_parameter, dim=1)).unbind(1))
    return replace(projection, dots=dots, parameter_dots=by_parameter)


def _filled_in(dots: Dots, summed: Tensor, share: Tensor) -> Dots:
    known = share.square() * dots.forget_norm_sq + 2 * share * dots.retain_forget
    return dots._replace(retain_norm_sq=(summed - known).clamp(min=0))


def _check_final(params: Iterable[Tensor]) -> None:
    """Notice a wrapper that writes gradients after the hooks have measured and dropped what was there."""
    if any(p.grad is not None for p in params):
        raise RuntimeError(
            "The retain gradients must be final when backward accumulates them with stash='recompute', got some that "
            "were written afterwards, as DistributedDataParallel averages them. Use stash='int8', or fully_shard."
        )


@contextmanager
def _after_each_gradient(params: Iterable[Tensor], hook: Callable[[Tensor], None]) -> Iterator[None]:
    handles = [cast(Any, p).register_post_accumulate_grad_hook(hook) for p in params if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _random_states(params: Iterable[Tensor]) -> dict[torch.device, Tensor]:
    """The states of the generators that a closure may draw from: the CPU's and those of the parameters' devices."""
    devices = sorted({to_local(p).device for p in params if p.device.type not in ("cpu", "meta")}, key=str)
    states = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}
    return {torch.device("cpu"): torch.get_rng_state(), **states}


def _set_random_states(params: Iterable[Tensor], states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


def _check_repeated(
    loss: Any, again: Any, after: dict[torch.device, Tensor], after_again: dict[torch.device, Tensor]
) -> None:
    """Notice a closure that computes something else the second time, such as the loss of the next batch."""
    if active_fake_mode() is not None:
        return  # Fake tensors have no values to compare.
    if not all(torch.equal(after[device], after_again[device]) for device in after):
        found = "it drew other random numbers"
    elif _differ(loss, again):
        found = f"the loss was {loss!r}, then {again!r}"
    else:
        return
    raise RuntimeError(
        f"The retain closure must be repeatable with stash='recompute', which evaluates it twice, but {found}. Fetch "
        "the batch outside the closure, or use another stash."
    )


def _differ(loss: Any, again: Any) -> bool:
    if not all(isinstance(value, Tensor | float) for value in (loss, again)):
        return False
    first, second = (torch.as_tensor(value).detach() for value in (loss, again))
    dtype = first.dtype
    # Atomics on a GPU add up in another order each time; another batch is much further off.
    rtol = max(1e-4, 4 * torch.finfo(dtype).eps) if dtype.is_floating_point else 0.0
    return not torch.allclose(second.double(), first.double(), rtol=rtol, atol=0.0, equal_nan=True)
