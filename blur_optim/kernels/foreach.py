"""The backend that is always there: PyTorch's own operators over slices that fit the cache.

Sums are float32 within chunks of fixed size and float64 across chunks. The chunk, not the thread, decides the order
of every addition, so the result has the same bits on any number of threads.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from blur_optim.kernels.blocks import BLOCK_SIZE, dequantize, dequantize_flat, quantize_
from blur_optim.kernels.layout import dense_alike, in_order_of, is_dense, memory_order
from blur_optim.kernels.plan import buckets

# Short enough that torch never splits one chunk's sum over threads (its grain is 32768 elements).
CHUNK_SIZE = 4096
# Elements handled at a time. On the CPU the three float32 products of a slab stay in the L2 cache; elsewhere a slab
# only bounds the workspace, and few launches matter more. A multiple of CHUNK_SIZE, or the chunks would depend on it,
# and so of BLOCK_SIZE.
CPU_SLAB_SIZE = 1 << 16
DEVICE_SLAB_SIZE = 1 << 24


def multi_tensor_dots(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    num_rows: int,
    scales: Sequence[Tensor] = (),
) -> Tensor:
    device = forget[0].device if forget else torch.device("cpu")
    partials: list[list[Tensor]] = [[] for _ in range(num_rows)]
    for kind, indices in _kinds(forget, retain).items():
        present = forget if kind == "forget" else retain
        for bucket in buckets([present[i] for i in indices], [rows[i] for i in indices], _slab_size(device)):
            mine = [indices[i] for i in bucket.indices]
            for r, f in _flat_slabs(kind, forget, retain, scales, mine):
                partials[bucket.row].append(_slab_dots(kind, r, f))
    zero = torch.zeros(3, 1, dtype=torch.float64, device=device)
    return torch.stack([_ordered_sum(torch.cat([zero, *parts], dim=1)) for parts in partials])


def multi_tensor_blend_(
    retain: Sequence[Tensor],
    forget: Sequence[Tensor],
    coefficients: Tensor,
    rows: Sequence[int],
    scales: Sequence[Tensor] = (),
) -> None:
    # One conversion and one unbind for all rows: indexing a device tensor costs a kernel launch each time.
    weights = {
        dtype: [row.unbind() for row in coefficients.to(dtype).unbind()]
        for dtype in {_accumulation_dtype(t.dtype) for t in retain}
    }
    for i, (r, f, row) in enumerate(zip(retain, forget, rows, strict=True)):
        a, b = weights[_accumulation_dtype(r.dtype)][row]
        if r.numel() == f.numel():
            for r_slab, f_slab in _slabs(r, f, scales[i] if f.dtype == torch.int8 else None):
                _blend_(r_slab, f_slab, a, b)
        else:
            out, weight = (f, a) if r.numel() == 0 else (r, b)
            for slab, _ in _slabs(out, out, None):
                slab.copy_(slab.to(weight.dtype) * weight)


def multi_tensor_compress_(values: Sequence[Tensor], scales: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for i, (v, grad) in enumerate(zip(values, grads, strict=True)):
        if v.dtype == torch.int8:
            quantize_(v, scales[i], grad)
        else:
            v.copy_(grad)


def multi_tensor_metric_dots(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    rows: Sequence[int],
    num_rows: int,
    metric: Tensor,
    scales: Sequence[Tensor] = (),
) -> Tensor:
    device = forget[0].device if forget else torch.device("cpu")
    partials: list[list[Tensor]] = [[] for _ in range(num_rows)]
    for i, (f, r, v, row) in enumerate(zip(forget, retain, exp_avg_sqs, rows, strict=True)):
        dtype = _accumulation_dtype(v.dtype)
        numbers = _numbers(metric, i, dtype)
        tensors = _readable(f, r, v, *max_exp_avg_sqs[i : i + 1])
        for f_slab, r_slab, v_slab, *seen in _aligned_slabs(scales[i : i + 1], dtype, *tensors):
            partials[row].append(_metric_slab_dots(f_slab, r_slab, v_slab, seen, numbers))
    zero = torch.zeros(9, 1, dtype=torch.float64, device=device)
    return torch.stack([_ordered_sum(torch.cat([zero, *parts], dim=1)) for parts in partials])


def multi_tensor_metric_blend_(
    retain: Sequence[Tensor],
    forget: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    coefficients: Tensor,
    rows: Sequence[int],
    metric: Tensor,
    found_inf: Tensor | None,
    scales: Sequence[Tensor] = (),
) -> None:
    for i, (r, v) in enumerate(zip(retain, exp_avg_sqs, strict=True)):
        numbers = _numbers(metric, i, _accumulation_dtype(v.dtype))
        for _, r_slab, v_slab in _aligned_slabs((), v.dtype, r.new_empty(0), r, v):
            _write(v_slab, _moment(v_slab, r_slab, numbers), found_inf)
    multi_tensor_blend_(retain, forget, coefficients, rows, scales)


def metric_adamw_(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    coefficients: Tensor,
    steps: Tensor,
    lr: Tensor,
    metric: Tensor,
    *,
    beta1: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    found_inf: Tensor | None,
    scales: Sequence[Tensor] = (),
) -> None:
    sign = -1.0 if maximize else 1.0
    shrink = 1 - lr * weight_decay if decoupled else torch.ones_like(lr)
    sizes = lr / (1 - torch.pow(beta1, steps.double()))
    for i, (p, row) in enumerate(zip(params, rows, strict=True)):
        dtype = _accumulation_dtype(p.dtype)
        numbers, (a, b) = _numbers(metric, i, dtype), (sign * coefficients[row]).to(dtype).unbind()
        size, shrunk = sizes[i].to(dtype), shrink.to(dtype)
        tensors = forget[i], retain[i], p, exp_avgs[i], exp_avg_sqs[i], *max_exp_avg_sqs[i : i + 1]
        for f, r, param, m, v, *seen in _aligned_slabs(scales[i : i + 1], dtype, *tensors):
            old = param.to(dtype) * shrunk
            grad = _update(f, r, a, b)
            if not decoupled:
                grad = grad + weight_decay * old
            moment = second = _moment(v, r, numbers)
            averaged = beta1 * m.to(dtype) + (1 - beta1) * grad
            if amsgrad:
                second = torch.maximum(seen[0].to(dtype), moment)
                _write(seen[0], second, found_inf)
            _write(m, averaged, found_inf)
            _write(v, moment, found_inf)
            _write(param, old - size * averaged / _denominator(second * numbers[2], numbers), found_inf)


def metric_sgd_(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rows: Sequence[int],
    coefficients: Tensor,
    lr: Tensor,
    metric: Tensor,
    *,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
    found_inf: Tensor | None,
    scales: Sequence[Tensor] = (),
) -> None:
    sign = -1.0 if maximize else 1.0
    for i, (p, row) in enumerate(zip(params, rows, strict=True)):
        dtype = _accumulation_dtype(p.dtype)
        numbers, (a, b) = _numbers(metric, i, dtype), (sign * coefficients[row]).to(dtype).unbind()
        tensors = forget[i], retain[i], p, exp_avg_sqs[i], *momentum_buffers[i : i + 1]
        for f, r, param, v, *buffers in _aligned_slabs(scales[i : i + 1], dtype, *tensors):
            grad = _update(f, r, a, b) + weight_decay * param.to(dtype)
            for buffer in buffers:
                moved = grad if first_step else momentum * buffer.to(dtype) + (1 - dampening) * grad
                _write(buffer, moved, found_inf)
                grad = grad + momentum * moved if nesterov else moved
            moment = _moment(v, r, numbers)
            _write(v, moment, found_inf)
            step = lr.to(dtype) * grad / _denominator(moment * numbers[2], numbers)
            _write(param, param.to(dtype) - step, found_inf)


def _numbers(metric: Tensor, i: int, dtype: torch.dtype) -> Sequence[Tensor]:
    """The numbers of a tensor's metric: beta2, the weight of r^2, the inverse bias correction, damping, eps."""
    return metric[i].to(dtype).unbind()


