"""What models bring to the metric of the retain loss: adapters, ties, parts that one loss reaches, dtypes, layouts."""

from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ROWS,
    Problem,
    assert_params_close,
    assert_same_bits,
    backends,
    run_phases,
    snapshot,
    step_by_closures,
    step_by_phases,
)
from metric_equations import DAMPING, Equations, make
from torch import nn
from torch.optim import SGD, AdamW

from blur_optim import BLUR

both_ways = pytest.mark.parametrize("step", [step_by_closures, step_by_phases])


def drawn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem_of(params, function, dtype=torch.float64):
    """A problem whose losses are those of ``helpers.Problem``, of ``function(inputs)``."""
    forget, retain = drawn(2, ROWS, 4, seed=7, dtype=dtype)
    return SimpleNamespace(
        params=list(params),
        forget_loss=lambda part=0, parts=1: function(forget.chunk(parts)[part]).square().sum() / ROWS,
        retain_loss=lambda part=0, parts=1: function(retain.chunk(parts)[part]).sin().sum() / ROWS,
    )


def opt_of(problem, base=AdamW, **options):
    return BLUR(problem.params, base, **{"gamma": 0.7, "lr": 0.1, "metric": "retain", "damping": DAMPING, **options})


def assert_follows_the_equations(make_problem, step, steps=4, base=AdamW, **options):
    """Run both; return the last problem, its optimizer and the equations."""
    problem, twin = make_problem(), make_problem()
    opt = opt_of(problem, base, **options)
    equations = Equations(twin, base, beta2=0.99 if base is SGD else None, **options)
    for _ in range(steps):
        step(opt, problem)
        equations.step()
    # float64, and adaptive steps that pass the rounding of gradients on as relative errors.
    assert_params_close(problem.params, twin.params, rtol=1e-11, atol=1e-12)
    return problem, opt, equations


# -- Adapters ---------------------------------------------------------------------------------------------------------


def fresh_lora():
    """x W^T + x A^T B^T with B = 0: neither loss has a gradient in A before B has moved."""
    weight = drawn(3, 4, seed=1)
    a, b = nn.Parameter(drawn(2, 4, seed=2)), nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    return problem_of([a, b], lambda x: x @ weight.T + x @ a.T @ b.T)


@both_ways
def test_a_fresh_adapter_follows_the_equations(step):
    assert_follows_the_equations(fresh_lora, step)


@backends
def test_what_a_fresh_adapter_does_in_its_first_steps(backend):
    """A waits for B, then moves by no more than its share of the step: bias correction counts the steps without g_r."""
    problem = fresh_lora()
    opt = opt_of(problem, backend=backend, weight_decay=0.0)
    a, b = problem.params
    before = a.detach().clone()
    step_by_closures(opt, problem)
    assert torch.equal(a, before)
    assert b.any()
    assert not opt.state[a]["exp_avg_sq"].any()
    # Of the 14 coordinates the 6 of B carry all of P g_f, whose rms is one over all of them.
    assert float(opt.statistics.effective_share) <= 6 / 14
    step_by_closures(opt, problem)
    moved = (a.detach() - before).abs()
    assert opt.state[a]["exp_avg_sq"].any()
    # Two steps of gamma lr sqrt(14 / 8), and the retain term's, which is at most lr sqrt(2) where v is (1 - b2) g_r^2.
    assert 0 < float(moved.max()) < 0.1 * (0.7 * 14**0.5 + 2**0.5)


@both_ways
@backends
def test_frozen_weights_beside_an_adapter_are_left_alone(backend, step):
    """An optimizer over all parameters, of which only some are trained: the others count in no mean either."""
    problem, twin = partly_frozen(), partly_frozen()
    frozen = [p.detach().clone() for p in problem.frozen]
    opt = BLUR(
        [*problem.frozen, *problem.params], AdamW, gamma=0.7, lr=0.1, metric="retain", damping=DAMPING, backend=backend
    )
    equations = Equations(twin, AdamW)
    for _ in range(3):
        step(opt, problem)
        equations.step()
    assert_params_close(problem.params, twin.params, rtol=1e-11, atol=1e-12)
    assert all(torch.equal(p, before) for p, before in zip(problem.frozen, frozen, strict=True))
    assert not any(p in opt.state for p in problem.frozen)


