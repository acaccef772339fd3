"""The statistics against the gradients, and what reading them costs."""

import pytest
import torch
from host_reads import CountHostReads
from torch import nn

from blur_optim import BLUR


def problem(**options):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(8, 6).double(), torch.randn(8, 6).double()
    losses = [lambda: model(x).square().mean(), lambda: (model(y) - 1).square().mean()]
    return model, losses, BLUR(model.parameters(), torch.optim.SGD, lr=0.1, **options)


def test_none_before_the_first_step():
    assert problem()[2].statistics is None


@pytest.mark.parametrize("rows", [1, 4], ids=["global", "parameter"])
def test_agrees_with_the_gradients(rows):
    model, losses, opt = problem(gamma=0.3, retain_weight=2.0, scope="global" if rows == 1 else "parameter")
    f, r = (torch.autograd.grad(loss(), list(model.parameters())) for loss in losses)
    before = [p.detach().clone() for p in model.parameters()]
    opt.step(*losses)
    u = torch.cat([((b - p.detach()) / 0.1).flatten() for b, p in zip(before, model.parameters(), strict=True)])
    flat_f, flat_r = (torch.cat([g.flatten() for g in grads]) for grads in (f, r))
    s = opt.statistics
    assert float(s.forget_norm) == pytest.approx(float(flat_f.norm()), rel=1e-12)
    assert float(s.retain_norm) == pytest.approx(float(flat_r.norm()), rel=1e-12)
    assert float(s.dot_retain_forget) == pytest.approx(float(flat_r @ flat_f), rel=1e-12)
    assert float(s.cosine) == pytest.approx(float(torch.cosine_similarity(flat_f, flat_r, dim=0)), rel=1e-12)
    assert float(s.update_norm) == pytest.approx(float(u.norm()), rel=1e-10)
    assert s.forget_coefficient.shape == s.retain_coefficient.shape == s.row_cosines.shape == (rows,)
    if rows == 4:
        expected = [torch.cosine_similarity(x.flatten(), y.flatten(), dim=0) for x, y in zip(f, r, strict=True)]
        torch.testing.assert_close(s.row_cosines, torch.stack(expected))
        xi = [0.3 - 2 * (y * x).sum() / (x * x).sum() for x, y in zip(f, r, strict=True)]
        torch.testing.assert_close(s.forget_coefficient, torch.stack(xi))


@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_to_dict_holds_the_same_numbers(scope):
    _, losses, opt = problem(scope=scope)
    opt.step(*losses)
    values = opt.statistics.to_dict()
    assert values["skipped"] == 0
    for name in ("forget_norm", "retain_norm", "dot_retain_forget", "cosine", "update_norm"):
        assert values[name] == float(getattr(opt.statistics, name))
    a = opt.statistics.forget_coefficient.tolist()
    assert values["forget_coefficient"] == (a[0] if scope == "global" else a)


def test_a_snapshot_does_not_change_later():
    _, losses, opt = problem()
    opt.step(*losses)
    snapshot = opt.statistics
    first = snapshot.to_dict()
    opt.step(losses[0], lambda: losses[1]() * float("nan"))
    assert snapshot.to_dict() == first
    assert int(opt.statistics.skipped) == 1


def test_cosine_of_a_zero_gradient_is_zero():
    _, losses, opt = problem()
    opt.step(losses[0], lambda: 0.0 * losses[1]())
    assert float(opt.statistics.cosine) == 0.0


def step_with_base(**base_kwargs):
    model = nn.Linear(6, 3)
    opt = BLUR(model.parameters(), torch.optim.AdamW, lr=0.1, max_grad_norm=1.0, scope="parameter", **base_kwargs)
    x = torch.randn(4, 6)
    return opt, lambda: model(x).square().mean(), lambda: (model(x) - 1).square().mean()


def test_cosine_of_a_gradient_that_is_not_finite_is_nan():
    _, (forget, retain), opt = problem(scope="group")
    opt.step(lambda: forget() * float("nan"), retain)
    assert opt.statistics.cosine.isnan()
    assert opt.statistics.row_cosines.isnan().all()


def test_a_step_reads_nothing_on_the_host():
    """Dots, coefficients, clipping, blend, skipping and recording, over a base that takes found_inf."""
    opt, forget, retain = step_with_base(fused=True)
    opt.step(forget, retain)
    records = []
    with CountHostReads() as reads:
        for _ in range(3):
            opt.step(forget, retain)
            records.append((opt.statistics.cosine, opt.statistics.update_norm, opt.statistics.forget_norm))
    assert reads.count == 0


def test_another_base_costs_one_read():
    opt, forget, retain = step_with_base(foreach=True)
    with CountHostReads() as projecting:
        with opt.forget():
            forget().backward()
        with opt.retain():
            retain().backward()
    with CountHostReads() as stepping:
        opt.step()
    with CountHostReads() as plain:
        opt.base.step()
    assert projecting.count == 0
    assert stepping.count == plain.count + 1


def test_reading_everything_is_one_copy():
    opt, forget, retain = step_with_base(fused=True)
    opt.step(forget, retain)
    with CountHostReads() as reads:
        opt.statistics.to_dict()
    assert reads.count <= 1
