"""What two processes run, for DDP or FSDP2; the first saves what came out."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from tiny import collate, rows, tiny_llama, tiny_lora
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from blur_optim.integrations.transformers import BLURTrainer, BLURTrainingArguments

FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "state_dict_type": "SHARDED_STATE_DICT",
}


def let_fsdp_run_on_a_cpu():
    """accelerate has FSDP on accelerators only, though nothing in it needs one: let it take the CPU for one."""
    initialize = PartialState.__init__

    def pretend(state, *args, **kwargs):
        initialize(state, *args, **kwargs)
        if state.distributed_type is DistributedType.MULTI_CPU:
            state._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = pretend
    os.environ["FSDP_VERSION"] = "2"  # transformers 4.57 takes it from accelerate's launcher alone.


def make_trainer(folder, model, **options):
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
        **{"save_strategy": "no", **options},
    )
    return BLURTrainer(model, args, collate, forget_dataset=rows(5, 1), retain_dataset=rows(16, 2))


def accelerate_block(accumulate=2):
    """The loop with accelerate in docs/integrations.md, in the order of the rows."""
    from test_integrations_docs import blocks

    code = blocks("integrations")[-1]
    for own, here in (("shuffle=True", "shuffle=False"), ("accumulate = 2", f"accumulate = {accumulate}")):
        assert own in code
        code = code.replace(own, here)
    return code


def whole(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def save(weights, path):
    if dist.get_rank() == 0:
        torch.save(weights, path)


def main(folder, way):
    torch.set_num_threads(1)
    options = {}
    if way == "fsdp":
        let_fsdp_run_on_a_cpu()
        options = {"fsdp": True, "fsdp_config": FSDP, "save_strategy": "steps", "save_steps": 2}
        if os.environ["RANK"] == "1":  # As on a machine with a disk of its own, where nothing is written.
            options["reference_file"] = str(folder / "elsewhere" / "reference.safetensors")
        options |= {"record": str(folder / "run.jsonl"), "record_alignment": True}
    trainer = make_trainer(folder, tiny_llama(), **options)
    trainer.train()
    assert trainer.args.world_size == 2
    weights = whole(trainer.model)
    if way == "fsdp":
        assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
        again = make_trainer(folder, tiny_llama(), **options)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert again.state.global_step == 3
        assert again.reference_log_probs.computed == 0
        for p, q in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(p.to_local(), q.to_local())
        adapted = make_trainer(folder / "lora", tiny_lora(fresh=True), retain_loss="kl", fsdp=True, fsdp_config=FSDP)
        adapted.train()
        save(whole(adapted.model), folder / "lora.pt")
        by_hand = {"model": tiny_llama(), "collator": collate, "forget_rows": rows(16, 1), "retain_rows": rows(16, 2)}
        exec(accelerate_block(), by_hand)
        assert all(isinstance(p, DTensor) for p in by_hand["model"].parameters())
        save(whole(by_hand["model"]), folder / "accelerate.pt")
        in_metric = make_trainer(
            folder / "metric", tiny_llama(), metric="retain", gamma=0.3, fsdp=True, fsdp_config=FSDP
        )
        in_metric.train()
        save(whole(in_metric.model), folder / "metric.pt")
    else:
        copies = [torch.empty(2) for _ in range(2)]
        mine = torch.stack([sum(p.double().sum() for p in trainer.model.parameters()).float(), torch.tensor(1.0)])
        dist.all_gather(copies, mine)
        assert torch.equal(copies[0], copies[1]), "the replicas have drifted"
    save(weights, folder / "model.pt")
    if trainer.is_world_process_zero():
        (folder / "logs.json").write_text(json.dumps(trainer.state.log_history))
        (folder / "stored.json").write_text(json.dumps(len(trainer.reference_log_probs)))
    dist.barrier()  # gloo aborts a rank that is still at work when another leaves.
    dist.destroy_process_group()
    os._exit(0)  # On a busy machine the ordinary end now and then meets a thread of the group, and aborts.


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
