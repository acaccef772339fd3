"""Any optimizer under BLUR: it steps as it would on the hand-computed update; what cannot be a base is refused."""

import inspect
from functools import partial

import pytest
import pytorch_optimizer
import torch
from helpers import (
    Problem,
    assert_params_close,
    assert_same_bits,
    backends,
    snapshot,
    step_by_closures,
    step_by_phases,
    step_on,
)
from torch import nn, optim

from blur_optim import BLUR

# Learning rates high enough that three steps are far from the start, so that a wrong moment shows.
BASES = {
    "ASGD": partial(optim.ASGD, lr=0.1, t0=1, weight_decay=0.1),
    "Adadelta": partial(optim.Adadelta, lr=10.0, rho=0.5),
    "Adafactor": partial(optim.Adafactor, lr=0.1),
    "Adagrad": partial(optim.Adagrad, lr=0.1, lr_decay=0.1),
    "Adagrad-fused": partial(optim.Adagrad, lr=0.1, fused=True),
    "Adam": partial(optim.Adam, lr=0.1, weight_decay=0.1),
    "Adam-amsgrad-maximize": partial(optim.Adam, lr=0.1, amsgrad=True, maximize=True),
    "AdamW": partial(optim.AdamW, lr=0.1, weight_decay=0.1),
    "AdamW-foreach": partial(optim.AdamW, lr=0.1, foreach=True),
    "AdamW-fused": partial(optim.AdamW, lr=0.1, fused=True),
    "AdamW-tensor-lr": partial(optim.AdamW, lr=torch.tensor(0.1, dtype=torch.float64)),
    "Adamax": partial(optim.Adamax, lr=0.1),
    "Muon": partial(optim.Muon, lr=0.1),
    "NAdam": partial(optim.NAdam, lr=0.1),
    "RAdam": partial(optim.RAdam, lr=0.1),
    "RMSprop": partial(optim.RMSprop, lr=0.1, momentum=0.9, centered=True),
    "Rprop": partial(optim.Rprop, lr=0.1),
    "SGD": partial(optim.SGD, lr=0.1),
    "SGD-momentum": partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "SGD-nesterov": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "SGD-fused": partial(optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "SGD-foreach": partial(optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    # Not torch's own.
    "pytorch_optimizer.AdaBelief": partial(pytorch_optimizer.AdaBelief, lr=0.1),
    "pytorch_optimizer.Lion": partial(pytorch_optimizer.Lion, lr=0.1),
    "pytorch_optimizer.Prodigy": partial(pytorch_optimizer.Prodigy, lr=1.0),
    "pytorch_optimizer.ScheduleFreeAdamW": partial(pytorch_optimizer.ScheduleFreeAdamW, lr=0.1),
}
NO_BASE = {
    "LBFGS": "evaluates its closure several times a step",
    "SparseAdam": "takes sparse gradients only, which BLUR refuses",
}


def make(name, dtype=torch.float64, **options):
    """BLUR over the base, and the bare base over a second copy of the problem."""
    problem, twin = Problem(dtype), Problem(dtype)
    for p in (problem, twin):
        p.params = [q for q in p.params if q.dim() == 2 or name != "Muon"]  # Muon takes matrices alone.
    return problem, BLUR(problem.params, BASES[name], **options), twin, BASES[name](twin.params)


def test_no_optimizer_of_torch_is_missing_here():
    classes = {name for name, c in vars(optim).items() if inspect.isclass(c) and issubclass(c, optim.Optimizer)}
    covered = {name.split("-")[0] for name in BASES if "." not in name}
    assert classes - {"Optimizer"} == covered | NO_BASE.keys()


@backends
@pytest.mark.parametrize("step", [step_by_closures, step_by_phases])
@pytest.mark.parametrize("name", BASES)
def test_three_steps_equal_the_bare_base_on_the_update(name, step, backend):
    problem, opt, twin, bare = make(name, gamma=0.7, retain_weight=1.3, backend=backend)
    start = snapshot(opt)
    for _ in range(3):
        step(opt, problem)
        step_on(bare, twin.params, twin.update(0.7, 1.3))
    # float64 up to the order of additions in the dots, which adaptive steps pass on as they are relative.
    assert_params_close(problem.params, twin.params, rtol=1e-12, atol=1e-13)
    distances = [(p - q).norm() for p, q in zip(problem.params, start.values(), strict=False) if torch.is_tensor(q)]
    assert all(distance > 0.01 for distance in distances)


@pytest.mark.parametrize("name", BASES)
def test_with_a_zero_retain_loss_it_is_the_base_bit_for_bit(name):
    problem, opt, twin, bare = make(name, torch.float32, backend="foreach")  # The fused update rounds less often.
    for _ in range(3):
        opt.step(problem.forget_loss, lambda: problem.retain_loss() * 0)
        step_on(bare, twin.params, torch.autograd.grad(twin.forget_loss(), twin.params))
    expected = snapshot(bare)
    assert_same_bits({name: value for name, value in snapshot(opt).items() if name in expected}, expected)


@backends
@pytest.mark.parametrize("when", ["first", "later"])
@pytest.mark.parametrize("name", BASES)
def test_a_skipped_step_does_not_count(name, when, backend, monkeypatch):
    # Memory that a skipped step allocates without writing it must not come to light in the next.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        problem, opt, twin, _ = make(name, torch.float32, backend=backend)
        twin_opt = BLUR(twin.params, BASES[name], backend=backend)
        for skip in (when == "first", False, when == "later", False):
            if skip:
                before = [p.detach().clone() for p in problem.params]
                opt.step(problem.forget_loss, lambda: problem.retain_loss() * float("inf"))
                assert all(torch.equal(p, q) for p, q in zip(problem.params, before, strict=True))
            else:
                step_by_closures(opt, problem)
                step_by_closures(twin_opt, twin)
    finally:
        torch.use_deterministic_algorithms(False)
    assert opt.statistics.skipped == 1
    assert_same_bits(snapshot(opt), snapshot(twin_opt))


@pytest.mark.parametrize("name", ["AdamW", "AdamW-fused"])
def test_the_skip_ends_with_its_step(name):
    problem, opt, twin, bare = make(name)
    with opt.forget():
        (problem.forget_loss() * float("nan")).backward()
    with opt.retain():
        problem.retain_loss().backward()
    opt.step()
    problem.model.zero_grad()
    for p, o in ((problem, opt), (twin, bare)):
        step_on(o, p.params, torch.autograd.grad(p.forget_loss(), p.params))
    assert all(torch.equal(p, q) for p, q in zip(problem.params, twin.params, strict=True))


CAPTURABLE = [
    n for n, c in vars(optim).items() if inspect.isclass(c) and "capturable" in inspect.signature(c).parameters
]


@pytest.mark.parametrize("name", CAPTURABLE)
def test_capturable_does_under_blur_what_it_does_alone(name):
    """torch 2.13 refuses to run capturable optimizers on the CPU; where it does not, the numbers must agree."""
    base = partial(getattr(optim, name), lr=0.1, capturable=True)
    problem, twin = Problem(), Problem()
    opt, bare = BLUR(problem.params, base), base(twin.params)
    try:
        step_on(bare, twin.params, twin.update())
    except AssertionError as refusal:
        with pytest.raises(AssertionError, match=str(refusal)[:40]):
            step_by_closures(opt, problem)
        assert all(p.grad is None for p in problem.params)
    else:
        step_by_closures(opt, problem)
    assert_params_close(problem.params, twin.params, rtol=1e-12, atol=1e-13)


# -- Instances and factories -------------------------------------------------------------------------------------------


def grouped(params):
    return [{"params": params[:1], "lr": 0.2}, {"params": params[1:], "weight_decay": 0.3, "gamma": 0.5}]


SOURCES = [
    ("a class", lambda params: BLUR(params, optim.AdamW, lr=0.1)),
    ("the default", lambda params: BLUR(params, lr=0.1)),
    ("a generator of parameters", lambda params: BLUR(iter(params), optim.AdamW, lr=0.1)),
    ("named parameters", lambda params: BLUR(((str(i), p) for i, p in enumerate(params)), optim.AdamW, lr=0.1)),
    ("a factory", lambda params: BLUR(params, lambda p, size: optim.AdamW(p, lr=size / 10), size=1)),
    ("an instance", lambda params: BLUR(base=optim.AdamW(params, lr=0.1))),
    ("an instance and its params", lambda params: BLUR(iter(params), optim.AdamW(params, lr=0.1))),
    ("an instance and a group", lambda params: BLUR([{"params": params}], optim.AdamW(params, lr=0.1))),
    (
        "an instance and groups of single parameters",
        lambda params: BLUR([{"params": p} for p in params], optim.AdamW(params, lr=0.1)),
    ),
    (
        "an instance and named parameters",
        lambda params: BLUR([(str(i), p) for i, p in enumerate(params)], optim.AdamW(params, lr=0.1)),
    ),
]


@pytest.mark.parametrize("source", [s[1] for s in SOURCES], ids=[s[0] for s in SOURCES])
def test_where_the_base_may_come_from(source):
    problem, twin = Problem(), Problem()
    opt, bare = source(problem.params), optim.AdamW(twin.params, lr=0.1)
    assert isinstance(opt, optim.Optimizer)
    for _ in range(2):
        step_by_closures(opt, problem)
        step_on(bare, twin.params, twin.update())
    assert_params_close(problem.params, twin.params, rtol=1e-12, atol=1e-13)


def test_an_instance_goes_on_from_its_state():
    problem, twin = Problem(), Problem()
    base, bare = (optim.AdamW(grouped(p.params), lr=0.1) for p in (problem, twin))
    for p, o in ((problem, base), (twin, bare)):
        step_on(o, p.params, p.update())
    opt = BLUR(base=base, gamma=2.0, backend="foreach")
    assert opt.state is base.state
    assert opt.param_groups is base.param_groups
    assert opt.defaults is base.defaults
    assert [group["gamma"] for group in opt.param_groups] == [2.0, 0.5]
    opt.step(problem.forget_loss, lambda: None)
    f = torch.autograd.grad(twin.forget_loss(), twin.params)
    step_on(bare, twin.params, [gamma * g for gamma, g in zip([2.0, 0.5, 0.5, 0.5], f, strict=True)])
    assert all(torch.equal(p, q) for p, q in zip(problem.params, twin.params, strict=True))


def test_weights_in_groups_beside_an_instance_are_not_dropped():
    """Either they count or they are refused."""
    problem = Problem()
    try:
        opt = BLUR(grouped(problem.params), optim.AdamW(problem.params))
    except (TypeError, ValueError):
        return
    assert [group["gamma"] for group in opt.param_groups] == [1.0, 0.5]


def params():
    return [nn.Parameter(torch.zeros(2, 2))]


def over_other(others):
    mine = [*params(), *params()]
    return lambda: BLUR(others(mine), optim.SGD(mine, lr=0.1))


def sam(params, **options):
    return pytorch_optimizer.SAM(params, base_optimizer=optim.SGD, lr=0.1, **options)


class NeedsClosure(optim.SGD):
    def step(self, closure):
        return super().step(closure)


class Offloading(optim.SGD):
    """As torchao's CPUOffloadOptimizer: a hook copies each gradient away as soon as a backward has left it."""

    def __init__(self, params, lr, by="closure"):
        super().__init__(params, lr=lr)
        self.taken = {}
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(partial(self.take) if by == "partial" else lambda p: self.take(p))

    def take(self, p):
        self.taken[p] = p.grad.clone()


REFUSED = [
    ("LBFGS", lambda: BLUR(params(), optim.LBFGS), TypeError, r"without a closure of its own, which LBFGS needs"),
    ("an LBFGS instance", lambda: BLUR(base=optim.LBFGS(params())), TypeError, r"which LBFGS needs"),
    ("BLUR in BLUR", lambda: BLUR(params(), BLUR), ValueError, r"If a BLUR wraps this optimizer already, use that one"),
    ("a BLUR instance", lambda: BLUR(base=BLUR(params())), ValueError, r"\['gamma', 'retain_weight'\], got BLUR"),
    ("a wrapped base", lambda: BLUR(base=BLUR(params()).base), ValueError, r"wraps this optimizer already"),
    ("SAM", lambda: BLUR(params(), sam), TypeError, r"without a closure of its own, which SAM needs"),
    ("a required closure", lambda: BLUR(params(), NeedsClosure, lr=0.1), TypeError, r"which NeedsClosure needs"),
    (
        "hooks",
        lambda: BLUR(params(), Offloading, lr=0.1),
        TypeError,
        r"from p\.grad when it steps, got Offloading.*int8",
    ),
    (
        "hooks of a partial",
        lambda: BLUR(params(), partial(Offloading, by="partial"), lr=0.1),
        TypeError,
        r"of the two phases it would step on the last alone",
    ),
    (
        "a module class",
        lambda: BLUR(params(), nn.Identity),
        TypeError,
        r"must make .*Optimizer, got Identity",
    ),
    ("a factory of None", lambda: BLUR(params(), lambda p: None), TypeError, r"must make .*Optimizer, got NoneType"),
    (
        "None",
        lambda: BLUR(params(), None),
        TypeError,
        r"`base` must be an optimizer class, factory or instance, got No",
    ),
    ("no params", lambda: BLUR(base=optim.SGD, lr=0.1), TypeError, r"`params` must be given, unless `base` is an opt"),
    ("other params", over_other(lambda mine: params()), ValueError, r"must be the parameters of `base`, got others"),
    ("fewer params", over_other(lambda mine: mine[:1]), ValueError, r"must be the parameters of `base`, got others"),
    ("more params", over_other(lambda mine: [*mine, *params()]), ValueError, r"Leave `params` out"),
    (
        "kwargs beside an instance",
        lambda: BLUR(base=optim.SGD(params(), lr=0.1), lr=0.2, momentum=0.9),
        TypeError,
        r"`base` is an instance, so \['lr', 'momentum'\] cannot reach it\. Pass a class, or set them there",
    ),
]


@pytest.mark.parametrize(("make_it", "error", "message"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_cannot_be_a_base(make_it, error, message):
    with pytest.raises(error, match=message):
        make_it()


def test_hooks_of_others_are_no_matter():
    problem, seen = Problem(), []
    for p in problem.params:
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    step_by_closures(BLUR(problem.params, optim.SGD, lr=0.1), problem)
    assert len(seen) == 2 * len(problem.params)


class Scaled(optim.SGD):
    """A base with a ``gamma`` of its own, as MARS and others have: it multiplies the rate."""

    def __init__(self, params, lr, gamma=1.0):
        super().__init__([{"params": list(params), "gamma": gamma}], lr=lr)
        self.defaults["gamma"] = gamma

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"], before = group["lr"] * group["gamma"], group["lr"]
            super().step(closure)
            group["lr"] = before


@pytest.mark.parametrize("step", [step_by_closures, step_by_phases], ids=["closures", "phases"])
def test_a_base_with_a_gamma_of_its_own(step):
    problem, expected = Problem(), Problem()
    opt = BLUR(problem.params, partial(Scaled, gamma=0.5), gamma=0.3, lr=0.1)
    step(opt, problem)
    step_on(Scaled(expected.params, lr=0.1, gamma=0.5), expected.params, expected.update(gamma=0.3))
    assert_params_close(problem.params, expected.params, rtol=1e-9, atol=1e-12)  # float64: sums in another order.
    (group,) = opt.param_groups
    assert (group["gamma"], group["blur_gamma"], group["retain_weight"]) == (0.5, 0.3, 1.0)
    group["blur_gamma"] = 0.7
    again = BLUR(problem.params, Scaled, lr=0.1)
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[0]["blur_gamma"] == 0.7
    group["blur_gamma"] = -1.0
    with pytest.raises(ValueError, match=r"`blur_gamma` must be finite and >= 0"):
        step(opt, problem)
    group["blur_gamma"] = 0.3
    with pytest.raises(ValueError, match=r"wraps this optimizer already"):
        BLUR(base=opt)


@pytest.mark.parametrize("name", ["AdaBound", "MARS"])
def test_such_bases_of_others(name):
    problem = Problem(torch.float32)
    opt = BLUR(problem.params, getattr(pytorch_optimizer, name), lr=1e-3, gamma=0.3)
    step_by_closures(opt, problem)
    assert opt.param_groups[0]["blur_gamma"] == 0.3
    assert opt.param_groups[0]["gamma"] != 0.3
