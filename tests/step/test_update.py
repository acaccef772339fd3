"""The update of a whole step against the equation in float64: rules, scopes, scales, groups, kinds of parameters."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from blur_optim import BLUR
from blur_optim.kernels.select import BACKENDS, why_not
from blur_optim.step.rules import RULES


def mgda(dots, gamma, alpha):
    """The minimum-norm point of the segment between the two gradients (Désidéri 2012)."""
    difference = dots.forget_norm_sq + dots.retain_norm_sq - 2 * dots.retain_forget
    a = ((dots.retain_norm_sq - dots.retain_forget) / difference).clamp(0, 1)
    return a, 1 - a


def expected_coefficients(rule, rf, ff, rr, gamma, alpha):
    """The rules as the documentation states them, on plain numbers."""
    return {
        "blur": (gamma - alpha * rf / ff, alpha),
        "retain_first": (gamma, alpha - gamma * rf / rr),
        "conflict": (gamma - alpha * rf / ff if rf < 0 else gamma, alpha),
        "barrier": (max(gamma - alpha * rf / ff, 0.0), alpha),
        "weighted_sum": (gamma, alpha),
        "normalized": (gamma / ff**0.5, alpha / rr**0.5),
    }[rule]


def gradients(shapes, seed, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def assign(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()


def project(opt, params, forget, retain):
    """The update that BLUR makes of two given sets of gradients."""
    opt.zero_grad()
    with opt.forget():
        assign(params, forget)
    with opt.retain():
        assign(params, retain)
    return [p.grad for p in params]


def flat(tensors):
    return torch.cat([t.double().flatten() for t in tensors])


SHAPES = [(6, 4), (4,), (), (0,), (3, 2, 5)]


def make_params(shapes=SHAPES, dtype=torch.float64):
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if not why_not(name, torch.device("cpu"))])
@pytest.mark.parametrize("tilt", [-0.8, 0.8], ids=["conflicting", "aligned"])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule, tilt, backend):
    params = make_params()
    f, r = gradients(SHAPES, 1), gradients(SHAPES, 2)
    r = [x + tilt * y for x, y in zip(r, f, strict=True)]
    opt = BLUR(params, gamma=0.7, retain_weight=1.3, rule=rule, backend=backend)
    u = project(opt, params, f, r)
    rf, ff, rr = (float(flat(x) @ flat(y)) for x, y in ((r, f), (f, f), (r, r)))
    a, b = expected_coefficients(rule, rf, ff, rr, 0.7, 1.3)
    assert a != b
    torch.testing.assert_close(flat(u), a * flat(f) + b * flat(r), rtol=1e-13, atol=1e-13)


def test_a_rule_of_ones_own():
    params = make_params()
    f, r = gradients(SHAPES, 1), gradients(SHAPES, 2)
    u = flat(project(BLUR(params, rule=mgda), params, f, r))
    # What defines the minimum-norm point: it has the same product with both gradients, and these are its square.
    assert float(u @ flat(f)) == pytest.approx(float(u @ u), rel=1e-12)
    assert float(u @ flat(r)) == pytest.approx(float(u @ u), rel=1e-12)


@pytest.mark.parametrize("rule", ["blur", "conflict"])
def test_normalize(rule):
    params = make_params()
    f, r = gradients(SHAPES, 1, scale=1e-3), gradients(SHAPES, 2, scale=1e2)
    u = project(BLUR(params, rule=rule, normalize=True, gamma=0.5), params, f, r)
    unit_f = [x / flat(f).norm() for x in f]
    unit_r = [x / flat(r).norm() for x in r]
    rf = float(flat(unit_r) @ flat(unit_f))
    a, b = expected_coefficients(rule, rf, 1.0, 1.0, 0.5, 1.0)
    torch.testing.assert_close(flat(u), a * flat(unit_f) + b * flat(unit_r), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scope", ["global", "group", "parameter"])
def test_scopes_and_groups_with_their_own_weights(scope, rule):
    shapes = [(5, 3), (4,), (2, 2), (6,)]
    params = make_params(shapes)
    groups = [
        {"params": params[:2], "gamma": 0.5, "lr": 0.1},
        {"params": params[2:], "retain_weight": 2.0, "lr": 0.01},
    ]
    weights = [(0.5, 1.0), (0.5, 1.0), (0.9, 2.0), (0.9, 2.0)]
    members = {
        "global": [[0, 1, 2, 3]] * 4,
        "group": [[0, 1], [0, 1], [2, 3], [2, 3]],
        "parameter": [[0], [1], [2], [3]],
    }[scope]
    f, r = gradients(shapes, 1), gradients(shapes, 2)
    u = project(BLUR(groups, gamma=0.9, rule=rule, scope=scope), params, f, r)
    for i in range(4):
        mine_f, mine_r = flat([f[j] for j in members[i]]), flat([r[j] for j in members[i]])
        dots = [float(x @ y) for x, y in ((mine_r, mine_f), (mine_f, mine_f), (mine_r, mine_r))]
        a, b = expected_coefficients(rule, *dots, *weights[i])
        torch.testing.assert_close(u[i], a * f[i] + b * r[i], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("exponent", range(-12, 13, 3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_forget_rate_and_norm_over_gradient_scales(exponent, dtype):
    """<g_f, u> = gamma |g_f|^2 and the closed form of |u|^2, with the other gradient at scale 1."""
    shapes = [(50, 40), (300,)]
    params = make_params(shapes, dtype)
    f, r = gradients(shapes, 1, 10.0**exponent, dtype), gradients(shapes, 2, 1.0, dtype)
    opt = BLUR(params, gamma=2.0)
    u = flat(project(opt, params, f, r))
    f64, r64 = flat(f), flat(r)
    dot, ff = f64 @ r64, f64 @ f64
    # u is rounded once, which along the forget direction is an error of |u| times the unit roundoff.
    roundoff = {torch.float64: 1e-14, torch.float32: 2e-7, torch.bfloat16: 2**-8}[dtype]
    size = float(u.norm() + dot.abs() / ff.sqrt())
    assert float(f64 @ u / ff.sqrt()) == pytest.approx(float(2 * ff.sqrt()), abs=roundoff * size)
    closed_form = (4 * ff + r64 @ r64 - dot**2 / ff).sqrt()
    assert float(opt.statistics.update_norm) == pytest.approx(float(closed_form), rel=1e-6)
    assert float(u.norm()) == pytest.approx(float(closed_form), rel=1e-6 + roundoff)


@pytest.mark.parametrize("rule", [name for name in RULES if name != "normalized"])
def test_homogeneous_in_a_common_loss_scale(rule):
    params = make_params(dtype=torch.float32)
    f, r = gradients(SHAPES, 1, dtype=torch.float32), gradients(SHAPES, 2, dtype=torch.float32)
    u = project(BLUR(params, rule=rule), params, f, r)
    for scale in (2.0**-20, 2.0**24):  # Powers of two scale without rounding, so the bits must agree.
        scaled = project(BLUR(params, rule=rule), params, [scale * x for x in f], [scale * x for x in r])
        assert all(torch.equal(s, scale * x) for s, x in zip(scaled, u, strict=True))


@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["clips", "does-not"])
@pytest.mark.parametrize("scope", ["global", "group", "parameter"])
def test_clipping_equals_clip_grad_norm_(scope, max_norm):
    shapes = [(5, 3), (4,), (2, 2)]
    params, f, r = make_params(shapes), gradients(shapes, 1), gradients(shapes, 2)
    groups = [{"params": params[:1]}, {"params": params[1:], "gamma": 3.0}]
    plain = [u.clone() for u in project(BLUR(groups, scope=scope), params, f, r)]
    assign(params, plain)
    norm = nn.utils.clip_grad_norm_(params, max_norm)
    expected = [p.grad for p in params]
    assign(params, [None] * 3)
    opt = BLUR([{"params": g["params"], "gamma": g["gamma"]} for g in groups], scope=scope, max_grad_norm=max_norm)
    torch.testing.assert_close(project(opt, params, f, r), expected, rtol=1e-12, atol=1e-14)
    assert float(opt.statistics.update_norm) == pytest.approx(min(float(norm), max_norm), rel=1e-5)


def test_the_original_code_for_tofu_and_muse():
    """xi = gamma - <r,f>/<f,f>; u = r + xi f."""
    params, f, r = make_params(), gradients(SHAPES, 1), gradients(SHAPES, 2)
    xi = 0.3 - float(flat(r) @ flat(f)) / float(flat(f) @ flat(f))
    u = project(BLUR(params, gamma=0.3), params, f, r)
    torch.testing.assert_close(u, [y + xi * x for x, y in zip(f, r, strict=True)], rtol=1e-13, atol=1e-14)


def test_the_original_code_for_wmdp():
    """u = f + alpha (r - <r,f>/<f,f> f)."""
    params, f, r = make_params(), gradients(SHAPES, 1), gradients(SHAPES, 2)
    c = float(flat(r) @ flat(f)) / float(flat(f) @ flat(f))
    u = project(BLUR(params, gamma=1.0, retain_weight=800.0), params, f, r)
    torch.testing.assert_close(u, [x + 800.0 * (y - c * x) for x, y in zip(f, r, strict=True)], rtol=1e-12, atol=1e-11)


def test_gradients_in_one_phase_only():
    shapes = [(3, 2), (4,), (5,), (2,)]
    params, f, r = make_params(shapes), gradients(shapes, 1), gradients(shapes, 2)
    f[1] = r[2] = f[3] = r[3] = None
    u = project(BLUR(params), params, f, r)
    zero_f = [torch.zeros(s, dtype=torch.float64) if x is None else x for x, s in zip(f, shapes, strict=True)]
    zero_r = [torch.zeros(s, dtype=torch.float64) if x is None else x for x, s in zip(r, shapes, strict=True)]
    xi = 1.0 - flat(zero_r) @ flat(zero_f) / (flat(zero_f) @ flat(zero_f))
    expected = [xi * x + y for x, y in zip(zero_f, zero_r, strict=True)]
    torch.testing.assert_close(u[:3], expected[:3], rtol=1e-13, atol=1e-14)
    assert u[3] is None


def test_a_parameter_without_gradient_is_untouched():
    params = make_params([(3,), (3,)])
    before = params[1].detach().clone()
    opt = BLUR(params, torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    opt.step(lambda: params[0].sum(), lambda: params[0].square().sum())
    assert torch.equal(params[1], before)
    assert params[1] not in opt.state


@pytest.mark.parametrize("missing", ["forget", "retain", "both"])
def test_a_phase_without_any_gradient(missing):
    params, g = make_params(), gradients(SHAPES, 1)
    none = [None] * len(params)
    opt = BLUR(params, gamma=0.5, retain_weight=2.0)
    said = pytest.warns(UserWarning, match="neither phase left a gradient") if missing == "both" else nullcontext()
    with said:
        u = project(opt, params, none if missing != "retain" else g, none if missing != "forget" else g)
    if missing == "both":
        assert u == none
    else:
        weight = 2.0 if missing == "forget" else 0.5
        assert all(torch.equal(x, weight * y) for x, y in zip(u, g, strict=True))
    opt.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters(dtype):
    shapes = [(400, 30), (77,)]
    params, f, r = make_params(shapes, dtype), gradients(shapes, 1, dtype=dtype), gradients(shapes, 2, dtype=dtype)
    u = project(BLUR(params), params, f, r)
    xi = float(1.0 - flat(r) @ flat(f) / (flat(f) @ flat(f)))
    for x, y, z in zip(u, f, r, strict=True):
        assert x.dtype == dtype
        # Rounded once. A coefficient in the parameters' dtype would add as much again, the dots in it 100 times.
        torch.testing.assert_close(x.double(), xi * y.double() + z.double(), rtol=torch.finfo(dtype).eps / 2, atol=1e-6)


def test_mixed_dtypes_share_one_coefficient():
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    params = [nn.Parameter(torch.zeros(20, dtype=d)) for d in dtypes]
    f = [torch.randn(20).to(d) for d in dtypes]
    r = [torch.randn(20).to(d) for d in dtypes]
    opt = BLUR(params)
    u = project(opt, params, f, r)
    xi = float(1.0 - flat(r) @ flat(f) / (flat(f) @ flat(f)))
    assert float(opt.statistics.forget_coefficient) == pytest.approx(xi, rel=1e-6)
    for x, y, z in zip(u, f, r, strict=True):
        torch.testing.assert_close(x, (xi * y.double() + z.double()).to(x.dtype), rtol=1e-2, atol=1e-3)


def test_complex_parameters():
    """The inner product of complex gradients is the real one, so u equals that of their real and imaginary parts."""
    f, r = (torch.randn(2, 6, 2, dtype=torch.float64) for _ in range(2))
    real, compl = nn.Parameter(torch.zeros(2, 6, 2).double()), nn.Parameter(torch.zeros(2, 6).cdouble())
    (u_real,) = project(BLUR([real]), [real], [f], [r])
    (u_complex,) = project(BLUR([compl]), [compl], [torch.view_as_complex(f)], [torch.view_as_complex(r)])
    assert torch.equal(torch.view_as_real(u_complex), u_real)


def test_tied_weights_count_once():
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    tokens = torch.arange(7)
    opt = BLUR(model.parameters(), torch.optim.SGD, lr=0.1)
    assert len(opt.param_groups[0]["params"]) == 1
    losses = [lambda: model(tokens).square().mean(), lambda: (model(tokens) - 1).square().mean()]
    f, r = (torch.autograd.grad(loss(), embedding.weight)[0] for loss in losses)
    before = embedding.weight.detach().clone()
    opt.step(*losses)
    expected = before - 0.1 * ((1 - (r * f).sum() / (f * f).sum()) * f + r)
    torch.testing.assert_close(embedding.weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_frozen_parameters_stay():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    x = torch.randn(5, 3)
    BLUR(model.parameters(), lr=0.1).step(lambda: model(x).mean(), lambda: model(x).square().mean())
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.grad is None


def test_gradients_of_unusual_layout():
    shapes = [(4, 6), (6, 4), (5, 3)]
    params, f, r = make_params(shapes), gradients(shapes, 1), gradients(shapes, 2)
    expanded = torch.randn(3, dtype=torch.float64)
    r[2] = expanded.expand(5, 3).contiguous()
    opt = BLUR(params)
    params_plain = make_params(shapes)
    plain = project(BLUR(params_plain), params_plain, f, r)
    with opt.forget():
        assign(params, f)
        params[0].grad = f[0].t().contiguous().t()
    with opt.retain():
        assign(params, r)
        params[1].grad = torch.stack([r[1], r[1]], dim=-1)[..., 0]
        params[2].grad = expanded.expand(5, 3)  # Its rows are one memory: written in place, u would be wrong.
    torch.testing.assert_close([p.grad for p in params], plain, rtol=1e-12, atol=1e-14)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    opt = BLUR(embedding.parameters(), torch.optim.SGD, lr=0.1)
    loss = lambda: embedding(torch.tensor([1])).sum()  # noqa: E731
    with pytest.raises(TypeError, match=r'param_groups\[0\]\["params"\]\[0\] must be dense, got .*sparse=False'):
        opt.step(loss, loss)
    assert embedding.weight.grad is None


NON_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("value", NON_FINITE, ids=str)
@pytest.mark.parametrize("where", ["forget", "retain"])
@pytest.mark.parametrize("fused", [False, True], ids=["flag-read-on-host", "found_inf"])
def test_a_gradient_that_is_not_finite_skips_the_step(fused, where, value):
    params = make_params([(4, 3), (5,)], torch.float32)
    opt = BLUR(params, torch.optim.AdamW, lr=0.1, fused=fused)

    def loss(poison):
        return lambda: sum(p.square().sum() for p in params) * (value if poison else 1.0)

    opt.step(loss(False), loss(False))
    before = [t.clone() for p in params for t in (p.detach(), *opt.state[p].values())]
    opt.step(loss(where == "forget"), loss(where == "retain"))
    after = [t for p in params for t in (p.detach(), *opt.state[p].values())]
    assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True))
    assert int(opt.statistics.skipped) == 1
    opt.step(loss(False), loss(False))
    assert not torch.equal(params[0].detach(), before[0])
    assert int(opt.statistics.skipped) == 1
