"""Where DeepSpeed keeps the gradients of a phase: one class for each of its kinds of optimizer.

Everything here that DeepSpeed does not document is named in :attr:`EngineGradients.names`, looked for when an engine is
given, and nothing outside this module touches it. As of DeepSpeed 0.19.8.

Each parameter of the engine has one *piece* on each rank: what this rank keeps of its gradient, perhaps nothing. The
pieces of all ranks are the gradient, padded with zeros; ZeRO-0 keeps all of it on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_ENGINE_NAMES = (
    *("basic_optimizer", "optimizer", "device", "step", "global_steps", "get_global_grad_norm", "fp16_enabled"),
    "set_gradient_accumulation_boundary",
)


class EngineGradients:
    """The gradients of one engine, for a phase whose number of micro-batches is not known beforehand.

    Args:
        engine: what ``deepspeed.initialize`` returns.

    Raises:
        ImportError: this version of DeepSpeed lacks something that is needed.
    """

    #: What is used of the engine and of its optimizer.
    engine_names: Sequence[str] = _ENGINE_NAMES
    names: Sequence[str] = ()
    #: Each phase leaves its gradients in memory of its own, so that those of the forget phase can stay where they are.
    fresh = False

    def __init__(self, engine: Any) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        _check_names(engine, self.engine_names)
        _check_names(self.optimizer, self.names)
        self.groups: list[list[Tensor]] = [list(group) for group in self._groups()]

    @property
    def params(self) -> Iterator[Tensor]:
        """The engine's parameters, by param group, in an order that is the same on all ranks."""
        return (p for group in self.groups for p in group)

    @property
    def device(self) -> torch.device:
        """Where the pieces are."""
        return torch.device(self.engine.device)

    @property
    def process_group(self) -> Any:
        """The ranks whose pieces make up the gradients; None where each has all of them."""
        return None

    @property
    def loss_scale(self) -> float:
        """What the engine multiplies losses with."""
        return float(getattr(self.optimizer, "loss_scale", 1.0) or 1.0) if self.engine.fp16_enabled() else 1.0

    def begin(self) -> None:
        """Make ready for the backward passes of a phase: nothing is left, and none of them is the last."""
        self.clear()
        self.engine.set_gradient_accumulation_boundary(False)

    def end(self) -> None:
        """Have everything averaged over the ranks and in its final place."""
        raise NotImplementedError

    def read(self) -> list[Tensor]:
        """The piece of each of :attr:`params`, as the engine has it: writing to it writes to the engine's."""
        raise NotImplementedError

    def written(self) -> None:
        """Let the engine know of what was written to the pieces."""

    def clear(self) -> None:
        """Leave the engine as if no backward had run since its last step."""
        raise NotImplementedError

    def is_clear(self) -> bool:
        """Whether no backward has run since."""
        raise NotImplementedError

    def step(self) -> None:
        """Let the engine step on the pieces."""
        self.engine.set_gradient_accumulation_boundary(True)
        try:
            self.engine.step()
        finally:
            self.release()

    def release(self) -> None:
        """Let the engine count its micro-batches itself again."""
        self.engine.set_gradient_accumulation_boundary(None)

    def _groups(self) -> Iterator[Sequence[Tensor]]:
        raise NotImplementedError


class UnshardedGradients(EngineGradients):
    """ZeRO-0: in ``p.grad`` of every rank, averaged at the end of a phase."""

    engine_names = (*_ENGINE_NAMES, "allreduce_gradients")
    names: Sequence[str] = ("param_groups",)
    fresh = True

    def end(self) -> None:
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.allreduce_gradients()
        self.engine.set_gradient_accumulation_boundary(False)

    def read(self) -> list[Tensor]:
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.params if p.grad is not None]

    def clear(self) -> None:
        for p in self.params:
            p.grad = None

    def is_clear(self) -> bool:
        return all(p.grad is None for p in self.params)

    def _groups(self) -> Iterator[Sequence[Tensor]]:
        # In float32 the optimizer is the client's; in bfloat16 it has float32 copies in its own groups.
        groups = getattr(self.optimizer, "fp16_groups", None)
        yield from groups or ([p for p in g["params"] if p.requires_grad] for g in self.optimizer.param_groups)


