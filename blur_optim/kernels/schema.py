"""Fake implementations of the native operators, for torch.compile, FakeTensor and opcheck."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _multi_tensor_dots(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    num_rows: int,
    scales: Sequence[Tensor] = (),
) -> Tensor:
    return forget[0].new_empty((num_rows, 3), dtype=torch.float64)


def _in_place(*args: Any, **kwargs: Any) -> None:
    """The other operators only write to their arguments."""


torch.library.register_fake("blur_optim::multi_tensor_dots", _multi_tensor_dots)
for _name in ("multi_tensor_blend_", "fused_adamw_", "fused_sgd_"):
    torch.library.register_fake(f"blur_optim::{_name}", _in_place)
