"""Every operation of every backend on a GPU against the float64 reference, over dtypes, stashes, sizes and layouts."""

import itertools
from typing import Any

import pytest
import torch
from cases import (
    BLEND_TOLERANCE,
    DOT_TOLERANCE,
    DTYPES,
    GRADIENTS,
    LAYOUTS,
    SHAPES,
    backends,
    cuda_only,
    kernels,
    make,
    restored,
    stashed,
)
from test_backends import assert_dots_close
from torch import Tensor

from blur_optim.kernels import foreach, reference
from blur_optim.kernels.blocks import empty_compressed

A, B = -1.3, 0.7
gradients = pytest.mark.parametrize(("dtype", "stash"), GRADIENTS, ids=str)
#: Large and long lists in three kinds, for the reference on them takes seconds; the others in every one.
SLOW_KINDS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.int8)]
kinds_and_shapes = pytest.mark.parametrize(
    ("dtype", "stash", "shapes"),
    [
        pytest.param(*kind, shapes, id=f"{kind[0]}-{kind[1]}-{name}")
        for name, shapes in SHAPES.items()
        for kind in (SLOW_KINDS if name in ("large", "10000 tensors") else GRADIENTS)
    ],
)


def coefficients(device: torch.device, *rows: tuple[float, float]) -> Tensor:
    return torch.tensor(rows or [(A, B)], dtype=torch.float64, device=device)


def without_one(forget: list[Tensor], scales: list[Tensor]) -> None:
    """Leave out a forget gradient."""
    if len(forget) > 2:
        forget[2] = forget[2].new_empty(0)


@backends
@kinds_and_shapes
def test_dots(backend: str, dtype: torch.dtype, stash: torch.dtype, shapes: list[Any], device: torch.device) -> None:
    forget, scales = stashed(make(shapes, dtype, 0, device), stash)
    retain, rows = make(shapes, dtype, 1, device), [0] * len(shapes)
    without_one(forget, scales)
    expected = reference.multi_tensor_dots(restored(forget, scales), [r.double() for r in retain], rows, 1)
    actual = kernels(backend).multi_tensor_dots(forget, retain, rows, 1, scales)
    assert actual.device.type == device.type
    # An element of int8 times its scale is rounded to float32 once more than one that was kept. In float64 the sums of
    # millions of elements, of either side, are off by as much as their order makes them.
    rounding = 1e-12 if dtype is torch.float64 else 1.2e-7 if stash is torch.int8 else 0.0
    assert_dots_close(actual, expected, dtype, rounding)


@backends
@kinds_and_shapes
def test_blend(backend: str, dtype: torch.dtype, stash: torch.dtype, shapes: list[Any], device: torch.device) -> None:
    forget, scales = stashed(make(shapes, dtype, 0, device), stash)
    retain = make(shapes, dtype, 1, device)
    without_one(forget, scales)
    exact = restored(forget, scales)
    terms = [(A * f if f.numel() else B * 0 * r.double(), B * r.double()) for f, r in zip(exact, retain, strict=True)]
    kernels(backend).multi_tensor_blend_(retain, forget, coefficients(device), [0] * len(shapes), scales)
    tolerance = BLEND_TOLERANCE[dtype]
    if stash is torch.int8 or dtype.itemsize == 2:  # What float32, or float64, rounds before the last rounding.
        tolerance += BLEND_TOLERANCE[torch.float64 if dtype is torch.float64 else torch.float32]
    subnormal = 2**-25 if dtype is torch.float16 else 0.0  # Half of the smallest number of float16.
    for actual, (af, br) in zip(retain, terms, strict=True):
        assert ((actual.double() - (af + br)).abs() <= tolerance * (af.abs() + br.abs()) + subnormal).all()


COMPRESSED = [(dtype, stash) for dtype, stash in GRADIENTS if stash is not dtype]