class Bfloat16Zero1Gradients(EngineGradients):
    """ZeRO-1 of bfloat16 with float32 accumulation: whole on every rank, in buffers that every phase writes to.

    The norm for clipping is taken over the whole buffers, so the update belongs in all of them, not in the rank's part.
    """

    engine_names = (*_ENGINE_NAMES, "allreduce_gradients")
    names: Sequence[str] = ("bf16_groups", "fp32_groups_gradients", "fp32_groups_has_gradients", "zero_grad")

    end = UnshardedGradients.end

    def read(self) -> list[Tensor]:
        return [grad for group in self.optimizer.fp32_groups_gradients for grad in group]

    def written(self) -> None:
        self._mark(True)

    def clear(self) -> None:
        self.optimizer.zero_grad()
        self._mark(False)

    def is_clear(self) -> bool:
        return not any(map(any, self.optimizer.fp32_groups_has_gradients))

    def _mark(self, value: bool) -> None:
        for group in self.optimizer.fp32_groups_has_gradients:
            group[:] = [value] * len(group)

    def _groups(self) -> Iterator[Sequence[Tensor]]:
        yield from self.optimizer.bf16_groups


class ShardedGradients(EngineGradients):
    """Each element of a gradient is on one rank."""

    @property
    def process_group(self) -> Any:
        """Those of the engine."""
        return self.optimizer.dp_process_group