def partly_frozen():
    problem = Problem()
    problem.frozen, problem.params = problem.params[:2], problem.params[2:]
    for p in problem.frozen:
        p.requires_grad_(False)
    return problem


# -- Ties, and parts that one loss alone reaches ----------------------------------------------------------------------


def tied():
    """A vocabulary of 4 whose embedding is the head too."""
    embedding, mix = nn.Parameter(drawn(4, 3, seed=1)), nn.Parameter(drawn(3, 3, seed=2))
    return problem_of([embedding, mix], lambda x: (x @ embedding @ mix).tanh() @ embedding.T)


@both_ways
@pytest.mark.parametrize("base", [AdamW, SGD])
def test_tied_weights_follow_the_equations(base, step):
    problem, opt, _ = assert_follows_the_equations(tied, step, base=base, **({"momentum": 0.9} if base is SGD else {}))
    assert len(opt.state) == len(problem.params)


def two_heads():
    """A trunk, and for each of the losses a head that it alone reaches."""
    trunk, forget_head, retain_head = (nn.Parameter(drawn(4, n, seed=n)) for n in (4, 3, 2))
    problem = problem_of([trunk, forget_head, retain_head], lambda x: (x @ trunk).tanh() @ forget_head)
    problem.retain_loss = problem_of([], lambda x: (x @ trunk).tanh() @ retain_head).retain_loss
    return problem


class ZeroWhereAbsent(Equations):
    """An absent gradient counts as zero."""

    def gradients(self):
        losses, params = (self.problem.forget_loss(), self.problem.retain_loss()), self.problem.params
        found = [torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True) for loss in losses]
        return [torch.cat([g.flatten() for g in grads]) for grads in found]


@both_ways
@backends
def test_heads_that_one_loss_alone_reaches_follow_the_equations(backend, step):
    problem, twin = two_heads(), two_heads()
    opt, equations = opt_of(problem, backend=backend), ZeroWhereAbsent(twin, AdamW)
    for _ in range(4):
        step(opt, problem)
        equations.step()
    assert_params_close(problem.params, twin.params, rtol=1e-11, atol=1e-12)
    assert not opt.state[problem.params[1]]["exp_avg_sq"].any()


def test_damping_keeps_what_the_retain_loss_does_not_see_from_taking_the_whole_step():
    shares = []
    for damping in (0.1, 0.01, 0.0):
        problem = two_heads()
        opt = opt_of(problem, damping=damping)
        opt.record_alignment = True
        step_by_closures(opt, problem)
        in_head = opt.statistics.parameters_in_metric.forget_sq
        shares.append(float(in_head[1] / in_head.sum()))
    # P in the head is 1 / sqrt(delta mean) with damping, and 1 / eps without, 1e8, where elsewhere it is of order 1.
    assert shares[0] < 0.85 < shares[1] < 0.95
    assert shares[2] > 1 - 1e-9


@backends
def test_parameters_without_one_gradient_or_both(backend):
    """v of what has no retain gradient decays; what has none at all is left alone."""
    problem, opt = make(backend=backend)
    step_by_closures(opt, problem)
    head, v = problem.params[2], opt.state[problem.params[2]]["exp_avg_sq"].clone()
    problem.params[0].requires_grad_(False)
    frozen = problem.params[0].clone()
    opt.step(problem.forget_loss, lambda: problem.params[1].square().sum())
    assert torch.allclose(opt.state[head]["exp_avg_sq"], 0.999 * v, rtol=1e-12)
    assert torch.equal(problem.params[0], frozen)
    assert int(opt.state[problem.params[0]]["step"]) == 1
    assert int(opt.state[head]["step"]) == 2


