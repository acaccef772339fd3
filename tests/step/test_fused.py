"""The fused update of step(forget, retain) against the plain path: same steps, same state, same checkpoints."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from blur_optim import BLUR
from blur_optim.kernels import native
from blur_optim.parallel.ranks import Ranks
from blur_optim.step.fused import FusedStep
from blur_optim.step.pairs import PairedGradients, Pairs
from blur_optim.step.plan import Rows

pytestmark = pytest.mark.skipif(
    bool(native.why_not(torch.device("cpu"))), reason=f"native backend: {native.why_not(torch.device('cpu'))}"
)

BASES = [
    ("adamw", AdamW, {}),
    ("adamw amsgrad", AdamW, {"amsgrad": True}),
    ("adamw maximize", AdamW, {"maximize": True, "weight_decay": 0.3}),
    ("adamw fused", AdamW, {"fused": True}),
    ("adamw foreach", AdamW, {"foreach": True}),
    ("adamw, lr is a tensor", AdamW, {"lr": torch.tensor(0.01).double(), "foreach": False}),
    ("adamw, other betas and eps", AdamW, {"betas": (0.5, 0.8), "eps": 1e-3}),
    ("adam", Adam, {}),
    ("adam, decay in the gradient", Adam, {"weight_decay": 0.2}),
    ("adam amsgrad maximize", Adam, {"amsgrad": True, "maximize": True}),
    ("sgd", SGD, {}),
    ("sgd with decay", SGD, {"weight_decay": 0.2}),
    ("sgd momentum", SGD, {"momentum": 0.9}),
    ("sgd damped", SGD, {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    ("sgd nesterov", SGD, {"momentum": 0.8, "nesterov": True}),
    ("sgd maximize", SGD, {"momentum": 0.8, "maximize": True}),
    ("sgd fused", SGD, {"momentum": 0.8, "fused": True}),
]
bases = pytest.mark.parametrize(("base", "options"), [case[1:] for case in BASES], ids=[case[0] for case in BASES])


class Twins:
    """One problem twice: ``fast`` on the fused path, ``plain`` through blend and the base's own step."""

    def __init__(self, base, options, dtype=torch.float64, **blur_options):
        torch.manual_seed(3)
        self.models = [nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)]
        self.models.append(copy.deepcopy(self.models[0]))
        self.x, self.y = torch.randn(6, 7).to(dtype), torch.randn(5, 7).to(dtype)
        options = {"lr": 0.01, **blur_options, **options}
        self.fast = BLUR(self.groups(self.models[0]), base, backend="native", **copy.deepcopy(options))
        self.plain = BLUR(self.groups(self.models[1]), base, backend="foreach", **copy.deepcopy(options))

    def groups(self, model):
        return [{"params": model[0].parameters()}, {"params": model[2].parameters(), "gamma": 0.2, "lr": 0.05}]

    def losses(self, model, poison=1.0):
        return lambda: model(self.x).square().mean() * poison, lambda: (model(self.y) - 1).square().mean()

    def step(self, poison=1.0):
        for opt, model in zip((self.fast, self.plain), self.models, strict=True):
            opt.step(*self.losses(model, poison))

    def assert_close(self, **tolerance):
        fast, plain = ([*m.parameters()] for m in self.models)
        torch.testing.assert_close([p.detach() for p in fast], [p.detach() for p in plain], **tolerance)
        for p, q in zip(fast, plain, strict=True):
            assert self.fast.state[p].keys() == self.plain.state[q].keys()
            for key, value in self.plain.state[q].items():
                mine = self.fast.state[p][key]
                assert mine.dtype == value.dtype
                assert mine.device == value.device
                torch.testing.assert_close(mine, value, **tolerance)


@pytest.fixture
def count_fused(monkeypatch):
    """How many steps went the fused way; without it these tests would pass on the plain path."""
    calls = []
    original = FusedStep.step
    monkeypatch.setattr(FusedStep, "step", lambda *args: (calls.append(1), original(*args)))
    return calls


