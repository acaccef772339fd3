"""What tests of the metric's kernels share: tensors of several sizes, each operation on copies, and the reference."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from blur_optim.kernels import reference
from blur_optim.kernels.blocks import BLOCK_SIZE, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (parameters and their state, retain gradients, forget gradients): of one dtype, 16 bits beside float32, compressed.
KINDS = [
    (param, grad, stash)
    for param, grad in [*((d, d) for d in DTYPES), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
    for stash in (grad, torch.bfloat16, torch.int8)
    if stash == grad or stash.itemsize < grad.itemsize
]
# Each of the types in each of the three places, for backends whose code does not depend on which stand together.
SOME_KINDS = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.int8),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16, torch.int8),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16),
    (torch.float64, torch.float64, torch.bfloat16),
]
# Error of an element that is written, relative to what it is made of: a few roundings in float32, one at the end.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Error of a sum over the product of the norms, or over itself where nothing cancels: a few roundings of each product in
# float32, those of an int8 element and its scale among them, and of short sums.
DOT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-7, torch.bfloat16: 4e-7, torch.float16: 4e-7}
OPERATIONS = ("dots", "blend", "adamw", "sgd")


class MetricCase:
    """Parameters, state and gradients of order 1, with one absent of every three pairs on either side; two rows."""

    def __init__(
        self,
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
        numels: Sequence[int],
        layout: Callable[[Tensor], Tensor] = lambda t: t,
        amsgrad: bool = False,
        absent: bool = True,
    ) -> None:
        param, grad, stash = dtypes
        generator = torch.Generator().manual_seed(0)

        def make(dtype: torch.dtype) -> list[Tensor]:
            return [layout(torch.randn(n, generator=generator).to(dtype)) for n in numels]

        self.params, self.exp_avgs, self.retain = make(param), make(param), make(grad)
        self.exp_avg_sqs, self.max_exp_avg_sqs = ([layout(t.abs()) for t in make(param)] for _ in range(2))
        self.max_exp_avg_sqs = self.max_exp_avg_sqs if amsgrad else []
        self.scales: list[Tensor] = []
        if stash == torch.int8:
            grads = [t * (1 + torch.arange(t.numel()) // BLOCK_SIZE % 5) for t in make(torch.float32)]
            values, self.scales = map(list, zip(*map(quantize, grads), strict=True))
            self.forget = [layout(t) for t in values]
        else:
            self.forget = make(stash)
        for i in range(len(numels) if absent else 0):
            if i % 3 == 1:
                self.forget[i] = self.forget[i].new_empty(0)
            elif i % 3 == 2 and stash == grad:
                self.retain[i] = self.retain[i].new_empty(0)
        self.rows = [0] * (len(numels) // 2) + [1] * (len(numels) - len(numels) // 2)
        self.coefficients = torch.tensor([[-1.3, 0.7], [0.4, 2.1]], dtype=torch.float64)
        self.metric = torch.tensor(
            [[0.9, 0.1, 1.0 + i % 4, 0.01 * (i % 3 + 1), 1e-3] for i in range(len(numels))], dtype=torch.float64
        )
        self.steps = torch.tensor([3.0 + i for i in range(len(numels))])
        self.lr = torch.tensor(0.01, dtype=torch.float64)
        self.amsgrad = amsgrad

    def wide(self) -> "MetricCase":
        """The same in float64; compressed gradients as they are."""
        other = MetricCase.__new__(MetricCase)
        other.__dict__.update(self.__dict__)
        for name in ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "retain"):
            setattr(other, name, [t.double() for t in getattr(self, name)])
        if not self.scales:
            other.forget = [t.double() for t in self.forget]
        return other

    def to(self, device: torch.device) -> "MetricCase":
        """The same elsewhere."""
        other = MetricCase.__new__(MetricCase)
        for name, value in self.__dict__.items():
            if isinstance(value, Tensor):
                value = value.to(device)
            elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                value = [t.to(device) for t in value]
            setattr(other, name, value)
        return other

    def run(
        self, kernels: Any, operation: str, copied: Callable[[list[Tensor]], list[Tensor]], **o: Any
    ) -> list[Tensor]:
        """What an operation returns, or leaves in what it writes; on copies."""
        p, m, v, largest, f, r = (
            copied(t)
            for t in (self.params, self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs, self.forget, self.retain)
        )
        found_inf = o.pop("found_inf", None)
        if operation == "dots":
            return [kernels.multi_tensor_metric_dots(f, r, v, largest, self.rows, 2, self.metric, self.scales)]
        if operation == "blend":
            weights = self.coefficients, self.rows, self.metric, found_inf
            kernels.multi_tensor_metric_blend_(r, f, v, *weights, self.scales)
            return [*(x if x.numel() and not y.numel() else y for x, y in zip(f, r, strict=True)), *v]
        options = {"weight_decay": 0.1, "maximize": False, "found_inf": found_inf, "scales": self.scales}
        if operation == "adamw":
            options |= {"beta1": 0.9, "amsgrad": self.amsgrad, "decoupled": True} | o
            gradients = f, r, self.rows, self.coefficients, self.steps, self.lr, self.metric
            kernels.metric_adamw_(p, m, v, largest, *gradients, **options)
            return [*p, *m, *v, *largest]
        options |= {"momentum": 0.9, "dampening": 0.1, "nesterov": False, "first_step": False} | o
        buffers = m if options["momentum"] else []
        if options["first_step"]:
            buffers = [torch.full_like(t, torch.nan) for t in buffers]  # Whatever new memory holds.
        kernels.metric_sgd_(p, buffers, v, f, r, self.rows, self.coefficients, self.lr, self.metric, **options)
        return [*p, *buffers, *v]

    def assert_close(self, actual: list[Tensor], operation: str, **options: Any) -> None:
        """Against the reference on float64 copies of everything."""
        actual = [t.cpu() for t in actual]
        here = self.to(torch.device("cpu")).wide()
        expected = here.run(reference, operation, lambda tensors: [t.clone() for t in tensors], **options)
        dtype = self.params[0].dtype
        if operation == "dots":
            assert_dots_close(actual[0], expected[0], DOT_TOLERANCE[dtype])
            return
        for a, e in zip(actual, expected, strict=True):
            assert ((a.double() - e).abs() <= TOLERANCE[a.dtype] * (e.abs() + 4)).all()


def assert_dots_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.dtype == torch.float64
    assert actual.shape == expected.shape
    size = expected.clone()
    size[:, 0] = (expected[:, 1] * expected[:, 2]).sqrt()
    size[:, 3] = (expected[:, 4] * expected[:, 5]).sqrt()
    assert ((actual - expected).abs() <= tolerance * size).all(), ((actual - expected).abs() / size).max()
