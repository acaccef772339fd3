"""The loop that a Trainer is compared with: BLUR as anyone would write it by hand."""

import torch
from tiny import collate
from torch.nn.utils import clip_grad_norm_

from blur_optim import BLUR
from blur_optim.integrations.pairs import PairedDataset, PairSampler
from blur_optim.losses import (
    dpo_loss,
    ga_loss,
    kl_loss,
    logit_margin_loss,
    nll_loss,
    npo_loss,
    sequence_log_probs,
    simnpo_loss,
    token_counts,
)


def logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def log_probs(model, batch):
    return sequence_log_probs(logits(model, batch), batch["labels"])


def forget_loss(name, model, reference, batch, beta=0.1):
    if name == "ga":
        return ga_loss(logits(model, batch), batch["labels"])
    if name == "margin":
        return logit_margin_loss(logits(model, batch), batch["labels"])
    if name == "simnpo":
        return simnpo_loss(log_probs(model, batch), token_counts(batch["labels"]))
    if name == "npo":
        with torch.no_grad():
            expected = log_probs(reference, batch)
        return npo_loss(log_probs(model, batch), expected, beta)
    chosen, rejected = batch["chosen"], batch["rejected"]
    with torch.no_grad():
        expected = log_probs(reference, chosen), log_probs(reference, rejected)
    return dpo_loss(log_probs(model, chosen), log_probs(model, rejected), *expected, beta)


def retain_loss(name, model, reference, batch):
    if name == "nll":
        return nll_loss(logits(model, batch), batch["labels"])
    with torch.no_grad():
        expected = logits(reference, batch)
    return kl_loss(logits(model, batch), expected, batch["labels"])


def collate_forget(items):
    if "chosen" in items[0]:
        return {name: collate([item[name] for item in items]) for name in ("chosen", "rejected")}
    return collate(items)


def pairs_of_batches(forget, retain, size, seed, epochs):
    """The micro-batches of each epoch, as (forget, retain)."""
    dataset = PairedDataset(forget, retain)
    for epoch in range(epochs):
        indices = list(PairSampler(dataset, seed, lambda epoch=epoch: epoch))
        chunks = [indices[i : i + size] for i in range(0, len(indices), size)]
        yield [
            (collate_forget([forget[i] for i, _ in chunk]), collate([retain[j] for _, j in chunk])) for chunk in chunks
        ]


def train(
    model,
    reference,
    forget,
    retain,
    names=("npo", "nll"),
    *,
    steps,
    accumulate,
    max_norm,
    size=2,
    seed=42,
    lr=1e-3,
    epochs=9,
    **options,
):
    """Unlearn in place; return the last statistics."""
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.requires_grad and p.ndim < 2], "weight_decay": 0.0},
    ]
    opt = BLUR(groups, torch.optim.AdamW, lr=lr, **options)
    done = 0
    for batches in pairs_of_batches(forget, retain, size, seed, epochs):
        for i in range(0, len(batches), accumulate):
            micro = batches[i : i + accumulate]
            with opt.forget():
                for batch, _ in micro:
                    (forget_loss(names[0], model, reference, batch) / len(micro)).backward()
            with opt.retain():
                for _, batch in micro:
                    (retain_loss(names[1], model, reference, batch) / len(micro)).backward()
            clip_grad_norm_(model.parameters(), max_norm)
            opt.step()
            opt.zero_grad()
            done += 1
            if done == steps:
                return opt.statistics
    raise AssertionError("Not enough epochs for the steps.")
