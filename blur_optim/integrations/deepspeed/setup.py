"""Which engines of DeepSpeed can be right with two gradients, and where those keep them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from blur_optim.integrations.deepspeed.gradients import Bfloat16Zero1Gradients, EngineGradients, UnshardedGradients
from blur_optim.integrations.deepspeed.zero3 import Zero3Gradients, Zero3OffloadGradients
from blur_optim.integrations.deepspeed.zero12 import Zero12Gradients, Zero12OffloadGradients

#: The oldest version of DeepSpeed that all of this was run with.
OLDEST = "0.19.8"
_ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
#: By the class of ``engine.optimizer``: the kind, and the kind where the optimizer is in host memory.
_KINDS: dict[str, tuple[type[EngineGradients], type[EngineGradients] | None]] = {
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": (Zero3Gradients, Zero3OffloadGradients),
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": (Zero12Gradients, Zero12OffloadGradients),
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": (Bfloat16Zero1Gradients, None),
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": (UnshardedGradients, None),
    "deepspeed.runtime.fp16.fused_optimizer.FP16_Optimizer": (UnshardedGradients, None),
}


def gradients_of(engine: Any) -> EngineGradients:
    """Where ``engine`` keeps its gradients.

    Raises:
        TypeError: it is no engine of DeepSpeed.
        ValueError: it is set up in a way that cannot be right, or that was not run with BLUR.
        ImportError: DeepSpeed lacks what is needed.
    """
    if _ENGINE not in map(_path, type(engine).__mro__):
        raise TypeError(
            f"`engine` must be a DeepSpeedEngine, got {type(engine).__name__}. Pass what deepspeed.initialize returns "
            "first; under accelerate, accelerator.deepspeed_engine_wrapped.engine."
        )
    _check_version()
    check_engine(engine)
    kinds = _KINDS.get(_path(type(engine.optimizer)))
    if kinds is None and engine.optimizer is engine.basic_optimizer:
        kinds = UnshardedGradients, None
    kind = kinds[bool(engine.zero_optimization() and engine.zero_cpu_offload())] if kinds else None
    if kind is None:
        raise ValueError(
            f"`engine` must have an optimizer of ZeRO's stages 0 to 3, got {type(engine.optimizer).__name__}. Use "
            "ZeRO-2 or ZeRO-3."
        )
    return kind(engine)


def check_engine(engine: Any) -> None:
    """Raise ValueError, with the reason, for what :data:`REFUSED` names."""
    for what, (has, why) in REFUSED.items():
        if has(engine):
            raise ValueError(f"`engine` must not have {what}: {why}.")


def _check_version() -> None:
    import deepspeed
    from packaging.version import Version  # DeepSpeed's own requirement.

    if Version(deepspeed.__version__) < Version(OLDEST):
        raise ImportError(
            f"`deepspeed` must be at least {OLDEST}, got {deepspeed.__version__}: under 0.19.6 the gradients of ZeRO-2 "
            "in bfloat16 with float32 accumulation were wrong without a sign. Upgrade it."
        )


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_a(engine: Any, *names: str) -> bool:
    return any(cls.__name__ in names for cls in type(engine).__mro__)


def _optimizer_name(engine: Any) -> str:
    return type(engine.basic_optimizer).__name__.lower()


def _says(engine: Any, name: str) -> bool:
    """What older versions can be asked, and newer ones no longer have."""
    return hasattr(engine, name) and bool(getattr(engine, name)())


def _offload(engine: Any) -> Any:
    return engine.zero_offload_optimizer() if engine.zero_optimization() else None


_OTHER_RANKS = "its parameters lie on other ranks than the rest, and BLUR's sums are over one group"
_NOT_LINEAR = "what it does to gradients while they are reduced is not linear, so that two cannot be combined after it"
_NOT_RUN = "it was not run with BLUR"

#: What is refused: whether an engine has it, and why it may not.
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "pipeline stages": (
        lambda e: _is_a(e, "PipelineEngine"),
        "they step by themselves, on other parameters each",
    ),
    "the hybrid engine": (lambda e: _is_a(e, "DeepSpeedHybridEngine"), _NOT_RUN),
    "no optimizer": (
        lambda e: not isinstance(getattr(e, "basic_optimizer", None), torch.optim.Optimizer),
        "there is nothing to step with. Pass one to deepspeed.initialize, or name one in the configuration",
    ),
    "a mixture of experts": (lambda e: bool(e.has_moe_layers), _OTHER_RANKS),
    "model or tensor parallelism": (lambda e: e.mpu is not None or e.autotp_size() > 1, _OTHER_RANKS),
    "sequence parallelism": (lambda e: e.seq_dp_world_size != e.dp_world_size, _OTHER_RANKS),
    "zero_hpz_partition_size": (
        lambda e: e.zero_hpz_partition_size() > 1,
        "shards are then on several ranks at once, and would be counted so often",
    ),
    "MiCS": (
        lambda e: "mics" in type(e.optimizer).__name__.lower(),
        "shards are then on several ranks at once, and would be counted so often",
    ),
    "ZenFlow": (lambda e: e.zenflow_config() is not None, _NOT_LINEAR),
    "quantized gradients": (lambda e: bool(e.zero_quantized_gradients()), _NOT_LINEAR),
    "Muon inside ZeRO": (lambda e: e.zero_optimization() and "muon" in _optimizer_name(e), _NOT_LINEAR),
    "a 1-bit optimizer": (
        lambda e: _optimizer_name(e).startswith(("onebit", "zeroone")),
        _NOT_LINEAR,
    ),
    "sparse gradients": (lambda e: _says(e, "sparse_gradients_enabled"), _NOT_RUN),
    "the optimizer on NVMe": (lambda e: getattr(_offload(e), "device", None) == "nvme", _NOT_RUN),
    "offload_optimizer.ratio": (lambda e: getattr(_offload(e), "ratio", 1.0) < 1.0, _NOT_RUN),
    "SuperOffload": (lambda e: bool(getattr(_offload(e), "super_offload", False)), _NOT_RUN),
    "DeepCompile": (lambda e: bool(e.is_deepcompile_enabled()), "it reduces gradients inside the compiled backward"),
    "apex AMP or torch_autocast": (
        lambda e: _says(e, "amp_enabled") or bool(e.torch_autocast_enabled()),
        f"{_NOT_RUN}. Use bf16 or fp16 of the configuration",
    ),
    "managed_gradient_accumulation: false": (
        lambda e: not e.managed_gradient_accumulation(),
        "the engine then reduces when it steps, after the two gradients have been combined",
    ),
    "fp16 without ZeRO": (
        lambda e: e.fp16_enabled() and not e.zero_optimization(),
        "DeepSpeed divides the gradient by a loss scale that it has not multiplied with. Use bf16, or ZeRO-1",
    ),
}