def _moment(v: Tensor, r: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    """The second moment of the retain gradient that this step makes."""
    moment = numbers[0] * v.to(numbers[0].dtype)
    if not r.numel():
        return moment
    r = r.to(moment.dtype)
    return moment + numbers[1] * (r * r)


def _denominator(corrected: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    return (corrected + numbers[3]).sqrt() + numbers[4]


def _update(f: Tensor, r: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a f + b r`` in the dtype of the weights; an absent gradient counts as zeros."""
    if not r.numel():
        return a * f.to(a.dtype)
    return b * r.to(b.dtype) + a * f.to(a.dtype) if f.numel() else b * r.to(b.dtype)


def _write(out: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """Without a look at the flag from the host."""
    out.copy_(value if found_inf is None else torch.where(found_inf > 0, out.to(value.dtype), value))


def _metric_slab_dots(f: Tensor, r: Tensor, v: Tensor, seen: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    """``[9, chunks]`` float64 partial sums."""
    dtype = numbers[0].dtype
    second = _moment(v, r, numbers)
    if seen:
        second = torch.maximum(seen[0].to(dtype), second)
    corrected = second * numbers[2]
    inverse = _denominator(corrected, numbers).reciprocal_()
    sums = torch.zeros(9, v.numel(), dtype=dtype, device=v.device)
    if f.numel():
        f = f.to(dtype)
        pf = inverse * f
        torch.mul(f, f, out=sums[1])
        torch.mul(f, pf, out=sums[4])
        torch.mul(pf, pf, out=sums[6])
        torch.mul(sums[6], sums[6], out=sums[7])
    if r.numel():
        r = r.to(dtype)
        torch.mul(r, r, out=sums[2])
        torch.mul(r, inverse * r, out=sums[5])
    if f.numel() and r.numel():
        torch.mul(r, f, out=sums[0])
        torch.mul(r, pf, out=sums[3])
    sums[8] = corrected
    return _chunk_sums(sums)


def _readable(forget: Tensor, *others: Tensor) -> list[Tensor]:
    """The tensors with their elements in one order in memory; copies where they are not."""
    first = next((t for t in (forget, *others) if t.numel()), forget)
    first = first if is_dense(first) else first.contiguous()
    rest = [in_order_of(t, first) if t.numel() else t for t in (forget, *others)]
    return rest


def _aligned_slabs(scales: Sequence[Tensor], dtype: torch.dtype, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Matching pieces of all tensors, the first one's restored where it is int8; an absent one has empty pieces.

    Tensors of unlike layouts stay whole, for what is written must not become a copy.
    """
    forget, *others = tensors
    present = [t for t in tensors if t.numel()]
    quantized = forget.dtype == torch.int8 and forget.numel() > 0
    if not present:
        return
    if not all(dense_alike(t, present[0]) and is_dense(t) for t in present):
        yield [dequantize(forget, scales[0], dtype) if quantized else forget, *others]
        return
    size = _slab_size(present[0].device)
    for start in range(0, present[0].numel(), size):
        f, *rest = (memory_order(t)[start : start + size] for t in tensors)
        if quantized:
            f = dequantize_flat(f, scales[0][start // BLOCK_SIZE : (start + size) // BLOCK_SIZE], dtype)
        yield [f, *rest]


def _kinds(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> dict[str, list[int]]:
    """The indices of the pairs by what is there: both gradients, or one."""
    kinds: dict[str, list[int]] = {"both": [], "forget": [], "retain": []}
    for i, (f, r) in enumerate(zip(forget, retain, strict=True)):
        kinds["both" if f.numel() == r.numel() else "retain" if f.numel() == 0 else "forget"].append(i)
    return kinds


def _flat_slabs(
    kind: str, forget: Sequence[Tensor], retain: Sequence[Tensor], scales: Sequence[Tensor], indices: list[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs of a bucket as flat slabs; many small ones are joined into one, for fewer launches."""
    if kind != "both":
        alone = _flatten([(forget if kind == "forget" else retain)[i] for i in indices])
        return _slabs(alone, alone, None)
    if len(indices) == 1:
        f, r = forget[indices[0]], retain[indices[0]]
        if f.dtype == torch.int8:  # Blocks follow the memory, so the other one does too.
            return _slabs(memory_order(in_order_of(r, f)), memory_order(f), scales[indices[0]])
        return _slabs(r.reshape(-1), f.reshape(-1), None)
    restored = [
        dequantize(forget[i], scales[i], _accumulation_dtype(retain[i].dtype))
        if forget[i].dtype == torch.int8
        else forget[i].to(retain[i].dtype)
        for i in indices
    ]
    return _slabs(_flatten([retain[i] for i in indices]), _flatten(restored), None)


def _flatten(tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0].reshape(-1)
    return torch.cat([t.reshape(-1) for t in tensors])


def _slab_dots(kind: str, r: Tensor, f: Tensor) -> Tensor:
    """``[3, chunks]`` float64 partial sums; one-sided gradients come in as ``f is r``, with two of the sums zero."""
    dtype = _accumulation_dtype(r.dtype)
    f, r = f.to(dtype), r.to(dtype)
    if kind != "both":
        norm = _chunk_sums(f.square().unsqueeze(0))
        zero = torch.zeros_like(norm)
        return torch.cat([zero, norm, zero] if kind == "forget" else [zero, zero, norm])
    products = torch.empty(3, f.numel(), dtype=dtype, device=f.device)
    torch.mul(f, r, out=products[0])
    torch.mul(f, f, out=products[1])
    torch.mul(r, r, out=products[2])
    return _chunk_sums(products)


def _chunk_sums(values: Tensor) -> Tensor:
    """``[k, n] -> [k, ceil(n / CHUNK_SIZE)]``: sums in the values' dtype within a chunk, returned in float64."""
    k, n = values.shape
    if n % CHUNK_SIZE and n > CHUNK_SIZE:
        whole = n // CHUNK_SIZE * CHUNK_SIZE
        return torch.cat([_chunk_sums(values[:, :whole]), _chunk_sums(values[:, whole:])], dim=1)
    return values.reshape(k, -1, min(n, CHUNK_SIZE) or 1).sum(dim=-1).double()


def _ordered_sum(values: Tensor) -> Tensor:
    """``[k, n] -> [k]``, level by level in chunks, so that no level is one long sum that threads would share."""
    while values.shape[1] > 1:
        values = _chunk_sums(pad(values, (0, -values.shape[1] % min(values.shape[1], CHUNK_SIZE))))
    return values.squeeze(1)


def _blend_(r: Tensor, f: Tensor, a: Tensor, b: Tensor) -> None:
    if r.dtype == f.dtype == b.dtype:
        r.mul_(b).addcmul_(f, a)
    else:
        # In the tensors' own dtype the coefficient itself would be rounded, to 8 bits in bfloat16.
        r.copy_(r.to(b.dtype).mul_(b).addcmul_(f.to(a.dtype), a))


def _slabs(out: Tensor, forget: Tensor, scales: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching pieces of both, the forget gradient's restored where it is int8.

    Tensors of other layouts stay whole, for ``out`` must not become a copy.
    """
    dtype = _accumulation_dtype(out.dtype)
    if not (out.is_contiguous() and forget.is_contiguous()):
        yield out, forget if scales is None else dequantize(forget, scales, dtype)
        return
    out, forget, size = out.view(-1), forget.view(-1), _slab_size(out.device)
    for start in range(0, out.numel(), size):
        piece = forget[start : start + size]
        if scales is not None:
            piece = dequantize_flat(piece, scales[start // BLOCK_SIZE : (start + size) // BLOCK_SIZE], dtype)
        yield out[start : start + size], piece


def _slab_size(device: torch.device) -> int:
    return CPU_SLAB_SIZE if device.type == "cpu" else DEVICE_SLAB_SIZE


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
