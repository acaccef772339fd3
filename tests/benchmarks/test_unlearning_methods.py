"""What is compared: ids, and the update that each way of combining two gradients makes."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import unlearning  # noqa: F401  (puts shared_lib on the path)
from shared_lib.errors import InputError
from torch import Tensor, nn
from unlearning import methods
from unlearning.methods import COMBINATIONS, Method, make_optimizer, parse_method, weight_scale
from unlearning.presets import PRESETS, preset
from unlearning.robust import AveragedCosine, AveragedDots
from unlearning.torchjd_rules import pcgrad, upgrad

from blur_optim.step.rules import Dots

IDS = sorted({method for settings in PRESETS.values() for method in settings.methods})
MISSING = [name for name in ("torchjd", "quadprog", "qpsolvers") if importlib.util.find_spec(name) is None]
needs_torchjd = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
FORGET, RETAIN = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([[-2.0, 0.5], [1.0, -0.25]])
WEIGHT, LR, STEPS = 0.2, 0.5, 4
REGULARIZED = {"upgrad": 5e-3}  # relative; TorchJD adds 1e-4 to the diagonal of the Gramian


class Quadratic:
    """Two parameters at the origin, where the losses |p + g|²/2 have the gradients g."""

    def __init__(self, forget: Tensor = FORGET, retain: Tensor = RETAIN) -> None:
        self.gradients = forget.double(), retain.double()
        self.params = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)]

    def closure(self, kind: int) -> Tensor:
        pairs = zip(self.params, self.gradients[kind], strict=True)
        loss = torch.stack([(p + g).square().sum() / 2 for p, g in pairs]).sum()
        loss.backward()
        return loss

    def step(self, optimizer: Any) -> Tensor:
        """Take a step from where the parameters are, and return by how much they moved, ``[2, 2]``."""
        before = torch.stack(list(self.params)).detach().clone()
        optimizer.step(partial(self.closure, 0), partial(self.closure, 1))
        return torch.stack(list(self.params)).detach() - before


@pytest.fixture
def plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the optimizers step by -lr times the update, from which the update can be read."""

    def sgd(params: Any, lr: float, weight_decay: float) -> torch.optim.SGD:
        return torch.optim.SGD(params, lr=lr)

    monkeypatch.setattr(methods.torch.optim, "AdamW", sgd)


def by_equation(combine: str, f: Tensor, r: Tensor, w: float) -> Tensor:
    """The update by its equation, over all parameters or, for one combination, each parameter by itself."""
    dot, f_sq, r_sq = (r * f).sum(), f.square().sum(), r.square().sum()
    unit_f, unit_r = f / f_sq.sqrt(), r / r_sq.sqrt()
    cosine = (unit_f * unit_r).sum()
    forget_first = w - dot / f_sq
    each = partial(torch.sum, dim=-1, keepdim=True)
    equations: dict[str, Callable[[], Tensor]] = {
        "weighted_sum": lambda: w * f + r,
        "forget-only": lambda: f,
        "blur": lambda: forget_first * f + r,
        "normalized": lambda: w * unit_f + unit_r,
        "blur-normalized": lambda: (w - cosine) * unit_f + unit_r,
        "blur-per-parameter": lambda: (w - each(r * f) / each(f.square())) * f + r,
        "conflict": lambda: (forget_first if dot < 0 else w) * f + r,
        "conflict-normalized": lambda: (w - cosine if dot < 0 else w) * unit_f + unit_r,
        "barrier": lambda: max(float(forget_first), 0.0) * f + r,
        "retain_first": lambda: w * f + (1 - w * dot / r_sq) * r,
        "forget-gain": lambda: _gaining(f, r, w * f_sq),
        # In its first step an average is that step's value.
        "averaged-dots": lambda: forget_first * f + r,
        "averaged-cosine": lambda: forget_first * f + r,
        "bloop": lambda: forget_first * f + r,
        # Each gradient of a pair in conflict is replaced by its part orthogonal to the other, and these are added.
        "upgrad": lambda: _orthogonal_parts(w * f, r) if dot < 0 else w * f + r,
        "pcgrad": lambda: _orthogonal_parts(w * f, r) if dot < 0 else w * f + r,
    }
    return equations[combine]()


def _orthogonal_parts(f: Tensor, r: Tensor) -> Tensor:
    dot = (f * r).sum()
    return f - dot / r.square().sum() * r + r - dot / f.square().sum() * f


def _gaining(f: Tensor, r: Tensor, gain: Tensor) -> Tensor:
    """What lowers r most within the radius ‖r‖ of all that gains so much."""
    if (f * r).sum() >= gain:
        return r
    orthogonal = r - (f * r).sum() / f.square().sum() * f
    room = (r.square().sum() - gain**2 / f.square().sum()).clamp(min=0).sqrt()
    return gain / f.square().sum() * f + room * orthogonal / orthogonal.norm()