@bases
@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_equals_the_plain_path_in_float64(base, options, scope, count_fused):
    pair = Twins(base, options, gamma=0.5, scope=scope, max_grad_norm=0.3)
    for _ in range(4):
        pair.step()
        pair.assert_close(rtol=1e-11, atol=1e-13)
    assert len(count_fused) == 4
    assert all(p.grad is None for model in pair.models for p in model.parameters())


@bases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_step_in_lower_precision_is_that_of_float64_rounded_once(base, options, dtype, count_fused):
    # Not against the plain path: torch rounds its intermediates too, and its fused SGD in bfloat16 on the CPU is off by
    # several per cent of the step (2.13).
    low = nn.Parameter(torch.randn(300).to(dtype))
    high = nn.Parameter(low.detach().double())
    f, r = torch.randn(300).to(dtype), torch.randn(300).to(dtype)
    plain = {key: value for key, value in options.items() if key not in ("fused", "foreach")}
    for p, opts, backend in ((low, options, "native"), (high, plain, "reference")):
        opt = BLUR([p], base, backend=backend, **copy.deepcopy({"lr": 0.01, **opts}))

        def gradient(g, p=p):
            p.grad = g.to(p.dtype)

        opt.step(lambda: gradient(f), lambda: gradient(r))
    assert len(count_fused) == 1
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(low.detach().double(), high.detach(), rtol=0.51 * eps, atol=1e-7)


@bases
def test_checkpoints_move_between_the_paths(base, options, count_fused):
    pair = Twins(base, options)
    pair.step()
    saved = copy.deepcopy(pair.fast.state_dict()), copy.deepcopy(pair.plain.state_dict())
    pair.plain.load_state_dict(saved[0])
    pair.fast.load_state_dict(saved[1])
    for _ in range(2):
        pair.step()
        pair.assert_close(rtol=1e-11, atol=1e-13)
    assert len(count_fused) == 3


@bases
@pytest.mark.parametrize("when", [0, 2], ids=["first-step", "third-step"])
def test_a_step_that_is_not_finite_is_skipped(base, options, when):
    pair = Twins(base, options)
    for _ in range(when):
        pair.step()
    before = [p.detach().clone() for p in pair.models[0].parameters()]
    pair.step(poison=float("nan"))
    assert all(torch.equal(p, b) for p, b in zip(pair.models[0].parameters(), before, strict=True))
    assert int(pair.fast.statistics.skipped) == 1
    for _ in range(2):
        pair.step()
    torch.testing.assert_close(
        [p.detach() for p in pair.models[0].parameters()],
        [p.detach() for p in pair.models[1].parameters()],
        rtol=1e-11,
        atol=1e-13,
    )


@bases
def test_parameters_with_one_gradient_or_none(base, options, count_fused):
    params = [[nn.Parameter(torch.full((5,), 1.0 + i).double()) for i in range(4)] for _ in range(2)]
    for ps, backend in zip(params, ("native", "foreach"), strict=True):
        opt = BLUR(ps, base, backend=backend, **copy.deepcopy({"lr": 0.01, **options}))
        for _ in range(3):
            opt.step(lambda ps=ps: (ps[0] * ps[1]).sum(), lambda ps=ps: (ps[0] * ps[2]).square().sum())
        assert ps[3] not in opt.state
    assert len(count_fused) == 3
    torch.testing.assert_close(*([p.detach() for p in ps] for ps in params), rtol=1e-11, atol=1e-13)


def test_a_scheduler_drives_it(count_fused):
    pair = Twins(AdamW, {})
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for opt in (pair.fast, pair.plain)]
    for _ in range(3):
        pair.step()
        for scheduler in schedulers:
            scheduler.step()
    assert pair.fast.param_groups[1]["lr"] == 0.05 / 8
    pair.assert_close(rtol=1e-11, atol=1e-13)
    assert len(count_fused) == 3


def test_channels_last_stays_fused(count_fused):
    models = [nn.Conv2d(3, 4, 3).double().to(memory_format=torch.channels_last)]
    models.append(copy.deepcopy(models[0]))
    x = torch.randn(2, 3, 8, 8).double().to(memory_format=torch.channels_last)
    for model, backend in zip(models, ("native", "foreach"), strict=True):
        opt = BLUR(model.parameters(), AdamW, lr=0.01, backend=backend)
        for _ in range(2):
            opt.step(lambda m=model: m(x).square().mean(), lambda m=model: (m(x) - 1).square().mean())
    assert len(count_fused) == 2
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-11, atol=1e-13)


