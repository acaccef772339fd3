"""The operations that kernel_bench times: a problem, every candidate on it, and how wrong each may be."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from baselines import original_combine, original_dots, original_update, plain_blend_, plain_dots, torch_dots
from harness import Candidate
from torch import Tensor

from blur_optim.kernels import Backend, FusedBackend, reference
from blur_optim.kernels.blocks import BLOCK_SIZE, dequantize, empty_compressed, quantize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GAMMA = 1.0
SGD = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.01, "nesterov": False, "maximize": False}
HYPERPARAMETERS = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8}


class Problem:
    """float32 parameters with AdamW state, and two gradient sets of ``dtype``, one compressed as ``stash`` says."""

    def __init__(
        self, tensors: int, elements: int, dtype: torch.dtype, device: torch.device, stash: str | None = None
    ) -> None:
        def fresh() -> list[Tensor]:
            return [torch.randn(elements, device=device) for _ in range(tensors)]

        self.count, self.numel, self.dtype, self.device = tensors, tensors * elements, dtype, device
        self.params = [torch.nn.Parameter(t) for t in fresh()]
        self.forget = [t.to(dtype) for t in fresh()]
        self.retain = [t.to(dtype) for t in fresh()]
        self.rows = [0] * tensors
        self.scales: list[Tensor] = []
        if stash == "int8":
            self.forget, self.scales = map(list, zip(*map(quantize, self.forget), strict=True))
        elif stash:
            self.forget = [t.to(getattr(torch, stash)) for t in self.forget]
        self.adamw = torch.optim.AdamW(self.params, lr=1e-5, fused=True)
        self.set_grads([torch.randn_like(p) for p in self.params])
        self.adamw.step()
        self.steps = torch.full((tensors,), 2.0, device=device)
        self.lr = torch.full((), 1e-5, dtype=torch.float64, device=device)
        self.coefficients = torch.tensor([[0.3, 1.0]], dtype=torch.float64, device=device)

    @property
    def pair_bytes(self) -> int:
        """One pass over both gradients."""
        return sum(t.nbytes for tensors in (self.forget, self.retain, self.scales) for t in tensors)

    @property
    def is_plain(self) -> bool:
        """Whether the forget gradients are not compressed, so that others than the backends can read them."""
        return self.forget[0].dtype == self.dtype

    @property
    def grad_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def first_forget(self, n: int | None = None) -> Tensor:
        """The beginning of the first forget gradient, in float64."""
        values = self.forget[0][:n]
        if not self.scales:
            return values.double()
        return dequantize(values, self.scales[0][: -(-len(values) // BLOCK_SIZE)], torch.float64)

    @property
    def state_bytes(self) -> int:
        """One pass over parameters and both moments."""
        return 3 * 4 * self.numel

    def set_grads(self, grads: Sequence[Tensor]) -> None:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g.to(p.dtype)

    def state(self, name: str) -> list[Tensor]:
        return [self.adamw.state[p][name] for p in self.params]

    def dots(self, kernels: Backend) -> Tensor:
        return kernels.multi_tensor_dots(self.forget, self.retain, self.rows, 1, self.scales)

    def blend_(self, kernels: Backend) -> None:
        kernels.multi_tensor_blend_(self.retain, self.forget, self.coefficients, self.rows, self.scales)

    def fused_(self, kernels: Backend, coefficients: Tensor | None = None) -> None:
        kernels.fused_adamw_(
            [p.detach() for p in self.params],
            self.state("exp_avg"),
            self.state("exp_avg_sq"),
            [],
            self.forget,
            self.retain,
            self.rows,
            self.coefficients if coefficients is None else coefficients,
            self.steps,
            self.lr,
            amsgrad=False,
            maximize=False,
            decoupled=True,
            found_inf=None,
            scales=self.scales,
            **HYPERPARAMETERS,
        )

    def sgd_(self, kernels: FusedBackend) -> None:
        """With momentum, whose buffer is AdamW's first moment: a buffer is a buffer."""
        lists = [p.detach() for p in self.params], self.state("exp_avg"), self.forget, self.retain
        kernels.fused_sgd_(
            *lists, self.rows, self.coefficients, self.lr, found_inf=None, first_step=False, scales=self.scales, **SGD
        )

    def whole_(self, kernels: Backend) -> None:
        dots = self.dots(kernels)
        xi = GAMMA - dots[:, 0] / dots[:, 1]
        coefficients = torch.stack([xi, torch.ones_like(xi)], dim=1)
        if hasattr(kernels, "fused_adamw_"):
            self.fused_(kernels, coefficients)
        else:
            kernels.multi_tensor_blend_(self.retain, self.forget, coefficients, self.rows, self.scales)
            self.set_grads(self.retain)
            self.adamw.step()

    def original_(self) -> None:
        self.set_grads(original_update(self.forget, self.retain, GAMMA))
        self.adamw.step()


