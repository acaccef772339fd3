"""The backend that is always there: PyTorch's own operators over slices that fit the cache.

Sums are float32 within chunks of fixed size and float64 across chunks. The chunk, not the thread, decides the order
of every addition, so the result has the same bits on any number of threads.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from blur_optim.kernels.plan import buckets

# Short enough that torch never splits one chunk's sum over threads (its grain is 32768 elements).
CHUNK_SIZE = 4096
# Elements handled at a time. On the CPU the three float32 products of a slab stay in the L2 cache; elsewhere a slab
# only bounds the workspace, and few launches matter more. A multiple of CHUNK_SIZE, or the chunks would depend on it.
CPU_SLAB_SIZE = 1 << 16
DEVICE_SLAB_SIZE = 1 << 24


def multi_tensor_dots(forget: Sequence[Tensor], retain: Sequence[Tensor], rows: Sequence[int], num_rows: int) -> Tensor:
    device = forget[0].device if forget else torch.device("cpu")
    partials: list[list[Tensor]] = [[] for _ in range(num_rows)]
    for kind, f, r, row in _flat_pairs(forget, retain, rows, _slab_size(device)):
        for f_slab, r_slab in _slabs(f, r):
            partials[row].append(_slab_dots(kind, f_slab, r_slab))
    zero = torch.zeros(3, 1, dtype=torch.float64, device=device)
    return torch.stack([_ordered_sum(torch.cat([zero, *parts], dim=1)) for parts in partials])


def multi_tensor_blend_(
    retain: Sequence[Tensor], forget: Sequence[Tensor], coefficients: Tensor, rows: Sequence[int]
) -> None:
    # One conversion and one unbind for all rows: indexing a device tensor costs a kernel launch each time.
    scalars = {
        dtype: [row.unbind() for row in coefficients.to(dtype).unbind()]
        for dtype in {_accumulation_dtype(t.dtype) for t in (*retain, *forget)}
    }
    for r, f, row in zip(retain, forget, rows, strict=True):
        a, b = scalars[_accumulation_dtype(r.dtype)][row]
        if r.numel() == f.numel():
            _blend_(r, f, a, b)
        else:
            out, weight = (f, a) if r.numel() == 0 else (r, b)
            _scale_(out, weight)


def _flat_pairs(
    forget: Sequence[Tensor], retain: Sequence[Tensor], rows: Sequence[int], limit: int
) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """The pairs as flat vectors, small neighbours joined: one launch for many biases and norm weights."""
    kinds = {"both": [], "forget": [], "retain": []}  # type: dict[str, list[int]]
    for i, (f, r) in enumerate(zip(forget, retain, strict=True)):
        kinds["both" if f.numel() == r.numel() else "retain" if f.numel() == 0 else "forget"].append(i)
    for kind, indices in kinds.items():
        fs = [(retain if kind == "retain" else forget)[i] for i in indices]
        rs = [(forget if kind == "forget" else retain)[i] for i in indices]
        for bucket in buckets(fs, [rows[i] for i in indices], limit):
            yield (
                kind,
                _flatten([fs[i] for i in bucket.indices]),
                _flatten([rs[i] for i in bucket.indices]),
                bucket.row,
            )


def _flatten(tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0].reshape(-1)
    return torch.cat([t.reshape(-1) for t in tensors])


def _slab_dots(kind: str, f: Tensor, r: Tensor) -> Tensor:
    """``[3, chunks]`` float64 partial sums; one-sided gradients come in as ``f is r``, with two of the sums zero."""
    dtype = _accumulation_dtype(f.dtype)
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
    for r_slab, f_slab in _slabs(r, f):
        if r_slab.dtype == b.dtype:
            r_slab.mul_(b).addcmul_(f_slab, a)
        else:
            # In the tensors' own dtype the coefficient itself would be rounded, to 8 bits in bfloat16.
            r_slab.copy_(r_slab.to(b.dtype).mul_(b).addcmul_(f_slab.to(a.dtype), a))


def _scale_(out: Tensor, weight: Tensor) -> None:
    for slab, _ in _slabs(out, out):
        slab.copy_(slab.to(weight.dtype) * weight)


def _slabs(out: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching pieces of both; tensors of other layouts stay whole, for ``out`` must not become a copy."""
    if not (out.is_contiguous() and other.is_contiguous()):
        return iter([(out, other)])
    size = _slab_size(out.device)
    return zip(torch.split(out.view(-1), size), torch.split(other.view(-1), size), strict=True)


def _slab_size(device: torch.device) -> int:
    return CPU_SLAB_SIZE if device.type == "cpu" else DEVICE_SLAB_SIZE


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
