"""What two processes run under ``accelerate launch``; the first saves what came out."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import collate, rows, tiny_llama

from blur_optim.integrations.transformers import BLURTrainer, BLURTrainingArguments


def main(folder):
    torch.set_num_threads(1)
    args = BLURTrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=1e-3,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = BLURTrainer(tiny_llama(), args, collate, forget_dataset=rows(5, 1), retain_dataset=rows(16, 2))
    trainer.train()
    assert args.world_size == 2
    copies = [torch.empty(2) for _ in range(2)]
    mine = torch.stack([sum(p.double().sum() for p in trainer.model.parameters()).float(), torch.tensor(1.0)])
    dist.all_gather(copies, mine)
    assert torch.equal(copies[0], copies[1]), "the replicas have drifted"
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), folder / "model.pt")
        (folder / "logs.json").write_text(json.dumps(trainer.state.log_history))
        (folder / "stored.json").write_text(json.dumps(len(trainer.reference_log_probs)))
    dist.barrier()  # gloo aborts a rank that is still at work when another leaves.
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
