"""Rules and an optimizer that remember: what they average, and what that is good for."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unlearning.robust import AveragedCosine, AveragedDots, Bloop

from blur_optim import BLUR
from blur_optim.step.rules import Dots, blur

GAMMA, ALPHA = torch.tensor(0.5, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
RULES = [AveragedDots, AveragedCosine]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def make_dots(forget: Tensor, retain: Tensor) -> Dots:
    return Dots(retain @ forget, forget @ forget, retain @ retain)


def random_dots(steps: int) -> list[Dots]:
    return [make_dots(f, r) for f, r in torch.randn(steps, 2, 6, dtype=torch.float64)]


class Noisy:
    """Closures whose gradients at each step are the next pair of a list, wherever the parameters are."""

    def __init__(self, pairs: Tensor) -> None:
        self.pairs = iter(pairs)
        self.params = [nn.Parameter(torch.zeros(n, dtype=pairs.dtype)) for n in (2, pairs.shape[-1] - 2)]

    def step(self, optimizer: Any) -> Tensor:
        """Take a step, and return how far the parameters went, ``[n]``."""
        before = torch.cat(list(self.params)).detach().clone()
        forget, retain = next(self.pairs)
        optimizer.step(partial(self._closure, forget), partial(self._closure, retain))
        return torch.cat(list(self.params)).detach() - before

    def _closure(self, gradient: Tensor) -> Tensor:
        loss = torch.cat(list(self.params)) @ gradient
        loss.backward()
        return loss


# -- Averages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_without_memory_they_are_the_rule_of_the_paper(rule: type) -> None:
    forgetful = rule(decay=0.0)
    for dots in random_dots(5):
        torch.testing.assert_close(forgetful(dots, GAMMA, ALPHA), blur(dots, GAMMA, ALPHA))


@pytest.mark.parametrize("rule", RULES)
def test_the_first_step_is_the_paper_s_so_the_start_at_zero_leaves_no_bias(rule: type) -> None:
    (dots,) = random_dots(1)
    torch.testing.assert_close(rule(decay=0.99)(dots, GAMMA, ALPHA), blur(dots, GAMMA, ALPHA))


@pytest.mark.parametrize("rule", RULES)
def test_with_the_same_dots_at_every_step_they_are_the_rule_of_the_paper(rule: type) -> None:
    (dots,) = random_dots(1)
    averaged = rule(decay=0.9)
    for _ in range(5):
        torch.testing.assert_close(averaged(dots, GAMMA, ALPHA), blur(dots, GAMMA, ALPHA))


def test_the_average_of_three_steps_by_hand() -> None:
    # Weights 1/4, 1/2, 1 from old to new, of 7/4: dots (-1 + 4 + 12)/7, norms (1 + 8 + 12)/7.
    rule = AveragedDots(decay=0.5)
    for dot, norm in ((-1.0, 1.0), (2.0, 4.0), (3.0, 3.0)):
        a, b = rule(Dots(scalar(dot), scalar(norm), scalar(9.0)), GAMMA, ALPHA)
    assert a.item() == pytest.approx(0.5 - 2.0 * (15 / 7) / (21 / 7))
    assert b.item() == 2.0


def test_the_average_cosine_of_three_steps_by_hand() -> None:
    # Cosines -1/2, 1/4, 1/3 with weights 1, 2, 4 of 7; the norms are those of the last step.
    rule = AveragedCosine(decay=0.5)
    for dot, forget, retain in ((-1.0, 1.0, 4.0), (1.0, 4.0, 4.0), (2.0, 4.0, 9.0)):
        a, b = rule(Dots(scalar(dot), scalar(forget), scalar(retain)), GAMMA, ALPHA)
    cosine = (-1 / 2 + 2 * 1 / 4 + 4 * 1 / 3) / 7
    assert a.item() == pytest.approx(0.5 - 2.0 * cosine * 3 / 2)
    assert b.item() == 2.0


def test_a_gradient_of_zero_has_no_cosine_and_breaks_no_average() -> None:
    rule, (dots,) = AveragedCosine(decay=0.5), random_dots(1)
    zero = Dots(scalar(0.0), scalar(0.0), scalar(1.0))
    assert all(value.isfinite() for value in (*rule(zero, GAMMA, ALPHA), *rule(dots, GAMMA, ALPHA)))


@pytest.mark.parametrize("rule", RULES)
def test_an_optimizer_asks_the_rule_once_a_step(rule: type) -> None:
    # Asked twice, the average would move twice.
    problem, alone = Noisy(torch.randn(3, 2, 6, dtype=torch.float64)), rule(decay=0.5)
    optimizer = BLUR(problem.params, torch.optim.SGD, rule=rule(decay=0.5), gamma=0.5, retain_weight=2.0, lr=1.0)
    for forget, retain in [(f.clone(), r.clone()) for f, r in _copy_of(problem)]:
        moved = problem.step(optimizer)
        a, b = alone(make_dots(forget, retain), GAMMA, ALPHA)
        torch.testing.assert_close(moved, -(a * forget + b * retain))


def _copy_of(problem: Noisy) -> list[Tensor]:
    pairs = list(problem.pairs)
    problem.pairs = iter(pairs)
    return pairs


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_noise_of_small_batches_moves_the_average_less(rule: type, seed: int) -> None:
    # Two quadratics |p - t|²/2 seen through noise as large as the gradients: c = <g_r, g_f>/|g_f|² of each step.
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    one, zero = scalar(1.0), scalar(0.0)
    averaged, noisy, calm = rule(), [], []
    for _ in range(300):
        forget, retain = signal + torch.randn(2, 8, generator=generator, dtype=torch.float64)
        dots = make_dots(forget, retain)
        noisy.append(-blur(dots, zero, one)[0])
        calm.append(-averaged(dots, zero, one)[0])
    variances = [torch.stack(values[50:]).var().item() for values in (noisy, calm)]
    assert variances[1] < 0.5 * variances[0]


# -- Bloop -----------------------------------------------------------------------------------------------------------


def make_bloop(params: list[nn.Parameter], **options: Any) -> Bloop:
    return Bloop(params, base=torch.optim.SGD, lr=1.0, **options)


def test_bloop_without_memory_makes_the_paper_s_update() -> None:
    pairs = torch.randn(4, 2, 6, dtype=torch.float64)
    ours, theirs = Noisy(pairs), Noisy(pairs)
    blur_, bloop = BLUR(theirs.params, torch.optim.SGD, gamma=0.5, lr=1.0), make_bloop(ours.params, gamma=0.5, decay=0)
    for _ in pairs:
        torch.testing.assert_close(ours.step(bloop), theirs.step(blur_))


def test_bloop_projects_on_the_average_of_the_forget_gradients() -> None:
    pairs = torch.randn(3, 2, 6, dtype=torch.float64)
    problem, decay, mean = Noisy(pairs), 0.7, torch.zeros(6, dtype=torch.float64)
    bloop = make_bloop(problem.params, gamma=0.5, decay=decay)
    for forget, retain in pairs:
        mean = decay * mean + (1 - decay) * forget
        expected = 0.5 * forget + retain - (retain @ mean) / (mean @ mean) * mean
        torch.testing.assert_close(problem.step(bloop), -expected)


def test_what_bloop_keeps_of_the_retain_gradient_is_orthogonal_to_the_average() -> None:
    pairs = torch.randn(5, 2, 20, dtype=torch.float64)
    problem = Noisy(pairs)
    bloop = make_bloop(problem.params, gamma=0.5)
    for forget, retain in pairs:
        kept = -problem.step(bloop) - 0.5 * forget
        mean = torch.cat(bloop.mean)
        assert abs((kept @ mean) / kept.norm() / mean.norm()).item() < 1e-12
        assert abs((retain @ mean) / retain.norm() / mean.norm()).item() > 1e-3


def test_bloop_records_what_the_step_saw() -> None:
    pairs = torch.randn(2, 2, 6, dtype=torch.float64)
    problem = Noisy(pairs)
    bloop = make_bloop(problem.params, gamma=0.5)
    problem.step(bloop)
    moved, (forget, retain) = problem.step(bloop), pairs[1]
    dot, norms = (forget @ retain).item(), (forget.norm().item(), retain.norm().item())
    assert bloop.statistics.to_dict() == pytest.approx(
        {
            "cosine": dot / norms[0] / norms[1],
            "dot_retain_forget": dot,
            "forget_norm": norms[0],
            "retain_norm": norms[1],
            "forget_coefficient": 0.5,
            "retain_coefficient": 1.0,
            "update_norm": moved.norm().item(),
        }
    )


def test_bloop_returns_the_losses_and_leaves_no_gradient() -> None:
    params = [nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([5.0]))]

    def closure(p: nn.Parameter) -> Tensor:
        loss = 3 * p.sum()
        loss.backward()
        return loss

    # Each loss reaches one of the parameters alone.
    losses = make_bloop(params, gamma=1.0).step(partial(closure, params[0]), partial(closure, params[1]))
    assert [loss.item() for loss in losses] == [6.0, 15.0]
    assert not any(loss.requires_grad for loss in losses)
    assert [p.item() for p in params] == [2.0 - 3.0, 5.0 - 3.0]
    assert all(p.grad is None for p in params)


def test_bloop_with_a_forget_gradient_of_zero_takes_the_retain_step() -> None:
    pairs = torch.stack([torch.zeros(6), torch.arange(6.0)]).double()[None]
    problem = Noisy(pairs)
    bloop = make_bloop(problem.params, gamma=1.0)
    assert torch.equal(problem.step(bloop), -pairs[0, 1])
    assert bloop.statistics.to_dict()["cosine"] == 0.0
