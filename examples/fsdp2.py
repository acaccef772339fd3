"""Let a causal language model of any size forget with BLUR, sharded by FSDP2.

    torchrun --nproc-per-node 8 examples/fsdp2.py --model NAME --forget forget.jsonl --retain retain.jsonl

What matters is `make_model` and `train`; each concept behind them has a small file in fsdp2_lib: sharding, weights,
data, losses, reference, training, checkpoint.
"""

if __name__ == "__main__":  # Before the slow imports: --help and wrong options are met at once.
    from fsdp2_lib.options import parse_options

    parse_options()

import argparse
import sys
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fsdp2_lib import checkpoint, reference
from fsdp2_lib.data import Example, micro_batches, read_examples, rows_of_step
from fsdp2_lib.logbook import Logbook, progress
from fsdp2_lib.losses import Reference, make_losses
from fsdp2_lib.options import parse_options
from fsdp2_lib.processes import join, run
from fsdp2_lib.sharding import Sharding, build_on_meta, materialise, shard
from fsdp2_lib.training import set_learning_rate, step
from fsdp2_lib.weights import export, find_model, load_config, load_tokenizer, load_weights
from shared_lib.errors import InputError
from shared_lib.models import quiet_transformers
from torch.distributed.device_mesh import init_device_mesh
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from blur_optim import BLUR


def make_model(
    config: PretrainedConfig, options: argparse.Namespace, device: torch.device, trained: bool
) -> PreTrainedModel:
    """Build the sharded model: its parameters have memory from the moment that they are shards."""
    compute = options.compute_dtype or ("bfloat16" if device.type == "cuda" else "float32")
    param = options.param_dtype if trained else compute
    sharding = Sharding(getattr(torch, param), getattr(torch, compute), not options.no_checkpointing, trained)
    model = build_on_meta(config, sharding)
    shard(model, init_device_mesh(device.type, (dist.get_world_size(),)), sharding)
    materialise(model, device)
    return model.train(trained)


def make_optimizer(model: PreTrainedModel, options: argparse.Namespace) -> BLUR:
    """BLUR takes the place of AdamW."""
    return BLUR(
        model.parameters(),
        torch.optim.AdamW,
        gamma=options.gamma,
        retain_weight=options.retain_weight,
        rule=options.rule,
        scope=options.scope,
        metric=options.metric,
        damping=options.damping,
        stash=options.stash,
        max_grad_norm=options.max_grad_norm,
        lr=options.lr,
        weight_decay=options.weight_decay,
        fused=True,
    )


def train(
    model: PreTrainedModel,
    optimizer: BLUR,
    compared: Reference | None,
    data: tuple[list[Example], list[Example]],
    options: argparse.Namespace,
    run_facts: dict[str, Any],
    first_step: int,
    log: Logbook,
) -> None:
    """Take the steps that are left, log and save."""
    losses = make_losses(model, compared, options)
    device, rank, ranks = next(model.parameters()).device, dist.get_rank(), dist.get_world_size()
    for number in range(first_step, options.steps):
        rows = [rows_of_step(len(examples), options.batch, number, options.seed) for examples in data]
        parts = tuple(
            micro_batches(examples, chosen, options.micro_batch, rank, ranks, device)
            for examples, chosen in zip(data, rows, strict=True)
        )
        set_learning_rate(optimizer, options.lr, number, options.warmup)
        values = step(model, optimizer, losses, parts, options.sync_each)
        log.advance(sum(len(examples[row].ids) for examples, chosen in zip(data, rows, strict=True) for row in chosen))
        taken, is_last = number + 1, number + 1 == options.steps
        if taken % options.log_every == 0 or is_last:
            log.write(taken, values, optimizer.statistics.to_dict(), optimizer.param_groups[0]["lr"])
        if is_last or (options.save_every and taken % options.save_every == 0):
            checkpoint.save(options.out, model, optimizer, taken, run_facts, options.keep)


def make_reference(
    model: PreTrainedModel,
    config: PretrainedConfig,
    source: Path,
    forget: list[Example],
    resumes: bool,
    options: argparse.Namespace,
) -> Reference | None:
    """Return what NPO compares with: the model before its first step, in one form or the other."""
    device = next(model.parameters()).device
    if options.forget_loss != "npo":
        return None
    if options.reference == "model":
        frozen = make_model(config, options, device, trained=False)
        load_weights(frozen, source, config, options.seed)
        return reference.of_frozen(frozen)
    path = options.out / reference.FILE_NAME
    if resumes:
        return reference.read_stored(path)
    show = partial(progress, title="reference")
    return reference.compute_and_store(path, model, forget, options.micro_batch, device, show)


def check(options: argparse.Namespace, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """See that the options go together.

    Raises:
        InputError: they don't.
    """
    ranks = dist.get_world_size()
    if options.batch % (options.micro_batch * ranks):
        raise InputError(
            f"--batch must be a multiple of --micro-batch times the number of processes, {options.micro_batch} x "
            f"{ranks}, got {options.batch}."
        )
    limit = getattr(config, "max_position_embeddings", None) or options.length
    if options.length > limit:
        raise InputError(f"--length must be at most {limit}, as many as the model can read, got {options.length}.")
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"--tokenizer must have at most the model's {config.vocab_size} tokens, got {len(tokenizer)}. Is it "
            "another model's?"
        )
    if not options.resume and checkpoint.latest(options.out):
        raise InputError(f"--out: {options.out} holds checkpoints of an earlier run. Use --resume, or another folder.")


def facts(options: argparse.Namespace, data: dict[str, list[Example]]) -> dict[str, Any]:
    """What the order of the data follows from: a resumed run has to agree with the run it resumes."""
    digests = {name: blake2b(repr(examples).encode(), digest_size=8).hexdigest() for name, examples in data.items()}
    return {"--batch": options.batch, "--seed": options.seed, **digests}


def main() -> None:
    """Load, forget, export."""
    options = parse_options()
    quiet_transformers()
    device = join(options.device)
    source = find_model(options.model)
    config, tokenizer = load_config(source), load_tokenizer(options.tokenizer or source)
    check(options, config, tokenizer)
    stored_dtype = config.dtype or torch.float32
    data = {
        "--forget": read_examples("--forget", options.forget, tokenizer, options.length),
        "--retain": read_examples("--retain", options.retain, tokenizer, options.length),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    latest = checkpoint.latest(options.out) if options.resume else None
    model = make_model(config, options, device, trained=True)
    origin = f"resumed from {latest}" if latest else load_weights(model, source, config, options.seed)
    optimizer = make_optimizer(model, options)
    compared = make_reference(model, config, source, data["--forget"], latest is not None, options)
    torch.manual_seed(options.seed + dist.get_rank())
    run_facts = facts(options, data)
    first_step = checkpoint.load(latest, model, optimizer, run_facts) if latest else 0
    log = Logbook(options.out / "log.jsonl", first_step, options.steps)
    log.say(
        f"{options.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters on "
        f"{dist.get_world_size()} x {device.type}, weights: {origin}; {len(data['--forget'])} lines to forget, "
        f"{len(data['--retain'])} to retain"
    )
    train(model, optimizer, compared, tuple(data.values()), options, run_facts, first_step, log)
    log.close()
    dtype = getattr(torch, options.export_dtype) if options.export_dtype else stored_dtype
    export(model, tokenizer, dtype, source, options.out / "model")
    log.say(f"Unlearned model: {options.out / 'model'}, numbers: {options.out / 'log.jsonl'}")


if __name__ == "__main__":
    sys.exit(run(main))
