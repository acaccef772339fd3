"""The processes: how they meet and how they part."""

import os
import signal
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from shared_lib.errors import BAD_INPUT, FAILED, InputError
from shared_lib.parting import part

from .options import restarts

INTERRUPTED = 130


def join(device: str | None) -> torch.device:
    """Meet the other processes that torchrun started, or be alone where it did not. Return this one's device."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"--device: cuda needs a GPU for each process of a machine, got {torch.cuda.device_count()} and "
                f"process {local_rank}, counted from 0. Use a smaller --nproc-per-node, or --device cpu."
            )
        torch.cuda.set_device(local_rank)
    # Both: tensors on the GPU meet over NCCL, and what checkpoints say about themselves over gloo.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ:
        store, rank, ranks = next(dist.rendezvous("env://"))
        # torchrun --max-restarts keeps its store, where gloo would find the addresses of the processes that have died.
        own = dist.PrefixStore(f"attempt-{restarts()}", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=ranks)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")


def run(main: Callable[[], None]) -> int:
    """Call ``main`` and return the exit code. Where an error is everybody's, the first process alone tells it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # torchrun sends it to the others when one has failed.
    try:
        main()
    except InputError as error:
        return _leave(f"Error: {error}", BAD_INPUT)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _leave(f"Error: {error.strerror or error}{where}.", FAILED)
    except KeyboardInterrupt:
        return _leave("Interrupted. Go on from the last checkpoint with --resume.", INTERRUPTED, wait=False)
    return part() if dist.is_initialized() else 0


def _leave(message: str, code: int, wait: bool = True) -> int:
    rank = int(os.environ.get("RANK", "0"))
    if rank and wait:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)  # If the first has the same to say, it has ended meanwhile, and torchrun ends this process.
    if wait or not rank:
        print(message if not rank else f"Process {rank}: {message}", file=sys.stderr, flush=True)
    return part(code) if dist.is_initialized() else code
