"""A small network with two losses, trained on one process or on many, and how far apart the two end up."""

import functools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from blur_optim import BLUR

ROWS, LENGTH, VOCABULARY, WIDTH, INNER = 8, 4, 8, 6, 10
STEPS = 3
#: float64: the sums are added in another order, and AdamW divides by the size of the gradient.
EXACT = 1e-12


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).tanh())


class Network(nn.Module):
    """Sizes that 2 and 4 ranks do not divide evenly; ``gain`` and ``head`` leave ranks with an empty shard."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.gain


def make_network(dtype=torch.float64):
    torch.manual_seed(1)
    network = Network().double()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return network.to(dtype)


def make_tokens():
    return torch.randint(VOCABULARY, (2, ROWS, LENGTH), generator=torch.Generator().manual_seed(2))


class Losses:
    """Both losses on this rank's rows; the mean over ``ranks`` is the loss on all rows."""

    def __init__(self, model, rank=0, ranks=1, parts=1):
        self.model, self.rank, self.ranks, self.parts = model, rank, ranks, parts
        self.forget_rows, self.retain_rows = (tokens.chunk(ranks)[rank].chunk(parts) for tokens in make_tokens())

    def forget(self, part=0):
        return self._scaled(self.model(self.forget_rows[part]).square())

    def retain(self, part=0):
        values = self.model(self.retain_rows[part])
        return self._scaled(values.sin() + values)

    def _scaled(self, values):
        if isinstance(values, DTensor):
            values = values.full_tensor()
        return values.sum() * (self.ranks / ROWS)


def sharded(dtype=torch.float64, shape=None, **options):
    """The network under ``fully_shard``, over all ranks; over a mesh of ``shape``, if given, as HSDP."""
    network = make_network(dtype)
    shape = shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for block in network.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(network, mesh=mesh, **options)


def own_losses(network, parts=1):
    return Losses(network, dist.get_rank(), dist.get_world_size(), parts)


def make_opt(params, **options):
    options = {"base": AdamW, "lr": 0.02, "weight_decay": 0.1, **options}
    return BLUR(params, **options)


def by_phases(opt, losses, synced=lambda last: None):
    """One step; ``synced(last)`` is called before each micro-batch with whether it is the last of its phase."""
    for phase, loss in ((opt.forget, losses.forget), (opt.retain, losses.retain)):
        with phase():
            for part in range(losses.parts):
                synced(part == losses.parts - 1)
                loss(part).backward()
    opt.step()
    opt.zero_grad()


def by_closures(opt, losses, synced=lambda last: None):
    def closure(loss):
        for part in range(losses.parts):
            synced(part == losses.parts - 1)
            loss(part).backward()

    opt.step(lambda: closure(losses.forget), lambda: closure(losses.retain))


def train(opt, losses, step, steps=STEPS, **step_options):
    """The statistics of every step, and afterwards all parameters whole."""
    seen = []
    for _ in range(steps):
        step(opt, losses, **step_options)
        s = opt.statistics
        xi = s.forget_coefficient
        seen.append(torch.stack([s.forget_norm, s.retain_norm, s.dot_retain_forget, s.update_norm, xi.sum(), xi.max()]))
    params = [whole(p) for group in opt.param_groups for p in group["params"]]
    return torch.stack(seen), params


def whole(t):
    t = t.detach()
    return t.full_tensor() if isinstance(t, DTensor) else t.clone()


@functools.cache
def on_one_process(step=by_phases, dtype=torch.float64, **options):
    network = make_network(dtype)
    return train(make_opt(network.parameters(), **options), Losses(network), step)


def largest_error(actual, expected):
    """Over dots, coefficients, norms and parameters, relative to 1 or to the value, whichever is larger."""
    (seen, params), (expected_seen, expected_params) = actual, expected
    pairs = [(seen, expected_seen), *zip(params, expected_params, strict=True)]
    return max(
        float(((a.double() - e.double()).abs() / e.double().abs().clamp(min=1)).max()) for a, e in pairs if a.numel()
    )


def assert_close(actual, expected, tolerance=EXACT):
    error = largest_error(actual, expected)
    assert error <= tolerance, f"the largest error is {error:.1e}, allowed are {tolerance:.0e}"
    return error


def assert_same_on_all_ranks(tensors):
    for i, t in enumerate(tensors):
        copies = [torch.empty_like(t) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, t.contiguous())
        assert all(torch.equal(copy, copies[0]) for copy in copies), f"tensor {i} differs between ranks"


def everything(opt):
    params = [p for group in opt.param_groups for p in group["params"]]
    return [whole(t) for p in params for t in (p, *opt.state[p].values())]
