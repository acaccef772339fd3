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


def _multi_tensor_metric_dots(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    rows: Sequence[int],
    num_rows: int,
    metric: Tensor,
    scales: Sequence[Tensor] = (),
) -> Tensor:
    return forget[0].new_empty((num_rows, 9), dtype=torch.float64)


def _in_place(*args: Any, **kwargs: Any) -> None:
    """The other operators only write to their arguments."""


torch.library.register_fake("blur_optim::multi_tensor_dots", _multi_tensor_dots)
torch.library.register_fake("blur_optim::multi_tensor_metric_dots", _multi_tensor_metric_dots)
_IN_PLACE = (
    "multi_tensor_blend_",
    "multi_tensor_compress_",
    "fused_adamw_",
    "fused_sgd_",
    "multi_tensor_metric_blend_",
    "metric_adamw_",
    "metric_sgd_",
)
for _name in _IN_PLACE:
    torch.library.register_fake(f"blur_optim::{_name}", _in_place)