def test_complex_parameters_count_as_their_parts():
    parts = nn.Parameter(torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    whole = nn.Parameter(torch.view_as_complex(parts.detach().clone()))
    weights = torch.arange(8.0).view(4, 2).double()
    for p, view in ((parts, lambda: parts), (whole, lambda: torch.view_as_real(whole))):
        opt = BLUR([p], AdamW, lr=0.1, metric="retain")
        for _ in range(3):
            opt.step(lambda view=view: (view() * weights).sin().sum(), lambda view=view: (view() - 1).square().sum())
    torch.testing.assert_close(torch.view_as_real(whole.detach()), parts.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@backends
def test_other_dtypes_follow_float64(dtype, backend):
    problem, opt = make(dtype=dtype, backend=backend, lr=0.01)
    twin, other = make(lr=0.01)
    twin.forget_inputs, twin.retain_inputs = problem.forget_inputs.double(), problem.retain_inputs.double()
    with torch.no_grad():
        for p, q in zip(twin.params, problem.params, strict=True):
            p.copy_(q)
    for _ in range(3):
        step_by_closures(opt, problem)
        step_by_closures(other, twin)
    # The gradients are rounded to the dtype, and three adaptive steps of 0.01 pass that on in full at most.
    atol = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert_params_close([p.double() for p in problem.params], twin.params, rtol=0, atol=atol)


# -- Dtypes and layouts -----------------------------------------------------------------------------------------------


def test_float16_weights_under_a_scaler():
    """A fused base takes float16 gradients from GradScaler; scaling by a power of two costs no bit that float16 has."""
    problem, opt = make(AdamW, torch.float16, lr=0.01, fused=True)
    twin, other = make(AdamW, torch.float16, lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for _ in range(3):
        with opt.forget():
            scaler.scale(problem.forget_loss()).backward()
        with opt.retain(grad_scale=scaler):
            scaler.scale(problem.retain_loss()).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        step_by_phases(other, twin)
    assert_same_bits(snapshot(opt), snapshot(other))


@both_ways
@backends
def test_weights_of_two_dtypes(backend, step):
    """bfloat16 matrices beside float32 norms, as checkpoints have them: each is stepped in its own, by one metric."""
    problem, twin = mixed(torch.bfloat16), mixed(torch.float32)
    opt, other = (opt_of(p, backend=backend, lr=0.01) for p in (problem, twin))
    for _ in range(3):
        step(opt, problem)
        step(other, twin)
    assert [p.dtype for p in problem.params] == [torch.bfloat16, torch.float32]
    assert [opt.state[p]["exp_avg_sq"].dtype for p in problem.params] == [torch.bfloat16, torch.float32]
    # bfloat16: 2^-9 of weights up to 2, once a step; and of gradients, of which steps of 0.01 are a function.
    atol = 3 * (2 * 2**-9 + 0.01 * 2**-6)
    assert_params_close([p.float() for p in problem.params], twin.params, rtol=0, atol=atol)
    assert all(
        (p.float() - q).abs().max() > 0.01 for p, q in zip(problem.params, mixed(torch.float32).params, strict=True)
    )


def mixed(dtype):
    low = nn.Parameter(drawn(4, 3, seed=1, dtype=torch.float32).to(torch.bfloat16).to(dtype))
    full = nn.Parameter(drawn(3, seed=2, dtype=torch.float32))
    return problem_of([low, full], lambda x: (x.to(dtype) @ low).float() * full, torch.float32)


@both_ways
@backends
def test_a_matrix_that_is_a_transpose_of_another(backend, step):
    def transposed():
        weight, bias = nn.Parameter(drawn(3, 4, seed=1).T), nn.Parameter(drawn(3, seed=2))
        assert not weight.is_contiguous()
        return problem_of([weight, bias], lambda x: x @ weight + bias)

    assert_follows_the_equations(transposed, step, backend=backend)


def test_a_gradient_of_one_element_and_of_none():
    """An empty parameter takes part in nothing."""
    gain, empty = nn.Parameter(torch.ones(1, dtype=torch.float64)), nn.Parameter(torch.zeros(0, 4, dtype=torch.float64))
    problem = problem_of([gain, empty], lambda x: x * gain + empty.sum())
    opt = opt_of(problem)
    step_by_closures(opt, problem)
    run_phases(opt, problem)
    assert float(opt.statistics.effective_share) == pytest.approx(1.0)
    opt.step()
    assert gain.isfinite().all()
    assert empty.numel() == 0
