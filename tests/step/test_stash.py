"""Where the forget gradients wait: memory, exactness, and the stated error of what is compressed."""

import gc

import pytest
import torch
from helpers import (
    Problem,
    assert_params_close,
    assert_same_bits,
    backends,
    calling_backward,
    snapshot,
    step_by_closures,
    step_by_phases,
    step_on,
    storages_of_grads,
    watch,
)
from torch import nn
from torch.optim import SGD, AdamW

from blur_optim import BLUR
from blur_optim.kernels.blocks import BLOCK_SIZE
from blur_optim.step import pairs as paired
from blur_optim.step.stash import STASHES, BFloat16Stash, HostStash, Int8Stash, Stash, Stashed

COMPRESSED = ["bfloat16", "int8"]


def heavy_tailed(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator) * torch.randn(n, generator=generator).exp()


def gradients_with_cosine(cosine, n=200_000):
    """Two gradients of equal norm, heavy-tailed: what a stash has to keep."""
    forget, noise = heavy_tailed(n, 0).double(), heavy_tailed(n, 1).double()
    noise -= (noise @ forget) / (forget @ forget) * forget
    retain = cosine * forget + (1 - cosine**2) ** 0.5 * noise * forget.norm() / noise.norm()
    return forget.float(), retain.float()


def keep(stash, p, grad):
    """What ``stash`` keeps of a gradient."""
    stash.take([p], [grad])
    return stash.get(p)


def project_by(stash, forget, retain, **options):
    p = nn.Parameter(torch.zeros_like(forget))
    opt = BLUR([p], SGD, lr=1.0, stash=stash, **options)
    with opt.forget():
        p.grad = forget.clone()
    with opt.retain():
        p.grad = retain.clone()
    return p.grad, opt.statistics


@pytest.mark.parametrize("cosine", [-0.23, 0.9, 1e-3])
@pytest.mark.parametrize("stash", COMPRESSED)
def test_the_error_of_compression_is_as_stated(stash, cosine):
    forget, retain = gradients_with_cosine(cosine)
    exact, exact_statistics = project_by("reference", forget, retain)
    update, statistics = project_by(stash, forget, retain)
    # The rounding errors of n elements are independent: in the dots they add up like the root of n.
    coefficient, exact_coefficient = statistics.forget_coefficient, exact_statistics.forget_coefficient
    assert (coefficient - exact_coefficient).abs() < {"bfloat16": 2e-5, "int8": 5e-4}[stash]
    # The error of u is that of a * g_f. Heavy tails are the hard case for blocks.
    error = (update - exact).norm() / (exact_coefficient.abs() * forget.norm())
    limit = {"bfloat16": 2.5e-3, "int8": 2.5e-2}[stash]
    assert limit / 10 < error < limit  # Below it, nothing was compressed.


@pytest.mark.parametrize("stash", COMPRESSED)
def test_forgetting_comes_first_for_the_gradient_that_was_kept(stash):
    """<g_f, u> = gamma |g_f|^2 holds to rounding with the g_f that the step used, however much it was rounded."""
    forget, retain = gradients_with_cosine(-0.5)
    update, statistics = project_by(stash, forget, retain, gamma=0.3)
    kept = keep(STASHES[stash](), nn.Parameter(forget), forget).restore(forget)
    assert not torch.equal(kept, forget)
    kept, update = kept.double(), update.double()
    torch.testing.assert_close(kept @ update, 0.3 * kept @ kept, rtol=1e-5, atol=0)
    torch.testing.assert_close(statistics.forget_norm, kept.norm(), rtol=1e-6, atol=0)


