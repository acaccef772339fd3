"""ZeRO-3: a part of every parameter, and of its gradient, on each rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from blur_optim.integrations.deepspeed.gradients import ShardedGradients, synchronize


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
        synchronize()

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


def _partition_size(param: Any) -> int:
    return int(param.partition_numel())  # A method that ZeRO-3 adds to each parameter.
