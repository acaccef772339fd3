"""A small network under an engine of DeepSpeed, and the same steps by BLUR in one float64 process."""

import os
import shutil
import tempfile
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from blur_optim import BLUR

STEPS, MICRO_BATCHES, RANKS, LR, WEIGHT_DECAY = 2, 2, 2, 1e-2, 0.01
WIDTH, VOCABULARY = 7, 11
MICRO = {"forget": MICRO_BATCHES, "retain": MICRO_BATCHES}


STAGES = [0, 1, 2, 3]
#: float32: its rounding, and that of AdamW, which divides by the size of the gradient.
FLOAT32 = 1e-6


class Network(nn.Module):
    """Odd sizes, tied weights, a frozen layer, and for each of the losses a layer that it alone reaches."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.up = nn.Linear(WIDTH, 13)
        self.frozen = nn.Linear(13, 13).requires_grad_(False)
        self.down = nn.Linear(13, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.forget_only, self.retain_only = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 5)
        self.gain = nn.Parameter(torch.ones(1))  # Of one element: some ranks have none of it.

    def forward(self, tokens, side):
        hidden = self.embed(tokens)
        hidden = hidden + self.down(self.frozen(self.up(hidden).tanh()).tanh()) * self.gain
        logits = self.head(hidden)
        nll = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.roll(1, -1).flatten())
        if side == "forget":
            return 0.3 * self.forget_only(hidden).float().square().mean() - nn.functional.softplus(2 - nll)
        return 0.2 * self.retain_only(hidden).float().square().mean() + nll


class Float64(Network):
    """The same without the rounding to float32 in between."""

    def forward(self, tokens, side):
        original, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double
        try:
            return super().forward(tokens, side)
        finally:
            torch.Tensor.float = original


def make_network(cls=Network):
    torch.manual_seed(0)
    return cls()


def groups_of(network):
    """Two param groups: matrices, and the rest."""
    params = [p for p in network.parameters() if p.requires_grad]
    return [{"params": [p for p in params if p.dim() > 1]}, {"params": [p for p in params if p.dim() <= 1]}]


def tokens(step, side, rank, micro):
    """Of another length on each rank."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * (side == "retain") + 10 * rank + micro)
    return torch.randint(VOCABULARY, (3, 5 + rank), generator=generator)