@backends
@pytest.mark.parametrize("stash", STASHES)
@pytest.mark.parametrize("base", [AdamW, SGD], ids=lambda base: base.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_stash_takes_the_step_of_the_reference_up_to_its_error(stash, base, dtype, backend):
    problems = Problem(dtype), Problem(dtype)
    opts = [
        BLUR(problem.params, base, lr=0.05, stash=name, backend=backend)
        for problem, name in zip(problems, (stash, "reference"), strict=True)
    ]
    for _ in range(3):
        for opt, problem in zip(opts, problems, strict=True):
            step_by_closures(opt, problem)
    tolerance = 2e-2 if stash in COMPRESSED or dtype == torch.bfloat16 else 1e-5 if dtype == torch.float32 else 1e-12
    assert_params_close(problems[0].params, problems[1].params, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stash", sorted(set(STASHES) - {"recompute"}))
def test_phases_and_closures_agree(stash):
    problems = Problem(), Problem()
    for problem, step in zip(problems, (step_by_closures, step_by_phases), strict=True):
        opt = BLUR(problem.params, AdamW, lr=0.1, stash=stash, backend="foreach")
        for _ in range(2):
            step(opt, problem, parts=3)
    assert all(torch.equal(a, b) for a, b in zip(problems[0].params, problems[1].params, strict=True))


@pytest.mark.parametrize(
    ("stash", "dtype", "bytes_per_element"),
    [
        (Stash, torch.float32, 4),
        (BFloat16Stash, torch.float32, 2),
        (BFloat16Stash, torch.float64, 2),
        (BFloat16Stash, torch.bfloat16, 2),
        (BFloat16Stash, torch.float16, 2),
        (Int8Stash, torch.float32, 1 + 4 / BLOCK_SIZE),
        (Int8Stash, torch.bfloat16, 1 + 4 / BLOCK_SIZE),
        (HostStash, torch.float32, 4),  # Of a parameter on the CPU: kept by reference.
    ],
)
def test_bytes(stash, dtype, bytes_per_element):
    p = nn.Parameter(torch.zeros(64, 256, dtype=dtype))
    p.grad = torch.randn(64, 256).to(dtype)
    kept = keep(stash(), p, p.grad)
    used = kept.values.nbytes + (0 if kept.scales is None else kept.scales.nbytes)
    assert used == bytes_per_element * p.numel()


@pytest.mark.parametrize("stash", ["bfloat16", "int8"])
def test_gradients_are_compressed_one_after_another(stash):
    """At no time do a gradient set and its compressed copy both exist as a whole."""
    params = [nn.Parameter(torch.zeros(1000)) for _ in range(8)]
    for p in params:
        p.grad = torch.randn(1000)
    storages = storages_of_grads(params)
    kept = STASHES[stash]()
    alive = []
    keep = kept.keep
    kept.keep = lambda *args: (alive.append(sum(not s.expired() for s in storages)), keep(*args))
    kept.piece_bytes = 1000  # Less than a gradient has: one at a time.
    kept.take(params)
    gc.collect()
    assert alive == [8, 7, 6, 5, 4, 3, 2, 1]
    assert all(s.expired() for s in storages)


@backends
@pytest.mark.parametrize("stash", ["bfloat16", "int8"])
def test_the_full_forget_gradients_are_gone_in_the_retain_phase(stash, backend):
    problem, seen = Problem(torch.float32), []
    opt = BLUR(problem.params, AdamW, lr=0.1, stash=stash, backend=backend)

    def on_call(name, part):
        if name == "retain":
            seen.append([storage.expired() for storage in forget_storages])

    forget = calling_backward(problem.forget_loss)
    forget_storages = []

    def watched_forget():
        loss = forget()
        forget_storages.extend(storages_of_grads(problem.params))
        return loss

    watch(problem, on_call)
    opt.step(watched_forget, calling_backward(problem.retain_loss))
    assert seen == [[True] * 4]


@pytest.mark.parametrize("stash", STASHES)
def test_an_exception_in_the_retain_closure_loses_nothing(stash):
    problem = Problem()
    opt = BLUR(problem.params, AdamW, lr=0.1, stash=stash)
    step_by_closures(opt, problem)
    before = snapshot(opt)

    def failing():
        problem.retain_loss().backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opt.step(problem.forget_loss, failing)
    assert_same_bits(snapshot(opt), before)
    assert len(opt._two_phase.stash) == 0
    assert all(p.grad is None for p in problem.params)
    step_by_closures(opt, problem)


@backends
@pytest.mark.parametrize("stash", STASHES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["forget", "retain"])
def test_a_gradient_that_is_not_finite_skips_the_step(stash, bad, where, backend):
    problem = Problem(torch.float32)
    opt = BLUR(problem.params, AdamW, lr=0.1, stash=stash, backend=backend)
    step_by_closures(opt, problem)
    before = snapshot(opt)
    scales = {"forget": 1.0, "retain": 1.0, where: bad}
    opt.step(lambda: problem.forget_loss() * scales["forget"], lambda: problem.retain_loss() * scales["retain"])
    assert_same_bits(snapshot(opt), before)
    assert opt.statistics.skipped == 1
    step_by_closures(opt, problem)
    assert opt.statistics.skipped == 1


class Partial(nn.Module):
    """``a`` is in both losses, ``b`` in the forget loss alone, ``c`` in the retain loss alone, ``d`` in neither."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Parameter(torch.randn(300)) for _ in range(4))

    def forget(self):
        return ((self.a * self.b).sum() - 1).square()

    def retain(self):
        return (self.a.sin() * self.c).sum()


@backends
@pytest.mark.parametrize("stash", STASHES)
@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_parameters_with_one_gradient_or_none(stash, scope, backend):
    models = Partial(), Partial()
    for model, name in zip(models, (stash, "reference"), strict=True):
        opt = BLUR(model.parameters(), SGD, lr=0.1, stash=name, scope=scope, backend=backend)
        opt.step(model.forget, model.retain)
    tolerance = {"bfloat16": 1e-2, "int8": 5e-2}.get(stash, 1e-6)
    assert_params_close(models[0].parameters(), models[1].parameters(), rtol=tolerance, atol=tolerance)
    assert torch.equal(models[0].d, Partial().d)


@pytest.mark.parametrize("stash", COMPRESSED)
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "expanded"])
def test_gradients_of_unusual_layout(stash, layout):
    p = nn.Parameter(torch.zeros(2, 6, 4, 50))

    def arranged(seed):
        grad = torch.randn(2, 6, 4, 50, generator=torch.Generator().manual_seed(seed))
        if layout == "expanded":
            return grad[..., :1].expand(2, 6, 4, 50)
        memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        return grad.to(memory_format=memory) if layout != "transposed" else grad.mT.contiguous().mT

    updates = []
    for name in (stash, "reference"):
        opt = BLUR([p], SGD, lr=1.0, stash=name)
        with opt.forget():
            p.grad = arranged(0)
        with opt.retain():
            p.grad = arranged(1)
        updates.append(p.grad.clone())
        opt.zero_grad()
    torch.testing.assert_close(*updates, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("stash", COMPRESSED)
def test_complex_parameters(stash):
    updates = []
    for name in (stash, "reference"):
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(20, 30, dtype=torch.complex64))
        q = nn.Parameter(torch.zeros(4, dtype=torch.complex64))  # With a forget gradient alone.
        opt = BLUR([p, q], SGD, lr=1.0, stash=name)
        with opt.forget():
            p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
        with opt.retain():
            p.grad = torch.randn_like(p)
        updates.append([p.grad, q.grad])
    torch.testing.assert_close(*updates, rtol=2e-2, atol=3e-2)


def test_compressed_gradients_reach_the_fused_update_as_they_are(monkeypatch):
    """No decompressed copy: the kernels get int8 and scales."""
    from blur_optim.kernels import native

    if native.why_not(torch.device("cpu")):
        pytest.skip(native.why_not(torch.device("cpu")))
    seen = []
    fused_adamw_ = native.fused_adamw_
    monkeypatch.setattr(
        native, "fused_adamw_", lambda *args, **kw: (seen.append((args[4], kw["scales"])), fused_adamw_(*args, **kw))
    )
    problem = Problem(torch.float32)
    step_by_closures(BLUR(problem.params, AdamW, lr=0.1, stash="int8", backend="native"), problem)
    ((forget, scales),) = seen
    assert {f.dtype for f in forget} == {torch.int8}
    assert [s.numel() for s in scales] == [1] * len(problem.params)


# -- Forget gradients on another device, which here only pretends to be one ---------------------------------------


def test_pieces_come_back_by_size(monkeypatch):
    """Runs the pieces of HostStash on the CPU: a pair counts as away while its forget gradient is on 'meta'."""
    monkeypatch.setattr(paired, "PIECE_BYTES", 1000)
    sizes = (100, 100, 100, 1000, 10, 10)
    forget, retain = [torch.empty(n, device="meta") for n in sizes], [torch.empty(n) for n in sizes]
    pairs = paired.Pairs(retain, forget, retain, [0] * 6, list(range(6)), [0] * 6)
    sizes = []
    move = torch.Tensor.to

    def to(t, device, **kwargs):
        assert kwargs == {"non_blocking": True}
        return torch.zeros(t.shape) if t.is_meta else move(t, device)

    monkeypatch.setattr(torch.Tensor, "to", to)
    for piece in paired._pieces(pairs):
        assert all(f.device.type == "cpu" for f in piece.forget)
        sizes.append([f.numel() for f in piece.forget])
    assert [n for size in sizes for n in size] == [100, 100, 100, 1000, 10, 10]
    assert len(sizes) == 3
    assert max(4 * sum(size[:-1]) for size in sizes) <= 1000


def test_host_stash_copies_what_is_on_another_device(monkeypatch):
    """Not run on a GPU: the streams are stand-ins, the order of their calls is what this sees."""
    calls = []

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            calls.append("wait")

        def __enter__(self):
            calls.append("enter")

        def __exit__(self, *exc):
            calls.append("exit")

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

        def record_stream(self, stream):
            calls.append("record")

    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.accelerator, "current_stream", Stream)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, device, pin_memory: empty_like(torch.Tensor(t), device=device))
    grad = torch.randn(5).as_subclass(OnGpu)
    stash = HostStash()
    kept = keep(stash, nn.Parameter(torch.zeros(5)), grad)
    assert calls == ["wait", "enter", "exit", "record"]
    assert torch.equal(kept.values, grad.as_subclass(torch.Tensor))
    stash.settle()
    assert calls[-1] == "wait"


def test_a_gradient_that_waits_elsewhere_comes_back_to_its_parameter():
    p = nn.Parameter(torch.zeros(5, device="meta"))
    assert Stashed(torch.ones(5), None, torch.float32).restore(p).device == p.device


def test_a_plain_step_after_a_compressed_one():
    problem, twin = Problem(), Problem()
    opt, bare = BLUR(problem.params, SGD, lr=0.1, stash="int8"), SGD(twin.params, lr=0.1)
    step_by_closures(opt, problem)
    for p, q in zip(problem.params, twin.params, strict=True):
        q.data.copy_(p.data)
    with pytest.warns(UserWarning, match=r"opt.step\(\) had no phases before it: SGD stepped on what was in p.grad"):
        step_on(opt, problem.params, torch.autograd.grad(problem.forget_loss(), problem.params))
    step_on(bare, twin.params, torch.autograd.grad(twin.forget_loss(), twin.params))
    assert_params_close(problem.params, twin.params, rtol=0, atol=0)
