"""What two processes run: BLURTrainer under DeepSpeed in each stage; the first saves what came out."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import collate, rows, tiny_llama

from blur_optim.integrations.deepspeed import DeepSpeedBLUR
from blur_optim.integrations.transformers import BLURTrainer, BLURTrainingArguments

#: By name: the stage, and more of ``zero_optimization``.
WAYS = {
    "zero-1": {"stage": 1},
    "zero-2": {"stage": 2},
    "zero-3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero-3-offload": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
}


def config(zero):
    """As in a file of its own: what the arguments say is left to them."""
    return {
        **dict.fromkeys(["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"], "auto"),
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "zero_optimization": {"reduce_bucket_size": 2000, **zero},
    }


def make_trainer(folder, deepspeed, **options):
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
        logging_steps=1,
        disable_tqdm=True,
        deepspeed=deepspeed,
        **options,
    )
    # Five rows: the processes have different numbers of batches for NPO's reference.
    return BLURTrainer(tiny_llama(), args, collate, forget_dataset=rows(5, 1), retain_dataset=rows(16, 2))


def whole(trainer):
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in trainer.model.named_parameters()}


def run(folder, zero, by_environment=False):
    settings = config(zero)
    if by_environment:  # As `accelerate launch --use_deepspeed --deepspeed_config_file` hands it over.
        path = folder / "deepspeed.json"
        path.write_text(json.dumps(settings))
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
        settings = None
    record = {"record": str(folder / "run.jsonl"), "record_alignment": True}
    trainer = make_trainer(folder, settings, save_strategy="steps", save_steps=2, **record)
    trainer.train()
    assert trainer.args.world_size == 2
    assert isinstance(trainer.blur, DeepSpeedBLUR)
    weights, steps = whole(trainer), trainer.blur.engine.global_steps
    trainer.accelerator.free_memory()
    again = make_trainer(folder, settings, save_strategy="no")
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert again.state.global_step == 3
    resumed = whole(again)
    again.accelerator.free_memory()
    if dist.get_rank() == 0:
        torch.save(weights, folder / "model.pt")
        result = {
            "logs": trainer.state.log_history,
            "resumed_to_the_bit": all(torch.equal(p, resumed[name]) for name, p in weights.items()),
            "stored": len(trainer.reference_log_probs),
            "engine_steps": steps,
        }
        (folder / "result.json").write_text(json.dumps(result))


def main(folder):
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # Or it compiles for a minute.
    for name, zero in WAYS.items():
        (folder / name).mkdir(exist_ok=True)
        run(folder / name, zero, by_environment=name == "zero-2")
    dist.barrier()
    os._exit(0)  # On a busy machine the ordinary end now and then meets a thread of the group, and aborts.


if __name__ == "__main__":
    main(Path(sys.argv[1]))
