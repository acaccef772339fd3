"""Llamas of the sizes that people unlearn, and adapters on them, built and wrapped by the code of examples/fsdp2.py."""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import LlamaConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from fsdp2_lib.sharding import Sharding, build_on_meta, materialise, shard

_COMMON = {"use_cache": False, "max_position_embeddings": 131072}
#: The shapes of Llama 3.2 1B, Llama 2 7B and 13B, Llama 3 70B; and one that trains in a moment.
CONFIGS = {
    "tiny": LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8192,
        **_COMMON,
    ),
    "1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
        **_COMMON,
    ),
    "7b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
        **_COMMON,
    ),
    "13b": LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        vocab_size=32000,
        **_COMMON,
    ),
    "70b": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        **_COMMON,
    ),
}
LORA_RANK = 16


@dataclass(frozen=True)
class Case:
    """One line of the result.

    Args:
        method: of :data:`scale_methods.METHODS`.
        lora: train adapters alone, on all linear layers; the rest is frozen, in ``compute_dtype``.
        batch, length: sequences of each kind that a rank computes in one step, and their tokens.
    """

    model: str
    ranks: int
    method: str
    lora: bool = False
    batch: int = 1
    length: int = 2048
    compute_dtype: str = "bfloat16"


def build(case: Case, mesh: DeviceMesh) -> PreTrainedModel:
    """Build and shard the model; parameters that are trained are float32."""
    compute = getattr(torch, case.compute_dtype)
    sharding = Sharding(compute if case.lora else torch.float32, compute)
    model = build_on_meta(CONFIGS[case.model], sharding)
    if case.lora:
        _add_adapters(model)
    shard(model, mesh, sharding)
    materialise(model, torch.device(mesh.device_type))
    return model.train()


def _add_adapters(model: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        # peft asks transformers for an attribute that is on its way out.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=LORA_RANK, target_modules=r".*layers.*(q|k|v|o|gate|up|down)_proj")
        with torch.device("meta"):
            inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