class MyAdamW(AdamW):
    pass


PLAIN = [
    ("a subclass, whose step is its own", {"base": MyAdamW}, None, "MyAdamW has no fused update"),
    ("another optimizer", {"base": torch.optim.RMSprop}, None, "RMSprop has no fused update"),
    ("a step hook", {}, lambda opt: opt.register_step_pre_hook(lambda *_: None), "a hook or a wrapper"),
    ("a backend without it", {"backend": "foreach"}, None, "the backend has no fused update"),
    ("two devices' worth of nothing", {}, lambda opt: opt.param_groups[0]["params"].clear(), "or none has a gradient"),
]


@pytest.mark.parametrize(("options", "change", "reason"), [c[1:] for c in PLAIN], ids=[c[0] for c in PLAIN])
def test_what_takes_the_plain_path(options, change, reason, monkeypatch):
    reasons = []
    original = FusedStep.why_not
    monkeypatch.setattr(FusedStep, "why_not", lambda *args: reasons.append(original(*args)) or reasons[-1])
    model = nn.Linear(3, 2)
    opt = BLUR(model.parameters(), **{"base": AdamW, "lr": 0.1, "backend": "native", **options})
    if change:
        change(opt)
    before = model.weight.detach().clone()
    has_params = bool(opt.param_groups[0]["params"])
    opt.step(lambda: model(torch.ones(3)).sum(), lambda: model(torch.ones(3)).square().sum())
    assert reason in reasons[0]
    assert torch.equal(model.weight, before) != has_params


def paired(p):
    return PairedGradients(Pairs([p], [p.grad], [p.grad], [0], [0], [0]), Rows([p], [0], [0], [1.0], [1.0]), Ranks())


TENSOR_BETAS = {"betas": (torch.tensor(0.9), 0.99)}
ONLY_THE_BASE = [{"capturable": True}, {"differentiable": True}, TENSOR_BETAS]


@pytest.mark.parametrize("change", ONLY_THE_BASE, ids=lambda change: next(iter(change)))
def test_groups_that_only_the_base_can_step(change):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    base = AdamW([p])
    step, gradients = FusedStep(base), paired(p)
    assert step.why_not(gradients, "native") == ""
    base.param_groups[0].update(change)
    assert "capturable or differentiable" in step.why_not(gradients, "native")


def test_a_state_of_another_dtype_takes_the_plain_path():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    base = AdamW([p])
    base.state[p] = {
        "step": torch.tensor(1.0),
        "exp_avg": torch.zeros(3).double(),
        "exp_avg_sq": torch.zeros(3).double(),
    }
    assert "unusual dtype" in FusedStep(base).why_not(paired(p), "native")


class EightBits(torch.Tensor):
    """A weight as torchao's low-precision training has it: it looks like float32, and its memory is something else."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, *_):
        return cls(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace != "aten":
            raise NotImplementedError(f"{func} on {cls.__name__}")
        plain = [a.inner if isinstance(a, cls) else a for a in args]
        result = func(*plain, **(kwargs or {}))
        if func.overloadpacket.__name__.endswith("_"):
            return args[0]
        return cls(result) if func.overloadpacket.__name__ == "detach" else result


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_parameter_whose_memory_is_something_else(momentum):
    """torchao's training with weights of 8 bits and SGD; the gradients of such weights are plain tensors."""
    forget, retain = torch.randn(2, 3, 4)
    start = torch.randn(3, 4)
    found = []
    for kind in (lambda x: x, EightBits):
        p = nn.Parameter(kind(start.clone()))
        opt = BLUR([p], SGD, lr=0.1, momentum=momentum, backend="native")

        def closure(p, grad):
            p.grad = grad.clone()

        for _ in range(2):
            opt.step(lambda p=p: closure(p, forget), lambda p=p: closure(p, retain))
        found.append(p.inner if isinstance(p, EightBits) else p.detach())
    # The fused pass for the plain one, and the base's own for the other: float32 in another order.
    torch.testing.assert_close(found[1], found[0])