@backends
@pytest.mark.parametrize(("dtype", "stash"), COMPRESSED, ids=str)
def test_compress(backend: str, dtype: torch.dtype, stash: torch.dtype, device: torch.device) -> None:
    """The bits of PyTorch on the CPU, for what is not finite, zeros and denormals too."""
    sizes = [*SHAPES["odd and empty"], *SHAPES["around chunks"], (700,), (300,), (2,)]
    grads = make(sizes, dtype, 3, torch.device("cpu"))
    grads[-3][300], grads[-2][7] = float("nan"), -float("inf")
    grads[-1][:] = torch.tensor([190.0, -190.0]).double().mul(2.0**-149).to(dtype)
    expected = empty_compressed(grads, stash)
    foreach.multi_tensor_compress_(*expected, grads)
    there = [g.to(device) for g in grads]
    actual = empty_compressed(there, stash)
    kernels(backend).multi_tensor_compress_(*actual, there)
    for mine, theirs in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


@backends
@pytest.mark.parametrize(("forget_layout", "retain_layout"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts(backend: str, forget_layout: str, retain_layout: str, device: torch.device) -> None:
    sizes = [(31, 17), (5,), (300, 257)]
    plain = make(sizes, torch.float32, 0, device), make(sizes, torch.float32, 1, device)
    forget = make(sizes, torch.float32, 0, device, forget_layout)
    retain = make(sizes, torch.float32, 1, device, retain_layout)
    dots = kernels(backend).multi_tensor_dots(forget, retain, [0] * 3, 1)
    assert_dots_close(dots, reference.multi_tensor_dots(*plain, [0] * 3, 1), torch.float32)
    kernels(backend).multi_tensor_blend_(retain, forget, coefficients(device), [0] * 3)
    for actual, f, r in zip(retain, *plain, strict=True):
        torch.testing.assert_close(actual, (A * f.double() + B * r.double()).float(), rtol=1e-6, atol=1e-6)


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absent_gradients_and_rows(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    sizes, rows = [(6, 5), (4,), (70_001,), (3,)], [0, 0, 2, 3]
    forget, retain = make(sizes, dtype, 0, device), make(sizes, dtype, 1, device)
    forget[1] = retain[2] = torch.empty(0, dtype=dtype, device=device)
    zeros = [torch.zeros(size, dtype=dtype, device=device) for size in sizes]
    full_f = [f if f.numel() else zero for f, zero in zip(forget, zeros, strict=True)]
    full_r = [r if r.numel() else zero for r, zero in zip(retain, zeros, strict=True)]
    dots = kernels(backend).multi_tensor_dots(forget, retain, rows, 4)
    assert_dots_close(dots, reference.multi_tensor_dots(full_f, full_r, rows, 4), dtype)
    assert torch.equal(dots[1], torch.zeros_like(dots[1]))
    expected = [0.5 * full_f[i].double() for i in range(4)]
    weights = coefficients(device, (0.5, 0.0), (9.0, 9.0), (0.5, 0.0), (0.5, 0.0))
    kernels(backend).multi_tensor_blend_(retain, forget, weights, rows)
    for i, actual in enumerate([retain[0], retain[1], forget[2], retain[3]]):
        assert torch.equal(actual.double(), expected[i].to(dtype).double()), i


@backends
def test_no_tensors(backend: str, device: torch.device) -> None:
    assert torch.equal(kernels(backend).multi_tensor_dots([], [], [], 2), torch.zeros(2, 3, dtype=torch.float64))
    kernels(backend).multi_tensor_blend_([], [], coefficients(device), [])


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_on_every_run(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    sizes = [(3_000_001,), (700, 300), *[(33,)] * 200]
    forget, retain, rows = make(sizes, dtype, 0, device), make(sizes, dtype, 1, device), [0] * 202
    results = [kernels(backend).multi_tensor_dots(forget, retain, rows, 1) for _ in range(5)]
    assert all(torch.equal(result, results[0]) for result in results)


@cuda_only
@backends
def test_the_same_bits_on_any_stream_and_after_other_work(backend: str, device: torch.device) -> None:
    forget, retain = make([(3_000_001,)], torch.bfloat16, 0, device), make([(3_000_001,)], torch.bfloat16, 1, device)
    expected = kernels(backend).multi_tensor_dots(forget, retain, [0], 1)
    blended = [retain[0].clone()]
    kernels(backend).multi_tensor_blend_(blended, forget, coefficients(device), [0])
    torch.cuda.synchronize()
    busy = torch.randn(2048, 2048, device=device)
    for stream in (torch.cuda.Stream(), torch.cuda.Stream(priority=-1)):
        stream.wait_stream(torch.cuda.current_stream())
        busy = busy @ busy.softmax(0)  # Other work at the same time, on the stream that is left.
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)  # So that what does not wait for its stream would be early.
            # The input is written on this stream, before: a launch on another one would read what was there.
            late = [torch.zeros_like(retain[0]).copy_(retain[0])]
            dots = kernels(backend).multi_tensor_dots(forget, late, [0], 1)
            kernels(backend).multi_tensor_blend_(late, forget, coefficients(device), [0])
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(dots, expected)
        assert torch.equal(late[0], blended[0])


@cuda_only
@backends
def test_many_calls_without_waiting(backend: str, device: torch.device) -> None:
    """Tables of addresses that were reused before a kernel has read them would show: each call has other tensors."""
    lists = [(make([(5000,)] * 40, torch.float32, i, device), make([(5000,)] * 40, torch.float32, 99, device))
             for i in range(6)]  # fmt: skip
    expected = [reference.multi_tensor_dots(f, r, [0] * 40, 1) for f, r in lists]
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    results = [(i, kernels(backend).multi_tensor_dots(*lists[i], [0] * 40, 1)) for _ in range(20) for i in range(6)]
    for i, dots in results:
        assert_dots_close(dots, expected[i], torch.float32)


@cuda_only
@backends
def test_another_device_than_the_current(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda:1")
    forget, retain = make([(5000,)], torch.float32, 0, other), make([(5000,)], torch.float32, 1, other)
    expected = reference.multi_tensor_dots(forget, retain, [0], 1)
    with torch.cuda.device(0):
        actual = kernels(backend).multi_tensor_dots(forget, retain, [0], 1)
    assert actual.device == other
    assert_dots_close(actual, expected, torch.float32)


@cuda_only
@backends
@pytest.mark.parametrize("stash", [torch.bfloat16, torch.int8], ids=str)
def test_one_tensor_of_more_than_2_31_elements(backend: str, stash: torch.dtype, device: torch.device) -> None:
    numel = 2**31 + 4 * 256 + 3
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip(f"needs 16 GiB of free memory, there are {torch.cuda.mem_get_info()[0] / 2**30:.0f}")
    # Values that are exact in every dtype; the last elements, which an index of 32 bits would miss, have their own.
    forget, scales = torch.ones(numel, dtype=stash, device=device), []
    if stash is torch.int8:
        scales = [torch.ones(-(-numel // 256), device=device)]
    retain = torch.full((numel,), 2.0, dtype=torch.bfloat16, device=device)
    forget[-5:], retain[-3:] = 4, 8.0
    dots = kernels(backend).multi_tensor_dots([forget], [retain], [0], 1, scales)[0].tolist()
    assert dots == [2.0 * (numel - 5) + 2 * 8 + 3 * 32, numel - 5 + 5 * 16.0, 4.0 * (numel - 3) + 3 * 64]
    weights = coefficients(device, (0.5, 0.25))
    kernels(backend).multi_tensor_blend_([retain], [forget], weights, [0], scales)
    assert retain[-6:].tolist() == [1.0, 2.5, 2.5, 4.0, 4.0, 4.0]
    assert bool((retain[:-5] == 1.0).all())


@cuda_only
@gradients
def test_native_agrees_with_triton(dtype: torch.dtype, stash: torch.dtype, device: torch.device) -> None:
    for backend in ("native", "triton"):
        if reason := kernels(backend).why_not(device):
            pytest.skip(f"{backend}: {reason}")
    sizes = SHAPES["odd and empty"] + SHAPES["around chunks"]
    forget, scales = stashed(make(sizes, dtype, 0, device), stash)
    rows, found = [0] * len(sizes), []
    for backend in ("native", "triton"):
        retain = make(sizes, dtype, 1, device)
        dots = kernels(backend).multi_tensor_dots(forget, retain, rows, 1, scales)
        kernels(backend).multi_tensor_blend_(retain, forget, coefficients(device), rows, scales)
        found.append((dots, retain))
    assert_dots_close(found[0][0], found[1][0], dtype, rounding=DOT_TOLERANCE[dtype])  # Each is as far off as allowed.
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b)  # Every product and every sum is rounded, once, in one order.
