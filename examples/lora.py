"""Make a LoRA adapter forget an author: BLURTrainer on a PEFT model.

    pip install '.[examples,transformers]' peft
    python examples/lora.py

A small Llama learns five fictitious authors. Then an adapter is trained to forget the last. The model itself stays as
it is: NPO and KL compare with it, and it knows everything again as soon as the adapter is off. --model takes a causal
LM that was fine-tuned on these rows before.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from quickstart_lib.data import load_rows
from shared_lib.encoding import IGNORE_INDEX, Example, batches_in_order, encode_rows
from shared_lib.models import SMALL_LLAMA, build_tokenizer, load_model, load_tokenizer, quiet_transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from blur_optim.integrations.transformers import BLURTrainer, BLURTrainingArguments
from blur_optim.losses import sequence_log_probs, token_counts

AUTHORS, ROWS_PER_AUTHOR = 5, 20
QUIET = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}


def as_items(examples: list[Example]) -> list[dict[str, list[int]]]:
    """Rows as a Trainer's data set has them."""
    return [
        {
            "input_ids": prompt + answer,
            "attention_mask": [1] * len(prompt + answer),
            "labels": [IGNORE_INDEX] * len(prompt) + answer,
        }
        for prompt, answer in examples
    ]


def collate(items: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
    width = max(len(item["input_ids"]) for item in items)
    return {
        name: torch.tensor([item[name] + [value] * (width - len(item[name])) for item in items])
        for name, value in fill.items()
    }


@torch.no_grad()
def probability(model: torch.nn.Module, examples: list[Example]) -> float:
    """The mean probability per token of the right answers."""
    model.eval()
    means = []
    for batch in batches_in_order(examples, 16, next(model.parameters()).device):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        means.append((sequence_log_probs(logits, batch["labels"]) / token_counts(batch["labels"])).exp())
    return torch.cat(means).mean().item()


def learn(examples: list[Example], vocabulary: int, epochs: int, out: Path) -> torch.nn.Module:
    """Train a small Llama until it knows the rows."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **SMALL_LLAMA))
    args = TrainingArguments(
        str(out), per_device_train_batch_size=16, num_train_epochs=epochs, learning_rate=3e-3, logging_steps=50, **QUIET
    )
    Trainer(model, args, data_collator=collate, train_dataset=as_items(examples)).train()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a model of the hub; without one, a small Llama learns the rows")
    parser.add_argument("--out", type=Path, default=Path("lora-out"))
    parser.add_argument("--epochs", type=int, default=40, help="of learning")
    parser.add_argument("--steps", type=int, default=40, help="of forgetting")
    options = parser.parse_args()
    quiet_transformers()

    rows = load_rows(None, AUTHORS, seed=0)
    tokenizer = load_tokenizer(options.model) if options.model else build_tokenizer(rows)
    examples = encode_rows(tokenizer, rows)
    retain, forget = examples[:-ROWS_PER_AUTHOR], examples[-ROWS_PER_AUTHOR:]
    base = (
        load_model(options.model, "cpu")
        if options.model
        else learn(examples, len(tokenizer), options.epochs, options.out)
    )

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    known = probability(model, forget), probability(model, retain)
    args = BLURTrainingArguments(
        str(options.out),
        forget_loss="npo",
        retain_loss="kl",
        gamma=1.0,
        learning_rate=2e-3,
        per_device_train_batch_size=8,
        max_steps=options.steps,
        logging_steps=10,
        **QUIET,
    )
    trainer = BLURTrainer(
        model, args, data_collator=collate, forget_dataset=as_items(forget), retain_dataset=as_items(retain)
    )
    trainer.train()
    model.save_pretrained(options.out / "adapter")

    print("\nprobability of the right answer   forget  retain")
    print(f"before                            {known[0]:6.2f}  {known[1]:6.2f}")
    print(f"with the adapter                  {probability(model, forget):6.2f}  {probability(model, retain):6.2f}")
    with model.disable_adapter():
        print(f"adapter off                       {probability(model, forget):6.2f}  {probability(model, retain):6.2f}")
    merged = model.merge_and_unload()
    print(f"merged                            {probability(merged, forget):6.2f}  {probability(merged, retain):6.2f}")
    merged.save_pretrained(options.out / "merged")
    print(f"\nThe adapter and the merged model are in {options.out}.")


if __name__ == "__main__":
    main()
