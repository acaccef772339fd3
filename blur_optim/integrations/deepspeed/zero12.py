"""ZeRO-1 and 2: a part of the flattened gradients of each param group on each rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from blur_optim.integrations.deepspeed.gradients import ENGINE_NAMES, ShardedGradients, synchronize


class Zero12Gradients(ShardedGradients):
    """ZeRO-1 and 2: ``averaged_gradients[group]``, the tensors of this rank's part, and zeros where that is longer."""

    engine_names = (*ENGINE_NAMES, "coalesce_grad_reduction")
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
        synchronize()  # Copies to the host are under way.

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
