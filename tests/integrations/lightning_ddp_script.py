"""What two processes of Lightning's DDP run; the first saves what came out."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from hand_written import pairs_of_batches
from test_lightning import Unlearn, fit
from tiny import rows, tiny_llama


def main(folder):
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    (batches,) = pairs_of_batches(rows(5, 1), rows(16, 2), 2, 42, 1)
    steps = [[batches[i + rank], batches[i + 2 + rank]] for i in (0, 4)]
    module = Unlearn(tiny_llama(), max_grad_norm=0.5)
    fit(module, folder, steps, devices=2, strategy="ddp", use_distributed_sampler=False)
    if rank == 0:
        torch.save(module.model.state_dict(), folder / "model.pt")
    dist.barrier()  # gloo aborts a rank that is still at work when another leaves.
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