class Zero12Gradients(ShardedGradients):
    """ZeRO-1 and 2: ``averaged_gradients[group]``, the tensors of this rank's part, and zeros where that is longer."""

    engine_names = (*_ENGINE_NAMES, "coalesce_grad_reduction")
    names: Sequence[str] = (
        "all_grad_tensors",
        "averaged_gradients",
        "bit16_groups",
        "dp_process_group",
        "finalize_gradient_accumulation_boundary",
        "get_param_id",
        "gradient_accumulation_dtype",
        "micro_step_id",
        "params_in_partition",
        "partition_gradients",
        "ready_for_gradients",
        "zero_grad",
    )
    fresh = True

    def end(self) -> None:
        if self.optimizer.partition_gradients and not self.is_clear():
            self.optimizer.finalize_gradient_accumulation_boundary()
            return
        # ZeRO-1 has left everything in p.grad until now: a block without a backward reduces what is there. Of a phase
        # that had none it makes zeros.
        with self.engine.coalesce_grad_reduction():
            pass

    def read(self) -> list[Tensor]:
        pieces: dict[int, Tensor] = {}
        for index, params in enumerate(self.optimizer.params_in_partition):
            parts = self._parts(index, params)
            pieces |= {id(p): part for p, part in zip(params, parts, strict=True)}
        return [pieces[id(p)] if id(p) in pieces else self._nothing(p) for p in self.params]

    def clear(self) -> None:
        for index in range(len(self.groups)):
            self.optimizer.averaged_gradients[index] = self.optimizer.all_grad_tensors[index] = None
        self.optimizer.micro_step_id = (
            -1
        )  # As after a step. The next backward counts, also after one that was abandoned.
        self.optimizer.ready_for_gradients = False
        self.optimizer.zero_grad()

    def is_clear(self) -> bool:
        return bool(self.optimizer.micro_step_id == -1)

    def _groups(self) -> Iterator[Sequence[Tensor]]:
        yield from self.optimizer.bit16_groups

    def _parts(self, index: int, params: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of one group that belong to ``params``, without padding."""
        tensors = self.optimizer.averaged_gradients[index]
        # Before it was marked, padding stood at the end alone.
        parts = [t for t in tensors if not getattr(t, "_zero_padding", False)][: len(params)]
        if len(parts) != len(params) or any(t.numel() > p.numel() for p, t in zip(params, parts, strict=True)):
            raise RuntimeError(
                f"The engine must have a gradient for each of the {len(params)} parameters in this rank's part of "
                f"group {index}, got {[t.numel() for t in tensors]} elements for {[p.numel() for p in params]}. This "
                "version of DeepSpeed stores them in a way that BLUR does not know: use ZeRO-3."
            )
        return parts

    def _nothing(self, param: Tensor) -> Tensor:
        return torch.empty(0, dtype=self.optimizer.gradient_accumulation_dtype, device=param.device)


class Zero12OffloadGradients(Zero12Gradients):
    """ZeRO-1 and 2 with the optimizer in host memory: a float32 buffer for each group there, and a norm for each piece.

    The norms are what clipping goes by. A parameter that a backward does not reach keeps what its part of the buffer
    held before, so that the buffer has to be empty before each phase.
    """

    names: Sequence[str] = (
        *Zero12Gradients.names,
        "_offload_accumulated_param_ids",
        "grad_position",
        "local_overflow",
        "norm_for_param_grads",
        "single_partition_of_fp32_groups",
        "update_offload_overflow_tracker",
    )
    fresh = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def end(self) -> None:
        super().end()
        _synchronize()  # Copies to the host are under way.

    def written(self) -> None:
        pieces = self.read()
        for p, piece in zip(self.params, pieces, strict=True):
            if piece.numel():
                self.optimizer.norm_for_param_grads[self.optimizer.get_param_id(p)] = piece.double().norm()
                self.optimizer.update_offload_overflow_tracker(piece)

    def clear(self) -> None:
        super().clear()
        for flat in self.optimizer.single_partition_of_fp32_groups:
            flat.grad.zero_()
        self.optimizer.norm_for_param_grads.clear()
        self.optimizer.local_overflow = False
        self.optimizer._offload_accumulated_param_ids = set()

    def _parts(self, index: int, params: Sequence[Tensor]) -> list[Tensor]:
        flat = self.optimizer.single_partition_of_fp32_groups[index].grad.view(-1)
        positions = (self.optimizer.grad_position[self.optimizer.get_param_id(p)] for p in params)
        return [flat.narrow(0, start, size) for _, _, start, size in positions]

    def _nothing(self, param: Tensor) -> Tensor:
        return torch.empty(0, dtype=torch.float32)


class Zero3Gradients(ShardedGradients):
    """ZeRO-3: a part of every parameter's gradient, in one flat buffer that every phase writes to."""

    names: Sequence[str] = (
        "averaged_gradients",
        "dp_process_group",
        "fp16_groups",
        "grad_partitions_flat_buffer",
        "micro_step_id",
        "sub_group_to_group_id",
        "zero_grad",
        "_epilogue_ran_this_backward",
    )

    def begin(self) -> None:
        super().begin()
        # At 0 a backward replaces what is there, and only engine(...) counts up: of two forwards before two backwards,
        # or of engine.module(...), one would be lost. The buffer is empty: always add.
        self.optimizer.micro_step_id = 1

    def end(self) -> None:
        pass  # Each backward has reduced and added.

    def read(self) -> list[Tensor]:
        flat, offset, pieces = self.optimizer.grad_partitions_flat_buffer, 0, {}
        for p in self._in_order():
            size = _partition_size(p)
            pieces[id(p)] = flat.narrow(0, offset, size)
            offset += size
        return [pieces[id(p)] for p in self.params]

    def written(self) -> None:
        # engine.step() looks here, and a phase without a backward has not put it there.
        pieces = dict(zip(map(id, self.params), self.read(), strict=True))
        for index, group in enumerate(self.optimizer.fp16_groups):
            self.optimizer.averaged_gradients[index] = [pieces[id(p)] for p in group]

    def clear(self) -> None:
        self.optimizer.zero_grad()
        self.optimizer.grad_partitions_flat_buffer.zero_()

    def is_clear(self) -> bool:
        return self.optimizer.micro_step_id == 0 and not self.optimizer._epilogue_ran_this_backward

    def _in_order(self) -> Iterator[Tensor]:
        return (p for group in self.optimizer.fp16_groups for p in group)

    def _groups(self) -> Iterator[Sequence[Tensor]]:
        count = len(self.engine.basic_optimizer.param_groups)
        groups: list[list[Tensor]] = [[] for _ in range(count)]
        for index, sub_group in enumerate(self.optimizer.fp16_groups):
            groups[self.optimizer.sub_group_to_group_id[index]] += sub_group
        yield from groups


class Zero3OffloadGradients(Zero3Gradients):
    """ZeRO-3 with the optimizer in host memory: a float32 copy of each part there, and its norm, for clipping."""

    names: Sequence[str] = (
        *Zero3Gradients.names,
        "finalize_gradient_accumulation_boundary",
        "fp32_partitioned_groups_flat",
        "get_param_id",
        "grad_position",
        "norm_for_param_grads",
    )

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def end(self) -> None:
        self.optimizer.finalize_gradient_accumulation_boundary()
        _synchronize()

    def read(self) -> list[Tensor]:
        positions = [self.optimizer.grad_position[self.optimizer.get_param_id(p)] for p in self.params]
        flats = self.optimizer.fp32_partitioned_groups_flat
        return [flats[index].grad.narrow(0, start, size) for index, start, size in positions]

    def written(self) -> None:
        from deepspeed.utils import safe_set_local_grad

        for p, piece in zip(self.params, self.read(), strict=True):
            safe_set_local_grad(p, piece)  # The same values; what matters is that it takes their norm.

    def clear(self) -> None:
        super().clear()
        for flat in self.optimizer.fp32_partitioned_groups_flat:
            flat.grad.zero_()
        self.optimizer.norm_for_param_grads.clear()


def _check_names(owner: Any, names: Sequence[str]) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        import deepspeed

        raise ImportError(
            f"`deepspeed` must be a version whose {type(owner).__name__} has {missing}, got {deepspeed.__version__}. "
            "0.19.8 has them."
        )


def _partition_size(param: Any) -> int:
    return int(param.partition_numel())  # A method that ZeRO-3 adds to each parameter.


def _synchronize() -> None:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()
