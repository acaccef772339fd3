"""The kernels of the metric over the pairs of a step: dots, the blend that feeds v, and the base's update."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from blur_optim.kernels import Backend
from blur_optim.parallel.ranks import to_local
from blur_optim.step.metric_pairs import MetricPairs, MetricState
from blur_optim.step.pairs import PairedGradients
from blur_optim.step.settings import Settings
from blur_optim.step.stash import real

#: Columns of the table of dots: those of the kernels, and the number of elements.
_COLUMNS = 10


def take_metric_dots(gradients: PairedGradients, state: MetricState, settings: Settings) -> Tensor:
    """``[rows, 10]`` float64: the kernels' nine dots of each row and its number of elements, this rank's part.

    With ``record_alignment``: of each member.
    """
    by_member = settings.record_alignment
    rows = len(gradients.rows.params if by_member else gradients.rows.gammas)
    table = torch.zeros(rows, _COLUMNS, dtype=torch.float64, device=gradients.device)
    for batch in _metric_batches(gradients):
        for kernels, pairs in batch.by_kernels(settings.backend):
            places = pairs.members if by_member else pairs.rows
            dots = kernels.multi_tensor_metric_dots(
                pairs.forget,
                pairs.retain,
                pairs.exp_avg_sqs,
                cast(list[Tensor], pairs.max_exp_avg_sqs),
                places,
                rows,
                pairs.metric.to(batch.device, non_blocking=True),
                pairs.scales,
            )
            part = torch.cat([dots, state.sizes(pairs, places, rows)[:, None]], dim=1)
            table += part.to(table.device, non_blocking=True).mul_(batch.weight)
    return table


def metric_blend_(gradients: PairedGradients, coefficients: Tensor, found_inf: Tensor, backend: str | None) -> None:
    """Write the update into ``p.grad`` and advance v, in one pass over g_r, which is gone afterwards."""
    for batch in _metric_batches(gradients):
        device = batch.device
        for kernels, pairs in batch.by_kernels(backend):
            kernels.multi_tensor_metric_blend_(
                pairs.retain,
                pairs.forget,
                pairs.exp_avg_sqs,
                coefficients.to(device, non_blocking=True),
                pairs.rows,
                pairs.metric.to(device, non_blocking=True),
                found_inf.to(device, non_blocking=True),
                pairs.scales,
            )


def metric_update_(
    base: Optimizer,
    gradients: PairedGradients,
    coefficients: Tensor,
    found_inf: Tensor,
    backend: str | None,
    lr: Callable[[dict[str, Any], torch.device], Tensor],
) -> None:
    """Take the step of ``base`` in the metric: one pass over parameters, state and gradients.

    Args:
        lr: of a param group, as kernels take it.
    """
    update = _sgd if isinstance(base, SGD) else _adam
    for batch in _metric_batches(gradients):
        device = batch.device
        weights, skip = (t.to(device, non_blocking=True) for t in (coefficients, found_inf))
        for kernels, pairs in batch.by_kernels(backend):
            for index, mine in pairs.by_group():
                group = base.param_groups[index]
                update(base, group, kernels, mine, weights, skip, lr(group, device))


def _metric_batches(gradients: PairedGradients) -> Iterable[MetricPairs]:
    return cast(Iterable[MetricPairs], gradients.batches())


def _adam(
    base: Optimizer,
    group: dict[str, Any],
    kernels: Backend,
    pairs: MetricPairs,
    coefficients: Tensor,
    found_inf: Tensor,
    lr: Tensor,
) -> None:
    device = pairs.device
    kernels.metric_adamw_(
        pairs.locals,
        pairs.exp_avgs,
        pairs.exp_avg_sqs,
        cast(list[Tensor], pairs.max_exp_avg_sqs),
        pairs.forget,
        pairs.retain,
        pairs.rows,
        coefficients,
        pairs.steps.to(device, non_blocking=True),
        lr,
        pairs.metric.to(device, non_blocking=True),
        beta1=group["betas"][0],
        weight_decay=group["weight_decay"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
        decoupled=group.get("decoupled_weight_decay", isinstance(base, AdamW)),
        found_inf=found_inf,
        scales=pairs.scales,
    )


def _sgd(
    base: Optimizer,
    group: dict[str, Any],
    kernels: Backend,
    pairs: MetricPairs,
    coefficients: Tensor,
    found_inf: Tensor,
    lr: Tensor,
) -> None:
    has_momentum = group["momentum"] != 0
    new = [has_momentum and buffer is None for buffer in pairs.momentum_buffers]
    if any(new) and found_inf.item():
        return  # A buffer that a skipped step has made would be damped in the next.
    for first_step in sorted(set(new)):
        index = [i for i, is_new in enumerate(new) if is_new == first_step]
        mine = pairs if len(index) == len(pairs) else pairs.select(index)
        buffers = _new_buffers(base, mine) if first_step else cast(list[Tensor], mine.momentum_buffers)
        kernels.metric_sgd_(
            mine.locals,
            buffers if has_momentum else [],
            mine.exp_avg_sqs,
            mine.forget,
            mine.retain,
            mine.rows,
            coefficients,
            lr,
            mine.metric.to(mine.device, non_blocking=True),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            first_step=first_step,
            found_inf=found_inf,
            scales=mine.scales,
        )


def _new_buffers(base: Optimizer, pairs: MetricPairs) -> list[Tensor]:
    buffers = [torch.empty_like(p, memory_format=torch.preserve_format) for p in pairs.params]
    for p, buffer in zip(pairs.params, buffers, strict=True):
        base.state[p]["momentum_buffer"] = buffer
    return [real(to_local(buffer)) for buffer in buffers]
