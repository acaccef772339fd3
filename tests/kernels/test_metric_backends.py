"""The metric's operations on every CPU backend against the float64 reference: values, layouts, reproducibility."""

import pytest
import torch
from metric_case import KINDS, OPERATIONS, SOME_KINDS, MetricCase
from torch import Tensor

from blur_optim.kernels import BACKENDS, foreach
from blur_optim.kernels.blocks import BLOCK_SIZE
from blur_optim.kernels.select import why_not

NAMES = [name for name in ("foreach", "native") if not why_not(name, torch.device("cpu"))]
CHUNK = 32768
NUMELS = [CHUNK + BLOCK_SIZE + 1, 0, 257, 1, 7, 2 * CHUNK + 5, 16, foreach.CPU_SLAB_SIZE + 33, BLOCK_SIZE - 1]
SMALL = [35, 7, 300, 6]
# Around the vectors and the blocks; chunks and slabs do not depend on a dtype.
MANY = [600, 0, 257, 1, 7, 1029, 16, 255]
FLOAT = (torch.float32,) * 3


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone(memory_format=torch.preserve_format) for t in tensors]


over_backends = pytest.mark.parametrize("backend", NAMES)


# The compiled kernels are others for every kind.
VALUES = [(name, kind) for name in NAMES for kind in (KINDS if name == "native" else SOME_KINDS)]


@pytest.mark.parametrize(("backend", "dtypes"), VALUES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_values(backend, dtypes, operation):
    case = MetricCase(dtypes, MANY)
    case.assert_close(case.run(BACKENDS[backend], operation, clones), operation)


@over_backends
@pytest.mark.parametrize("operation", OPERATIONS)
def test_values_beyond_a_chunk(backend, operation):
    case = MetricCase((torch.float32, torch.bfloat16, torch.int8), NUMELS)
    case.assert_close(case.run(BACKENDS[backend], operation, clones), operation)


OPTIONS = {
    "amsgrad": ("adamw", {"amsgrad": True}),
    "L2": ("adamw", {"decoupled": False}),
    "maximize": ("adamw", {"maximize": True}),
    "plain": ("sgd", {"momentum": 0.0, "dampening": 0.0}),
    "nesterov": ("sgd", {"nesterov": True, "dampening": 0.0}),
    "first-step": ("sgd", {"first_step": True}),
    "maximize-sgd": ("sgd", {"maximize": True}),
}


@over_backends
@pytest.mark.parametrize(("operation", "options"), OPTIONS.values(), ids=OPTIONS)
def test_options(backend, operation, options):
    case = MetricCase((torch.float64,) * 3, SMALL, amsgrad=options.get("amsgrad", False))
    case.assert_close(case.run(BACKENDS[backend], operation, clones, **options), operation, **options)


@over_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dots_with_amsgrad(backend, dtype):
    case = MetricCase((dtype,) * 3, MANY, amsgrad=True)
    case.assert_close(case.run(BACKENDS[backend], "dots", clones), "dots")


LAYOUTS = {
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "transposed": lambda t: t.view(-1, 5).t().contiguous().t() if t.numel() % 5 == 0 else t,
}


@over_backends
@pytest.mark.parametrize("operation", OPERATIONS)
def test_dense_layouts_do_not_matter(backend, operation):
    results = []
    for layout in (lambda t: t, LAYOUTS["misaligned"]):
        case = MetricCase((torch.float32,) * 3, SMALL, layout)
        results.append(case.run(BACKENDS[backend], operation, clones))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@over_backends
@pytest.mark.parametrize("odd", ["forget", "retain", "exp_avg_sqs"])
@pytest.mark.parametrize("operation", ["dots", "blend"])
def test_unlike_layouts(backend, odd, operation):
    """Those of the updates are sorted out by the step; the dots and the blend take any."""
    case = MetricCase((torch.float64,) * 3, [35, 40], lambda t: t.view(-1, 5), absent=False)
    tensors = getattr(case, odd)
    tensors[0] = tensors[0].t().contiguous().t()
    tensors[1] = torch.stack([tensors[1], tensors[1]], dim=-1)[..., 0]
    kept = lambda ts: [t if t is tensors[1] and odd != "exp_avg_sqs" else t.clone() for t in ts]  # noqa: E731
    case.assert_close(case.run(BACKENDS[backend], operation, kept if operation == "dots" else clones), operation)


@over_backends
@pytest.mark.parametrize("operation", ["blend", "adamw", "sgd"])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf(backend, operation, found):
    case = MetricCase((torch.float32,) * 3, SMALL)
    actual = case.run(BACKENDS[backend], operation, clones, found_inf=torch.tensor(found))
    expected = case.run(BACKENDS[backend], operation, clones)
    if found and operation == "blend":  # The update shows what was found; v stays.
        expected[len(SMALL) :] = case.exp_avg_sqs
    elif found:
        expected = [*case.params, *case.exp_avgs, *case.exp_avg_sqs]
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@over_backends
def test_the_same_bits_on_any_number_of_threads(backend, restore_threads):
    case = MetricCase((torch.float32,) * 3, [300_001, 7, *[33] * 60])
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(case.run(BACKENDS[backend], "dots", clones)[0])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", [*NAMES, "reference"])
def test_v_as_it_is(backend):
    """beta2 1 and weight 0: the step after a blend that has advanced v is the fused one."""
    case = MetricCase((torch.float64,) * 3, SMALL, absent=False)
    kernels = BACKENDS[backend]
    fused = case.run(kernels, "adamw", clones)
    blended = case.run(kernels, "blend", clones)
    case.retain, case.exp_avg_sqs = blended[: len(SMALL)], blended[len(SMALL) :]
    case.forget = [t[:0] for t in case.forget]
    case.coefficients = torch.tensor([[0.0, 1.0]] * 2, dtype=torch.float64)
    case.metric = torch.cat([torch.tensor([[1.0, 0.0]]).double().expand(len(SMALL), 2), case.metric[:, 2:]], dim=1)
    for x, y in zip(case.run(kernels, "adamw", clones), fused, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("backend", [*NAMES, "reference"])
def test_no_tensors(backend):
    dots = BACKENDS[backend].multi_tensor_metric_dots([], [], [], [], [], 2, torch.empty(0, 5).double())
    assert torch.equal(dots, torch.zeros(2, 9, dtype=torch.float64))


@over_backends
def test_an_all_zero_history_is_harmless(backend):
    """Where nothing was seen P is 1 / eps: finite, in float32 too."""
    case = MetricCase((torch.float32,) * 3, [5], absent=False)
    case.rows, case.exp_avg_sqs, case.retain = [0], [torch.zeros(5)], [torch.zeros(5)]
    case.metric = torch.tensor([[0.9, 0.1, 1.0, 0.0, 1e-8]], dtype=torch.float64)
    dots = case.run(BACKENDS[backend], "dots", clones)[0][0]
    assert dots.isfinite().all()
    assert float(dots[6]) == pytest.approx(1e16 * float(dots[1]), rel=1e-5)