def config(stage, dtype=None, *, accumulate=None, offload=False, clip=0.0, micro_batches=1, **zero):
    """Of an engine; ``zero`` goes to ``zero_optimization``."""
    made = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": clip,
        "steps_per_print": 10**9,
        # Several buckets even here, and several of ZeRO-3's groups; it would keep small parameters whole.
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 300, "overlap_comm": False},
    }
    if stage == 3:
        made["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 150}
        made["zero_optimization"] |= {"stage3_prefetch_bucket_size": 100}
    made["zero_optimization"] |= zero
    if dtype:
        made[dtype] = {"enabled": True}
    if accumulate:
        made["data_types"] = {"grad_accum_dtype": accumulate}
    if offload:
        made["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return made


def make_engine(settings, network=None, optimizer=torch.optim.AdamW, groups=groups_of, **options):
    """An engine over the two processes of this test."""
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(RANKS)}
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # Or it compiles for a minute.
    network = make_network() if network is None else network
    client = optimizer(groups(network), **{"lr": LR, "weight_decay": WEIGHT_DECAY, **options})
    return deepspeed.initialize(model=network, optimizer=client, config=settings)[0]


def make_opt(engine, **options):
    from blur_optim.integrations.deepspeed import DeepSpeedBLUR

    return DeepSpeedBLUR(engine, **options)


def train(opt, engine, steps=range(STEPS), micro=MICRO, times=1.0):
    """Steps of the engine; what each saw.

    Args:
        micro: the number of micro-batches by side.
        times: factor of the losses.
    """
    seen = []
    for step in steps:
        for side, phase in (("forget", opt.forget), ("retain", opt.retain)):
            with phase():
                for i in range(micro[side]):
                    backward(engine, step, side, i, times)
        opt.step()
        seen.append(numbers(opt.statistics))
        opt.zero_grad()  # With an engine there is nothing left.
    return seen


def backward(engine, step, side, micro=0, times=1.0):
    batch = tokens(step, side, dist.get_rank(), micro)
    engine.backward(engine(batch, side) * (times / MICRO_BATCHES), scale_wrt_gas=False)


def without_weights(base):
    """A base optimizer without the hyperparameters that a BLUR has left on it, for another BLUR."""
    for owner in (base.defaults, *base.param_groups):
        for name in ("gamma", "retain_weight"):
            owner.pop(name, None)
    return base


def numbers(statistics):
    return {k: v for k, v in statistics.to_dict().items() if k != "skipped"}


_known = {}


def on_one_process(*args, **options):
    """What :func:`run_on_one_process` gives, computed once."""
    key = repr((args, sorted(options.items())))
    if key not in _known:
        _known[key] = run_on_one_process(*args, **options)
    return _known[key]


def run_on_one_process(
    steps=range(STEPS), micro=MICRO, *, low=None, skip=(), clip=None, warm=False, sequence=(), **options
):
    """The same steps on all ranks' data, in float64 without an engine.

    Args:
        micro: the number of micro-batches by side; a list where it differs from step to step.
        low: the type in which forward and backward run, beside float64 parameters, as under mixed precision.
        skip: steps that are not taken.
        sequence: the options of each step, where they differ.
        warm: spend Adam's first step on zero gradients, as ZeRO-0 does for bfloat16.
    """
    network = make_network(Float64).double()
    worker = network
    if low is not None:
        worker = make_network().to(low)
        network.load_state_dict(worker.state_dict())
    base = torch.optim.AdamW(groups_of(network), lr=LR, weight_decay=WEIGHT_DECAY)
    trained = [p for p in network.parameters() if p.requires_grad]
    if warm:
        for p in trained:
            p.grad = torch.zeros_like(p)
        base.step()
        base.zero_grad()
    opt = None if sequence else BLUR(base=base, **options)
    seen = []
    for step in steps:
        opt = BLUR(base=without_weights(base), **sequence[step]) if sequence else opt
        for side, phase in (("forget", opt.forget), ("retain", opt.retain)):
            with phase():
                for p in trained:  # To DeepSpeed, no gradient is a gradient of zero.
                    p.grad = torch.zeros_like(p)
                for rank in range(RANKS):
                    for i in range((micro if isinstance(micro, dict) else micro[step])[side]):
                        (worker(tokens(step, side, rank, i), side) / MICRO_BATCHES).backward()
                        if low is not None:
                            _move_gradients(worker, network)
                for p in trained:
                    p.grad /= RANKS
        seen.append(numbers(opt.statistics))
        if clip:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        if step not in skip:
            opt.step()
        opt.zero_grad()
        if low is not None:
            worker.load_state_dict(network.state_dict())
    return seen, dict(network.named_parameters())


def _move_gradients(worker, network):
    for mine, p in zip(worker.parameters(), network.parameters(), strict=True):
        if mine.grad is not None:
            p.grad += mine.grad
            mine.grad = None


def masters(engine):
    """The float32 parameters that the optimizer steps on, whole, by name."""
    from deepspeed.utils import safe_get_full_fp32_param

    def whole(p):
        if hasattr(p, "ds_id") or hasattr(p, "_hp_mapping"):
            return safe_get_full_fp32_param(p)
        low = getattr(engine.optimizer, "fp16_groups", ())
        for group, copies in zip(low, getattr(engine.optimizer, "fp32_groups", ()), strict=True):
            for mine, copy in zip(group, copies, strict=True):
                if mine is p:
                    return copy
        return p

    return {name: whole(p).detach().clone() for name, p in engine.module.named_parameters() if p.requires_grad}


def largest_errors(seen, engine, expected):
    """Of norms, cosine and the update's parts, each relative to what it is made of; of the parameters, absolute."""
    expected_seen, params = expected
    dots = max(map(_error, seen, expected_seen))
    return dots, max(float((p.double() - params[name].detach()).abs().max()) for name, p in masters(engine).items())


def _error(actual, expected):
    f, r, u = (expected[name] for name in ("forget_norm", "retain_norm", "update_norm"))
    errors = [actual[name] / expected[name] - 1 for name in ("forget_norm", "retain_norm")]
    errors += [actual["cosine"] - expected["cosine"], (actual["update_norm"] - u) / (f + r)]
    for name, norm in (("forget_coefficient", f), ("retain_coefficient", r)):
        a, e = (x[name] if isinstance(x[name], list) else [x[name]] for x in (actual, expected))
        errors += [(x - y) * norm / (f + r) for x, y in zip(a, e, strict=True)]
    return max(map(abs, errors))


@contextmanager
def shared_folder():
    """The same new folder for all ranks."""
    path = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(path)
    try:
        yield path[0]
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(path[0])
