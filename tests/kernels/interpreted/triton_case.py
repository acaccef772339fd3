"""What the tests in Triton's interpreter share: gradients, parameters with their state, tolerances."""

import torch
from torch import optim

from blur_optim.kernels import reference, triton
from blur_optim.kernels.blocks import BLOCK_SIZE, quantize

CHUNK, BLOCK = 32768, 2048  # Of the device code.
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Retain gradients with the forget gradients that may be stashed beside them.
COMPRESSED = [
    (dtype, stash) for dtype in DTYPES for stash in (torch.bfloat16, torch.int8) if stash.itemsize < dtype.itemsize
]

# Error of a dot over the product of the norms: as in test_backends.py.
DOT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-7, torch.bfloat16: 1e-7, torch.float16: 1e-7}
# Error of a result, relative and absolute, where inputs and results are of order 1. float32 rounds a few times, the
# 16-bit types once, at the end; the interpreter truncates to bfloat16, where the compiled kernel rounds to nearest.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}

SHAPES = {
    "0-d": [()],
    "0-elements": [(0,)],
    "1-element": [(1,)],
    "small-and-empty": [(7,), (4, 0), (3, 5), (), (1, 1, 2)],
    "around-a-block": [(BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (BLOCK // 2 + 1,)],
    "around-a-chunk": [(CHUNK + BLOCK + 3,), (CHUNK,), (5,)],
    "20-tensors": [(9,)] * 20,
}
AROUND_SCALES = [(BLOCK_SIZE - 1,), (BLOCK_SIZE,), (BLOCK_SIZE + 1,), (2 * BLOCK_SIZE, 3), (CHUNK + BLOCK_SIZE + 1,)]
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "every-second-element": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


def make(shapes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def make_stashed(shapes, stash, seed):
    """Compressed forget gradients and their scales: in each block of another size."""
    grads = make(shapes, torch.float32, seed)
    if stash is not torch.int8:
        return [t.to(stash) for t in grads], []
    grads = [t * (1 + torch.arange(t.numel()).view(t.shape) // BLOCK_SIZE % 5) for t in grads]
    return map(list, zip(*map(quantize, grads), strict=True))


def clones(tensors):
    return [t.clone(memory_format=torch.preserve_format) for t in tensors]


def table(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def assert_dots_close(actual, expected, dtype, rounding=0.0):
    assert actual.dtype == torch.float64
    assert actual.shape == expected.shape
    forget, retain = expected[:, 1].sqrt(), expected[:, 2].sqrt()
    scale = torch.stack([forget * retain, forget**2, retain**2], dim=1)
    assert ((actual - expected).abs() <= (DOT_TOLERANCE[dtype] + rounding) * scale).all()


def assert_close(actual, expected, dtype):
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.dtype == dtype
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance, msg=lambda text, i=i: f"{i}: {text}")


# Parameters with their gradients: of their own dtype, or 16-bit beside float32.
DTYPE_PAIRS = [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
# The same with a compressed forget gradient beside each retain gradient that it may stand beside.
STASHES = [(dtype, grad, stash) for dtype, grad in DTYPE_PAIRS for other, stash in COMPRESSED if other == grad]
FUSED_SHAPES = [(5,), (BLOCK + 52,), (0,), (3, 4), (CHUNK + BLOCK + 1,)]
COEFFICIENTS, ROWS = table([-1.3, 0.7], [0.4, 2.0]), [0, 0, 1, 1, 1]
# eps is large enough to be seen, the decay too.
ADAM = {"beta1": 0.8, "beta2": 0.9, "weight_decay": 0.5, "eps": 0.1}
SGD = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.5, "nesterov": False}


class Case:
    """Parameters, both gradients and state of order 1; in float64 with the update of ``a f + b r`` beside them."""

    def __init__(self, dtype=torch.float32, grad_dtype=torch.float32, shapes=FUSED_SHAPES, stash=None):
        self.rows = ROWS[: len(shapes)]
        self.params = make(shapes, dtype, 0)
        self.forget, self.scales = make_stashed(shapes, stash, 1) if stash else (make(shapes, grad_dtype, 1), [])
        self.retain = make(shapes, grad_dtype, 2)
        self.state = {name: make(shapes, dtype, seed) for seed, name in enumerate(("m", "v", "vmax"), start=3)}
        for name in ("v", "vmax"):
            self.state[name] = [t.abs() for t in self.state[name]]
        self.dtype = dtype

    def wide(self):
        """Double copies: the parameters with u as their gradients, and each one's state."""
        params = [p.to(torch.float64, copy=True).requires_grad_() for p in self.params]
        forget = reference._in_float64(self.forget, self.scales)
        for p, f, r, row in zip(params, forget, self.retain, self.rows, strict=True):
            a, b = COEFFICIENTS[row]
            terms = [weight * grad.double() for weight, grad in ((a, f), (b, r)) if grad.numel() or not p.numel()]
            p.grad = sum(terms)
        copies = {name: [t.to(torch.float64, copy=True) for t in tensors] for name, tensors in self.state.items()}
        return params, [{name: tensors[i] for name, tensors in copies.items()} for i in range(len(params))]


def adam(
    case, steps=(1, 2, 7, 50, 3000), *, amsgrad=False, maximize=False, decoupled=True, found_inf=None, lr=0.1, **o
):
    triton.fused_adamw_(
        case.params,
        case.state["m"],
        case.state["v"],
        case.state["vmax"] if amsgrad else [],
        case.forget,
        case.retain,
        case.rows,
        COEFFICIENTS,
        torch.tensor(steps[: len(case.params)], dtype=torch.float32),
        torch.tensor(lr, dtype=torch.float64),
        amsgrad=amsgrad,
        maximize=maximize,
        decoupled=decoupled,
        found_inf=found_inf,
        scales=case.scales,
        **{**ADAM, **o},
    )


def torch_adam(case, steps=(1, 2, 7, 50, 3000), *, amsgrad=False, maximize=False, decoupled=True, lr=0.1, **o):
    """The same by torch's own optimizer, in float64."""
    params, states = case.wide()
    o = {**ADAM, **o}
    betas = (o.pop("beta1"), o.pop("beta2"))
    cls = optim.AdamW if decoupled else optim.Adam
    opt = cls(params, lr=lr, betas=betas, amsgrad=amsgrad, maximize=maximize, foreach=False, **o)
    for p, state, step in zip(params, states, steps, strict=False):
        opt.state[p] = {"step": torch.tensor(step - 1.0), "exp_avg": state["m"], "exp_avg_sq": state["v"]}
        if amsgrad:
            opt.state[p]["max_exp_avg_sq"] = state["vmax"]
    opt.step()
    return [p.detach() for p in params], {name: [s[name] for s in states] for name in ("m", "v", "vmax")}


def sgd(case, *, first_step=False, maximize=False, found_inf=None, lr=0.1, **options):
    options = {**SGD, **options}
    triton.fused_sgd_(
        case.params,
        case.state["m"] if options["momentum"] else [],
        case.forget,
        case.retain,
        case.rows,
        COEFFICIENTS,
        torch.tensor(lr, dtype=torch.float64),
        maximize=maximize,
        first_step=first_step,
        found_inf=found_inf,
        scales=case.scales,
        **options,
    )


def torch_sgd(case, *, first_step=False, lr=0.1, **options):
    params, states = case.wide()
    opt = optim.SGD(params, lr=lr, foreach=False, **{**SGD, **options})
    for p, state in zip(params, states, strict=True):
        if not first_step:
            opt.state[p] = {"momentum_buffer": state["m"]}
    opt.step()
    buffers = [opt.state[p].get("momentum_buffer", state["m"]) for p, state in zip(params, states, strict=True)]
    return [p.detach() for p in params], {"m": buffers}


def assert_case_close(case, expected):
    params, state = expected
    assert_close(case.params, params, case.dtype)
    for name, tensors in state.items():
        assert_close(case.state[name], tensors, case.dtype)


ADAM_CASES = {
    "adamw": {},
    "adam": {"decoupled": False},
    "no-decay": {"weight_decay": 0.0},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "adam-amsgrad-maximize": {"decoupled": False, "amsgrad": True, "maximize": True},
    "no-first-moment": {"beta1": 0.0},
}
SGD_CASES = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "maximize": {"momentum": 0.9, "maximize": True},
    "no-decay": {"weight_decay": 0.0},
    "first-step": {"momentum": 0.9, "dampening": 0.3, "first_step": True},
    "nesterov-first-step": {"momentum": 0.9, "nesterov": True, "first_step": True},
}
SMALL = FUSED_SHAPES[:4]
