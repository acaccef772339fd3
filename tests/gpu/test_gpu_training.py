"""Whole training steps on a GPU: no waiting for the device, streams, mixed precision, stashes, compilation, memory."""

import contextlib
import gc
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import backends, cuda_only, problem_on
from helpers import assert_params_close, assert_same_bits, calling_backward, run_phases, snapshot, step_by_closures
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam, AdamW

from blur_optim import BLUR

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw fused": (AdamW, {"fused": True}),
    "adam fused": (Adam, {"fused": True, "amsgrad": True}),
    "sgd fused": (SGD, {"fused": True, "momentum": 0.9}),
}
bases = pytest.mark.parametrize(("base", "options"), BASES.values(), ids=BASES)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the device is an error."""
    with warnings.catch_warnings():  # The first call says that it is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda_only
@backends
@bases
@pytest.mark.parametrize("way", ["closures", "phases"])
@pytest.mark.parametrize(
    "more", [{}, {"max_grad_norm": 0.5}, {"scope": "parameter"}, {"stash": "int8"}, {"metric": "retain"}], ids=str
)
def test_a_step_never_waits_for_the_device(
    backend: str, base: Any, options: dict[str, Any], way: str, more: dict[str, Any], device: torch.device
) -> None:
    """What docs/method.md says, for bases made with ``fused=True``; any other reads found_inf on the host."""
    problem = problem_on(device)
    opt = BLUR(problem.params, base, lr=0.01, backend=backend, **options, **more)

    def step() -> None:
        if way == "closures":
            opt.step(problem.forget_loss, problem.retain_loss)
        else:
            with opt.forget():
                problem.forget_loss().backward()
            with opt.retain():
                problem.retain_loss().backward()
            opt.step()
            opt.zero_grad()

    for _ in range(2):  # State is made and kernels are compiled.
        step()
    torch.cuda.synchronize()
    with no_waiting():
        for _ in range(3):
            step()


#: Of torch, where a parameter was used on one stream first and on another then: a wait, and no wrong number.
other_streams = pytest.mark.filterwarnings("ignore:.*AccumulateGrad node's stream:UserWarning")


@cuda_only
@other_streams
@backends
def test_a_step_on_another_stream(backend: str, device: torch.device) -> None:
    found = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        problem = problem_on(device)
        opt = BLUR(problem.params, AdamW, lr=0.01, backend=backend, fused=True)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                torch.cuda._sleep(1_000_000)
                step_by_closures(opt, problem)
        torch.cuda.current_stream().wait_stream(stream)
        found.append(snapshot(opt))
    assert_same_bits(*found)


@backends
@bases
def test_grad_scaler_skips_infinities_and_does_not_show(
    backend: str, base: Any, options: dict[str, Any], device: torch.device
) -> None:
    """float32 parameters and a scale that is a power of two, which rounds nothing; autocast is in the next test."""
    scaled, plain = problem_on(device), problem_on(device)
    opt = BLUR(scaled.params, base, lr=0.01, backend=backend, **options)
    twin = BLUR(plain.params, base, lr=0.01, backend=backend, **options)
    scaler = GradScaler(device.type, init_scale=2.0**12)
    for poison in (1.0, float("inf"), 1.0):
        before = snapshot(opt)
        with opt.forget():
            scaler.scale(scaled.forget_loss() * poison).backward()
        with opt.retain():
            scaler.scale(scaled.retain_loss()).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        if poison == 1.0:
            run_phases(twin, plain)
            twin.step()
            twin.zero_grad()
        else:
            assert_same_bits(snapshot(opt), before)
    assert_params_close(scaled.params, plain.params, rtol=1e-6, atol=1e-7)


class Dropped(nn.Module):
    """A network in which a second evaluation must draw the same dropout, under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.3), nn.Linear(256, 64), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


@backends
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_recompute_draws_the_same_dropout_under_autocast(
    backend: str, autocast: torch.dtype, device: torch.device
) -> None:
    if device.type == "cpu" and autocast is torch.float16:
        pytest.skip("a rehearsal on the CPU: without autocast to float16")
    found = []
    for stash in ("recompute", "reference"):
        torch.manual_seed(0)
        model = Dropped().to(device).train()
        opt = BLUR(model.parameters(), AdamW, lr=1e-3, stash=stash, backend=backend)
        inputs = torch.randn(2, 32, 64).to(device)

        def loss(x: Tensor, sign: float, model: nn.Module = model) -> Any:
            with torch.autocast(device.type, autocast):
                return sign * model(x).float().square().mean()

        for _ in range(3):
            torch.manual_seed(1)  # Whatever else has drawn numbers since.
            opt.step(lambda: loss(inputs[0], -1.0), lambda: loss(inputs[1], 1.0))  # noqa: B023
        found.append([p.detach() for p in model.parameters()])
    # They sum in other orders, in a low precision; the wrong dropout would be off by 1e-2.
    assert_params_close(found[0], found[1], rtol=2e-3, atol=2e-3)