CASES = [
    pytest.param(combine, marks=needs_torchjd) if combine in ("upgrad", "pcgrad") else combine
    for combine in (*COMBINATIONS, "bloop", "forget-only")
    if "metric" not in combine  # Those are compared with their equation in test_unlearning_baselines.
]


# -- Ids -------------------------------------------------------------------------------------------------------------


def test_presets_name_their_methods() -> None:
    assert len(IDS) >= 20
    assert set(preset("tofu", "short").methods) <= set(IDS)


@pytest.mark.parametrize("text", [*IDS, "rmu/forget-only", "npo/forget-only"])
def test_an_id_round_trips(text: str) -> None:
    assert parse_method(text).id == text


@pytest.mark.parametrize("text", IDS)
def test_an_id_is_read_into_its_parts(text: str) -> None:
    method = parse_method(text)
    losses, combine = text.split("/")
    assert method.combine == combine
    assert losses in (f"{method.forget_loss}+{method.retain_loss}", method.forget_loss)


WRONG = {
    "nothing": ("", "FORGET is one of ga, npo"),
    "a word": ("foo", "FORGET is one of ga, npo, simnpo, dpo, rmu, hinge"),
    "unknown forget loss": ("npa+nll/blur", "RETAIN of nll, kl, rmu"),
    "unknown retain loss": ("npo+nlll/blur", "RETAIN of nll, kl, rmu"),
    "unknown combination": ("npo+nll/blurr", "COMBINATION of weighted_sum, blur, .*bloop, .*forget-only"),
    "no combination": ("npo+nll", "got 'npo\\+nll'"),
    "capitals": ("NPO+NLL/blur", "got 'NPO\\+NLL/blur'"),
    "rmu without rmu": ("rmu+nll/blur", "rmu goes with rmu, got 'rmu\\+nll/blur'"),
    "another with rmu": ("npo+rmu/blur", "rmu goes with rmu, got 'npo\\+rmu/blur'"),
    "a retain loss left out": ("npo/blur", "write 'npo\\+nll/blur' for 'npo/blur'"),
    "a retain loss unused": ("ga+nll/forget-only", "write 'ga/forget-only' for 'ga\\+nll/forget-only'"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_id_is_refused_with_what_there_is(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        parse_method(text)
    assert "\n" not in str(error.value)


def test_the_baseline_has_the_same_losses() -> None:
    assert parse_method("npo+kl/averaged-dots").baseline.id == "npo+kl/weighted_sum"


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"must be one of tofu/short, .*, got tofu/never"):
        preset("tofu", "never")


# -- Updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("plain_steps")
@pytest.mark.parametrize("retain", [RETAIN, -RETAIN], ids=["in conflict", "in harmony"])
@pytest.mark.parametrize("combine", CASES)
def test_the_first_update_is_that_of_the_equation(combine: str, retain: Tensor) -> None:
    problem = Quadratic(retain=retain)
    optimizer = make_optimizer(Method("npo", "nll", combine), problem.params, WEIGHT, LR, STEPS)
    moved = problem.step(optimizer)
    expected = -LR * by_equation(combine, *problem.gradients, WEIGHT)
    torch.testing.assert_close(moved, expected, rtol=REGULARIZED.get(combine, 1e-9), atol=0.0)


def test_the_two_cases_tell_the_rules_apart() -> None:
    # Otherwise the test above could not see one rule stand for another.
    f, r = Quadratic().gradients
    same = {"weighted_sum", "blur", "normalized", "blur-normalized", "blur-per-parameter", "conflict", "barrier"}
    names = [*sorted(same), "retain_first", "conflict-normalized", "pcgrad", "forget-only"]
    both = torch.stack([torch.cat([by_equation(n, f, s * r, WEIGHT).flatten() for s in (1, -1)]) for n in names])
    distances = torch.cdist(both, both) + torch.eye(len(names))
    assert distances.min() > 0.01


@pytest.mark.usefixtures("plain_steps")
def test_forget_only_ignores_the_retain_gradient_and_the_weight() -> None:
    moved = []
    for retain, weight in ((RETAIN, 1.0), (100 * RETAIN, 0.1)):
        problem = Quadratic(retain=retain)
        moved.append(
            problem.step(make_optimizer(Method("ga", "nll", "forget-only"), problem.params, weight, LR, STEPS))
        )
    assert torch.equal(moved[0], moved[1])
    torch.testing.assert_close(moved[0], -LR * FORGET.double())


@pytest.mark.parametrize("combine", CASES)
def test_the_coefficients_on_record_make_the_update(combine: str) -> None:
    problem = Quadratic()
    optimizer = make_optimizer(Method("npo", "nll", combine), problem.params, WEIGHT, LR, STEPS)
    problem.step(optimizer)
    seen = optimizer.statistics.to_dict()
    f, r = problem.gradients
    assert seen["forget_norm"] == pytest.approx(f.norm().item())
    assert seen["retain_norm"] == pytest.approx(r.norm().item())
    assert seen["cosine"] == pytest.approx(((f * r).sum() / f.norm() / r.norm()).item())
    assert seen["update_norm"] == pytest.approx(
        by_equation(combine, f, r, WEIGHT).norm().item(), rel=REGULARIZED.get(combine, 1e-9)
    )


@pytest.mark.parametrize("combine", CASES)
def test_the_base_is_adamw_of_this_learning_rate(combine: str) -> None:
    optimizer = make_optimizer(Method("npo", "nll", combine), Quadratic().params, WEIGHT, LR, STEPS)
    assert isinstance(optimizer.base, torch.optim.AdamW)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.base.param_groups] == [(LR, 0.01)]


@pytest.mark.parametrize(("combine", "rule"), [("averaged-dots", AveragedDots), ("averaged-cosine", AveragedCosine)])
def test_a_rule_with_memory_is_made_anew_for_each_run(combine: str, rule: type) -> None:
    method = Method("npo", "nll", combine)
    first, second = (make_optimizer(method, Quadratic().params, WEIGHT, LR, STEPS) for _ in range(2))
    assert isinstance(first.rule, rule)
    assert isinstance(second.rule, rule)
    assert first.rule is not second.rule
    assert COMBINATIONS[combine]["rule"] is rule


@pytest.mark.usefixtures("plain_steps")
@pytest.mark.parametrize("combine", ["averaged-dots", "averaged-cosine", "bloop"])
def test_a_run_does_not_depend_on_the_one_before_it(combine: str) -> None:
    def run() -> Tensor:
        problem = Quadratic()
        optimizer = make_optimizer(Method("npo", "nll", combine), problem.params, WEIGHT, 0.01, STEPS)
        return torch.stack([problem.step(optimizer) for _ in range(3)])

    first, second = run(), run()
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[2])


