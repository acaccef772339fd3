"""The dots, the blend and the compression of gradients."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from blur_optim.kernels.blocks import dequantize, quantize_
from blur_optim.kernels.foreach.slabs import accumulation_dtype, chunk_sums, ordered_sum, slab_size, slabs
from blur_optim.kernels.layout import in_order_of, memory_order
from blur_optim.kernels.plan import buckets


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
        for bucket in buckets([present[i] for i in indices], [rows[i] for i in indices], slab_size(device)):
            mine = [indices[i] for i in bucket.indices]
            for r, f in _flat_slabs(kind, forget, retain, scales, mine):
                partials[bucket.row].append(_slab_dots(kind, r, f))
    zero = torch.zeros(3, 1, dtype=torch.float64, device=device)
    return torch.stack([ordered_sum(torch.cat([zero, *parts], dim=1)) for parts in partials])


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
        for dtype in {accumulation_dtype(t.dtype) for t in retain}
    }
    for i, (r, f, row) in enumerate(zip(retain, forget, rows, strict=True)):
        a, b = weights[accumulation_dtype(r.dtype)][row]
        if r.numel() == f.numel():
            for r_slab, f_slab in slabs(r, f, scales[i] if f.dtype == torch.int8 else None):
                _blend_(r_slab, f_slab, a, b)
        else:
            out, weight = (f, a) if r.numel() == 0 else (r, b)
            for slab, _ in slabs(out, out, None):
                slab.copy_(slab.to(weight.dtype) * weight)


def multi_tensor_compress_(values: Sequence[Tensor], scales: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for i, (v, grad) in enumerate(zip(values, grads, strict=True)):
        if v.dtype == torch.int8:
            quantize_(v, scales[i], grad)
        else:
            v.copy_(grad)


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
        return slabs(alone, alone, None)
    if len(indices) == 1:
        f, r = forget[indices[0]], retain[indices[0]]
        if f.dtype == torch.int8:  # Blocks follow the memory, so the other one does too.
            return slabs(memory_order(in_order_of(r, f)), memory_order(f), scales[indices[0]])
        return slabs(r.reshape(-1), f.reshape(-1), None)
    restored = [
        dequantize(forget[i], scales[i], accumulation_dtype(retain[i].dtype))
        if forget[i].dtype == torch.int8
        else forget[i].to(retain[i].dtype)
        for i in indices
    ]
    return slabs(_flatten([retain[i] for i in indices]), _flatten(restored), None)


def _flatten(tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0].reshape(-1)
    return torch.cat([t.reshape(-1) for t in tensors])


def _slab_dots(kind: str, r: Tensor, f: Tensor) -> Tensor:
    """``[3, chunks]`` float64 partial sums; one-sided gradients come in as ``f is r``, with two of the sums zero."""
    dtype = accumulation_dtype(r.dtype)
    f, r = f.to(dtype), r.to(dtype)
    if kind != "both":
        norm = chunk_sums(f.square().unsqueeze(0))
        zero = torch.zeros_like(norm)
        return torch.cat([zero, norm, zero] if kind == "forget" else [zero, zero, norm])
    products = torch.empty(3, f.numel(), dtype=dtype, device=f.device)
    torch.mul(f, r, out=products[0])
    torch.mul(f, f, out=products[1])
    torch.mul(r, r, out=products[2])
    return chunk_sums(products)


def _blend_(r: Tensor, f: Tensor, a: Tensor, b: Tensor) -> None:
    if r.dtype == f.dtype == b.dtype:
        r.mul_(b).addcmul_(f, a)
    else:
        # In the tensors' own dtype the coefficient itself would be rounded, to 8 bits in bfloat16.
        r.copy_(r.to(b.dtype).mul_(b).addcmul_(f.to(a.dtype), a))
