"""From a configuration to a sharded model: parameters without memory, fully_shard, then memory for the shards alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Sharding:
    """How a model is held.

    Args:
        param_dtype: of the shards, and with them of gradients and optimizer state.
        compute_dtype: of the gathered parameters and of activations. Gradients are reduced in float32 whatever it is.
        checkpointing: keep each layer's input alone, and compute the rest again in backward.
        trained: whether backward passes follow, which find the last layers gathered.
    """

    param_dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = True
    trained: bool = True


def build_on_meta(config: PretrainedConfig, sharding: Sharding) -> PreTrainedModel:
    """Build the model that the configuration describes without memory for its parameters."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=sharding.param_dtype)


def shard(model: PreTrainedModel, mesh: DeviceMesh, sharding: Sharding) -> None:
    """Shard the parameters over the mesh, in a group for each decoder layer: one layer is gathered at a time."""
    policy = MixedPrecisionPolicy(param_dtype=sharding.compute_dtype, reduce_dtype=torch.float32)
    if sharding.checkpointing and sharding.trained:
        # Older versions of transformers know it as gradient_checkpointing_enable alone.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # Tied, they are one parameter, which has to be in one group: that of the whole model, below.
    if head is not None and head.weight is not embedding.weight:
        fully_shard(embedding, mesh=mesh, mp_policy=policy)
        fully_shard(head, mesh=mesh, mp_policy=policy, reshard_after_forward=not sharding.trained)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=not sharding.trained)


def decoder_layers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Yield what the model itself says must not be split, or else the members of its longest list of modules."""
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    yield from layers or max(lists, key=len, default=())


def materialise(model: PreTrainedModel, device: torch.device) -> None:
    """Give every shard its memory, with arbitrary content, and every buffer its value."""
    model.to_empty(device=device)
    for module in model.modules():
        if next(module.buffers(recurse=False), None) is not None:
            model._init_weights(module)  # Buffers follow from the configuration; most are in no file.
    model.tie_weights()