# -- TorchJD ---------------------------------------------------------------------------------------------------------


@needs_torchjd
@pytest.mark.parametrize(("gamma", "alpha"), [(1.0, 1.0), (0.03, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize("name", ["upgrad", "pcgrad"])
def test_rules_of_torchjd_are_its_aggregators_on_the_jacobian(name: str, gamma: float, alpha: float) -> None:
    from torchjd.aggregation import PCGrad, UPGrad

    rule, aggregator = {
        "upgrad": (upgrad, UPGrad(pref_vector=torch.ones(2, dtype=torch.float64))),
        "pcgrad": (pcgrad, PCGrad()),
    }[name]
    conflicts = 0
    for f, r in torch.randn(10, 2, 5, dtype=torch.float64):
        dots = Dots(r @ f, f @ f, r @ r)
        a, b = rule(dots, torch.tensor(gamma).double(), torch.tensor(alpha).double())
        torch.testing.assert_close(a * f + b * r, aggregator(torch.stack([gamma * f, alpha * r])))
        conflicts += int(dots.retain_forget < 0)
    assert 0 < conflicts < 10


@needs_torchjd
@pytest.mark.parametrize("rule", [upgrad, pcgrad])
def test_rules_of_torchjd_leave_what_is_not_finite_to_the_optimizer(rule: Callable[..., Any]) -> None:
    one, nan = torch.ones((), dtype=torch.float64), torch.tensor(float("nan"), dtype=torch.float64)
    assert rule(Dots(nan, one, one), one, 2 * one) == (one, 2 * one)


# -- Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forget_loss", "scale"), [("ga", 1.0), ("simnpo", 1.0), ("hinge", 1.0), ("npo", 0.1), ("dpo", 0.1)]
)
def test_losses_that_are_sums_over_tokens_get_smaller_weights(forget_loss: str, scale: float) -> None:
    assert {weight_scale(Method(forget_loss, "nll", combine), 3.0) for combine in ("blur", "weighted_sum")} == {scale}


@pytest.mark.parametrize("combine", ["normalized", "blur-normalized", "conflict-normalized"])
def test_what_sees_unit_gradients_has_one_scale_for_all_losses(combine: str) -> None:
    assert (
        len({weight_scale(Method(name, "nll", combine), 3.0) for name in ("ga", "npo", "simnpo", "dpo", "hinge")}) == 1
    )