def dot_error(problem: Problem, run: Callable[[], Tensor]) -> float:
    expected = problem.dots(cast(Backend, reference))[0]
    actual = run().to(expected)[0, : len(expected)]
    scale = torch.stack([(expected[1] * expected[2]).sqrt(), expected[1], expected[2]])
    return float(((actual - expected).abs() / scale).max())


def blend_error(problem: Problem, run: Callable[[], None]) -> float:
    """Relative to |a f| + |b r|, over the first tensor; the gradients are put back."""
    a, b = problem.coefficients[0]
    kept = [r.clone() for r in problem.retain]
    run()
    terms = a * problem.first_forget(), b * kept[0].double()
    error = ((problem.retain[0].double() - sum(terms)).abs() / (terms[0].abs() + terms[1].abs())).max()
    for r, k in zip(problem.retain, kept, strict=True):
        r.copy_(k)
    return float(error)


def adamw_error(problem: Problem, kernels: FusedBackend) -> float:
    """Of one parameter tensor after a step, against AdamW in float64, relative to the step's largest element."""
    n = min(problem.forget[0].numel(), 10_000)
    a, b = problem.coefficients[0]
    p, m, v = (
        t[0].detach()[:n].clone() for t in (problem.params, problem.state("exp_avg"), problem.state("exp_avg_sq"))
    )
    f, r = problem.forget[0][:n], problem.retain[0][:n]
    exact = torch.nn.Parameter(p.double())
    optimizer = torch.optim.AdamW([exact], lr=float(problem.lr), weight_decay=HYPERPARAMETERS["weight_decay"])
    step = torch.tensor(float(problem.steps[0]) - 1)
    optimizer.state[exact] = {"step": step, "exp_avg": m.double(), "exp_avg_sq": v.double()}
    exact.grad = a * problem.first_forget(n) + b * r.double()
    optimizer.step()
    before = p.double()
    lists = [[t] for t in (p, m, v)]
    steps, options = problem.steps[:1], {**HYPERPARAMETERS, "amsgrad": False, "maximize": False, "decoupled": True}
    scales = [problem.scales[0][: -(-n // BLOCK_SIZE)]] if problem.scales else []
    gradients = [f], [r], [0], problem.coefficients
    kernels.fused_adamw_(*lists, [], *gradients, steps, problem.lr, **options, found_inf=None, scales=scales)
    return float((p.double() - exact.detach()).abs().max() / (exact.detach() - before).abs().max())


def sgd_error(problem: Problem, kernels: FusedBackend) -> float:
    """Of one parameter tensor after a step of SGD, as :func:`adamw_error`."""
    n = min(problem.forget[0].numel(), 10_000)
    a, b = problem.coefficients[0]
    p, buffer = problem.params[0].detach()[:n].clone(), problem.state("exp_avg")[0][:n].clone()
    decayed = a * problem.first_forget(n) + b * problem.retain[0][:n].double() + SGD["weight_decay"] * p.double()
    expected = -problem.lr * (SGD["momentum"] * buffer.double() + decayed)
    before = p.double()
    scales = [problem.scales[0][: -(-n // BLOCK_SIZE)]] if problem.scales else []
    gradients = [problem.forget[0][:n]], [problem.retain[0][:n]], [0], problem.coefficients, problem.lr
    kernels.fused_sgd_([p], [buffer], *gradients, found_inf=None, first_step=False, scales=scales, **SGD)
    return float((p.double() - before - expected).abs().max() / expected.abs().max())


Backends = dict[str, Backend]


def check(candidates: Sequence[Candidate], error: Callable[[Candidate], float], most: float) -> None:
    """Note the error of each candidate; a wrong one raises here, before anything is timed."""
    for candidate in candidates:
        candidate.error = error(candidate)
        if not candidate.error <= most:
            raise AssertionError(f"{candidate.name} is wrong: error {candidate.error}")


def dots(problem: Problem, backends: Backends, compiled: bool) -> list[Candidate]:
    plain, both = problem.is_plain, problem.pair_bytes
    found = [Candidate(name, lambda k=k: problem.dots(k), both) for name, k in backends.items()]
    check(found, lambda c: dot_error(problem, c.run), 1e-6)
    others = []
    if plain:
        others.append(Candidate("torch.dot x 3", lambda: torch_dots(problem.forget, problem.retain), both))
    if plain and compiled:
        run = torch.compile(plain_dots)
        others.append(Candidate("torch.compile", lambda: run(problem.forget, problem.retain), both))
    for candidate in others:  # Theirs is told, not held against them.
        candidate.error = dot_error(problem, candidate.run)
    if plain:
        others.append(Candidate("original code", lambda: original_dots(problem.forget, problem.retain), both))
    return found + others


def blend(problem: Problem, backends: Backends, compiled: bool) -> list[Candidate]:
    nbytes = problem.pair_bytes + problem.grad_bytes
    found = [Candidate(name, lambda k=k: problem.blend_(k), nbytes) for name, k in backends.items()]
    if problem.is_plain and compiled:
        run = torch.compile(plain_blend_)
        lists = problem.retain, problem.forget, problem.coefficients
        found.append(Candidate("torch.compile", lambda: run(*lists), nbytes))
    check(found, lambda c: blend_error(problem, c.run), 2 * torch.finfo(problem.dtype).eps)
    if problem.is_plain:
        original = Candidate("original code", lambda: original_combine(problem.forget, problem.retain, 0.3), nbytes)
        found.append(original)
    return found


def adamw(problem: Problem, backends: Backends, compiled: bool) -> list[Candidate]:
    nbytes = problem.pair_bytes + 2 * problem.state_bytes
    fused = {name: k for name, k in backends.items() if hasattr(k, "fused_adamw_")}
    found = [Candidate(name, lambda k=k: problem.fused_(k), nbytes) for name, k in fused.items()]
    # Beside float32 parameters of size 4 a step of 1e-5 is rounded to a few hundredths of itself.
    check(found, lambda c: adamw_error(problem, fused[c.name]), 5e-2)
    return found


def sgd(problem: Problem, backends: Backends, compiled: bool) -> list[Candidate]:
    nbytes = problem.pair_bytes + 4 * problem.state_bytes // 3  # Parameters and one buffer, read and written.
    fused = {name: k for name, k in backends.items() if hasattr(k, "fused_sgd_")}
    found = [Candidate(name, lambda k=k: problem.sgd_(k), nbytes) for name, k in fused.items()]
    check(found, lambda c: sgd_error(problem, fused[c.name]), 5e-2)
    return found


def compress(stash: torch.dtype, problem: Problem, backends: Backends, compiled: bool) -> list[Candidate]:
    """The retain gradients, compressed as the forget gradients would be. Every backend has the bits of the others."""
    if stash.itemsize >= problem.dtype.itemsize:
        return []
    lists = empty_compressed(problem.retain, stash)
    nbytes = problem.grad_bytes + sum(t.nbytes for tensors in lists for t in tensors)
    found = [
        Candidate(name, lambda k=k: k.multi_tensor_compress_(*lists, problem.retain), nbytes)
        for name, k in backends.items()
    ]
    check(found, lambda c: compress_error(problem, lists, c.run), 0.0)
    return found


def compress_error(problem: Problem, lists: tuple[list[Tensor], list[Tensor]], run: Callable[[], object]) -> float:
    """Elements of the first tensor that are not PyTorch's."""
    run()
    values, scales = lists
    if not scales:
        return float((values[0] != problem.retain[0].to(values[0].dtype)).sum())
    wanted, wanted_scales = quantize(problem.retain[0])
    return float((values[0] != wanted).sum() + (scales[0] != wanted_scales).sum())


def whole_update(problem: Problem, backends: Backends, compiled: bool) -> list[Candidate]:
    nbytes = 2 * problem.pair_bytes + 2 * problem.state_bytes
    found = [Candidate(name, lambda k=k: problem.whole_(k), nbytes) for name, k in backends.items()]
    return found + [Candidate("original code", problem.original_)] * problem.is_plain


#: What is timed: by name, candidates that are checked against the reference. A new operation is a line here.
OPERATIONS: dict[str, Callable[[Problem, Backends, bool], list[Candidate]]] = {
    "dots": dots,
    "blend": blend,
    "AdamW on two gradients": adamw,
    "SGD on two gradients": sgd,
    "whole update": whole_update,
    "compress to int8": partial(compress, torch.int8),
    "compress to bfloat16": partial(compress, torch.bfloat16),
}