@cuda_only
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # Which would be faster, and less exact.
@backends
@pytest.mark.parametrize("what", ["model", "step"])
def test_torch_compile(backend: str, what: str, device: torch.device) -> None:
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        problem = problem_on(device)
        opt = BLUR(problem.params, AdamW, lr=0.01, backend=backend, fused=True)
        if compiled and what == "model":
            problem.model = torch.compile(problem.model)  # type: ignore[assignment]
        step: Callable[[Any, Any], Any] = opt.step
        if compiled and what == "step":
            step = torch.compile(opt.step)
        for _ in range(3):
            step(problem.forget_loss, problem.retain_loss)
        found.append([p.detach() for p in problem.params])
    assert_params_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@cuda_only
@backends
@pytest.mark.parametrize("stash", ["reference", "int8", "cpu", "recompute"])
def test_memory_does_not_grow_over_200_steps(backend: str, stash: str, device: torch.device) -> None:
    problem = problem_on(device)
    opt = BLUR(problem.params, AdamW, lr=1e-3, backend=backend, stash=stash, fused=True)
    for _ in range(5):
        step_by_closures(opt, problem)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(200):
        step_by_closures(opt, problem)
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def wide(device: torch.device, size: int = 1024) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(size, size) for _ in range(8)]).to(device)
    return model, torch.randn(256, size, device=device)


@cuda_only
@backends
def test_a_stash_on_the_cpu_is_right_under_load(backend: str, device: torch.device) -> None:
    """The copies run beside the retain pass, while memory is freed and taken anew, and other streams are busy."""
    found = []
    for stash in ("reference", "cpu"):
        model, x = wide(device)
        opt = BLUR(model.parameters(), AdamW, lr=1e-4, backend=backend, stash=stash, fused=True)
        other, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device=device)
        for _ in range(10):
            with torch.cuda.stream(other):
                busy = (busy @ busy).clamp(-1, 1)
            opt.step(lambda: -model(x).square().mean(), lambda: model(x.flip(0)).sin().mean())  # noqa: B023
            torch.cuda.empty_cache()  # What is freed too early is gone, and not only unused.
        torch.cuda.synchronize()
        found.append([p.detach() for p in model.parameters()])
    assert_same_bits(*({str(i): p for i, p in enumerate(params)} for params in found))


@cuda_only
def test_a_stash_on_the_cpu_is_copied_beside_the_retain_pass(device: torch.device) -> None:
    """By a trace: copies to the host overlap in time with kernels."""
    model, x = wide(device, 2048)
    x = x.repeat(16, 1)  # Enough for the retain pass to last.
    opt = BLUR(model.parameters(), AdamW, lr=1e-4, stash="cpu", fused=True)

    def step() -> None:
        opt.step(lambda: -model(x).square().mean(), lambda: model(x.flip(0)).sin().mean())

    for _ in range(3):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        step()
        torch.cuda.synchronize()
    events = [e for e in trace.events() if e.device_type.name == "CUDA"]
    if not events:
        pytest.skip("the profiler sees nothing of the device: CUPTI may not be allowed here")
    copies = [e.time_range for e in events if "Memcpy DtoH" in e.name and e.time_range.elapsed_us() > 20]
    kernels = [e.time_range for e in events if "Memcpy" not in e.name and "Memset" not in e.name]
    assert copies, sorted({e.name for e in events})
    overlapping = [c for c in copies if any(k.start < c.end and c.start < k.end for k in kernels)]
    assert len(overlapping) >= len(copies) // 2, (len(overlapping), len(copies))


@cuda_only
@other_streams
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # Of what is refused before anything runs.
@pytest.mark.parametrize("name", ["native", "triton"])
@bases
def test_a_captured_step_equals_eager_or_is_refused_in_words(
    name: str, base: Any, options: dict[str, Any], device: torch.device
) -> None:
    from cases import kernels

    if reason := kernels(name).why_not(device):
        pytest.skip(f"{name}: {reason}")
    problems = [problem_on(device) for _ in range(2)]
    lr = torch.tensor(0.01, device=device)
    opts = [BLUR(p.params, base, lr=lr.clone(), backend=name, **options) for p in problems]

    def step(i: int) -> None:
        opts[i].step(calling_backward(problems[i].forget_loss), calling_backward(problems[i].retain_loss))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(0)
            step(1)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    refused = None
    try:
        with torch.cuda.graph(graph):
            step(0)
    except (RuntimeError, ValueError) as error:
        refused = str(error)
    if refused is not None:
        # In the library's words, not CUDA's: "operation not permitted when stream is capturing" helps nobody.
        assert re.match(r"This step cannot be captured in a CUDA graph: ", refused), refused
        return
    for _ in range(20):
        # What lies in pinned memory that a capture has let go of is overwritten.
        torch.full((1 << 16,), 0x5A, dtype=torch.int64).pin_memory()
        graph.replay()
        step(1)
    torch.cuda.synchronize()
    assert_params_close(problems[0].params, problems[1].params, rtol=1e-5, atol=1e-5)
