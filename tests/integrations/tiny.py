"""What the tests of this folder train: a tiny Llama on random tokens."""

import torch

VOCABULARY = 29


def tiny_llama(seed=0, **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **config}))


def tiny_lora(seed=0, fresh=False):
    """The same with a LoRA adapter that is not zero, so that all of it has a gradient from the first step; a fresh one
    is, and the model with it still that without it."""
    from peft import LoraConfig, get_peft_model

    model = tiny_llama(seed)
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", lora_dropout=0.0
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():  # B starts at zero, which would make the gradient of A zero too.
        for name, p in adapted.named_parameters():
            if "lora_B" in name and not fresh:
                p.normal_(std=0.02)
    return adapted


def rows(count, seed):
    """Rows as a tokenized data set has them: lists of different lengths, the prompt's labels -100."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        size = int(torch.randint(5, 10, (), generator=generator))
        ids = torch.randint(1, VOCABULARY, (size,), generator=generator).tolist()
        made.append({"input_ids": ids, "attention_mask": [1] * size, "labels": [-100, -100, *ids[2:]]})
    return made


def collate(items):
    """Pad on the right, as any collator for language models does."""
    width = max(len(item["input_ids"]) for item in items)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([item[name] + [value] * (width - len(item[name])) for item in items])
        for name, value in fill.items()
    }


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]
