"""Steps that keep a plan against steps whose plan is thrown away each time: the same bits, whatever comes when."""

import itertools
from functools import partial

import pytest
import torch
from helpers import NO_NATIVE, assert_same_bits, snapshot
from torch import nn
from torch.optim import SGD, Adadelta, Adam, AdamW

from blur_optim import BLUR
from blur_optim.step.base_state import Counts
from blur_optim.step.rules import RULES
from blur_optim.step.stash import STASHES

pytestmark = pytest.mark.skipif(bool(NO_NATIVE), reason=NO_NATIVE)

SHAPES = ((5, 7), (1,), (300,), (2, 3, 4), (0,), (9,), (3, 3))
GROUPS = ((0, 1, 2), (3,), (4, 5, 6))
# Of each step, the parameters without a gradient in the forget phase and in the retain phase.
MISSING = (
    ((), ()),
    ((), ()),
    ((1, 3), (2, 3)),
    ((1, 3), (2, 3)),
    ((), (5,)),
    ((), ()),
    ((0, 3), ()),
    ((), ()),
    ((), ()),
)


def made(base, dtype, **options):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]
    groups = [{"params": [params[i] for i in members]} for members in GROUPS]
    groups[1] |= {"gamma": 0.5, "lr": 0.02}
    groups[2] |= {"retain_weight": 2.0}
    return params, BLUR(groups, base, **{"lr": 0.05, **options})


def gradients(step, phase, dtype):
    generator = torch.Generator().manual_seed(10 * step + phase)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return [None if i in MISSING[step][phase] else grad for i, grad in enumerate(found)]


def take(params, opt, step, by_phases):
    def assign(phase):
        for p, grad in zip(params, gradients(step, phase, params[0].dtype), strict=True):
            p.grad = grad

    if not by_phases:
        opt.step(lambda: assign(0), lambda: assign(1))
        return
    with opt.forget():
        assign(0)
    with opt.retain():
        assign(1)
    opt.step()
    opt.zero_grad()


def check(base=AdamW, by_phases=False, dtype=torch.float32, **options):
    (params, opt), (others, renewed) = made(base, dtype, **options), made(base, dtype, **options)
    for step in range(len(MISSING)):
        take(params, opt, step, by_phases)
        take(others, renewed, step, by_phases)
        renewed._renew(renewed._two_phase.skipped)
        assert_same_bits(snapshot(opt), snapshot(renewed))
    kept = opt.statistics.to_dict()
    assert kept["skipped"] == 0
    assert kept["forget_norm"] > 0


def first_argument(dots, gamma, alpha):
    return gamma * dots.retain_forget.abs().sqrt(), alpha


BASES = {
    "AdamW": AdamW,
    "AdamW, fused": partial(AdamW, fused=True),
    "Adam, amsgrad": partial(Adam, amsgrad=True),
    "SGD, momentum": partial(SGD, momentum=0.9, nesterov=True),
    "SGD": SGD,
}
over_bases = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


@pytest.mark.parametrize("scope", ["global", "group", "parameter"])
@pytest.mark.parametrize("rule", [*RULES, first_argument], ids=lambda rule: rule if isinstance(rule, str) else "own")
def test_rules_and_scopes(rule, scope):
    check(rule=rule, scope=scope, max_grad_norm=1.5)


@pytest.mark.parametrize("by_phases", [False, True], ids=["closures", "phases"])
@pytest.mark.parametrize("stash", sorted(STASHES.keys() - {"recompute"}))
@over_bases
def test_bases_and_stashes(base, stash, by_phases):
    check(base, by_phases, stash=stash)


@pytest.mark.parametrize("by_phases", [False, True], ids=["closures", "phases"])
@pytest.mark.parametrize("stash", ["reference", "int8"])
@over_bases
def test_in_the_metric(base, stash, by_phases):
    check(base, by_phases, stash=stash, metric="retain")


@pytest.mark.parametrize("metric", ["euclidean", "retain"])
@pytest.mark.parametrize("backend", ["foreach", "native"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_backends(dtype, backend, metric):
    check(dtype=dtype, backend=backend, metric=metric)


def test_a_base_that_has_no_fused_update():
    check(Adadelta)


# -- The step counts as one tensor -------------------------------------------------------------------------------------


def some_counts(values=(1.0, 2.0, 3.0)):
    entries = [torch.tensor(value) for value in values]
    counts = Counts(entries)
    assert counts.are(entries)
    counts.gather()
    return entries, counts


def test_gathered_counts_are_the_same_objects_with_the_same_values():
    entries, counts = some_counts()
    before = list(entries)
    counts.add_(torch.tensor(1.0))
    assert [float(entry) for entry in entries] == [2.0, 3.0, 4.0]
    entries[1].fill_(7.0)  # As whoever sets a step count does.
    assert counts.read(torch.device("cpu"), torch.float32).tolist() == [2.0, 7.0, 4.0]
    assert all(a is b for a, b in zip(entries, before, strict=True))


@pytest.mark.parametrize("how", ["another object", "other memory"])
def test_counts_that_were_replaced_are_seen(how):
    entries, counts = some_counts()
    if how == "another object":
        entries[2] = torch.tensor(9.0)
    else:
        entries[2].data = torch.tensor(9.0)
    assert not counts.are(entries)


def test_counts_that_cannot_be_one_stay_apart():
    shared = torch.tensor(1.0)
    for entries in ([shared, shared], [torch.tensor(1.0), torch.tensor(1.0).double()]):
        counts = Counts(entries)
        counts.gather()
        counts.add_(torch.tensor(1.0))
        assert len({entry.untyped_storage().data_ptr() for entry in entries}) == len(set(map(id, entries)))


def set_count(opt, value):
    for state in opt.state.values():
        state["step"].data = torch.tensor(value)


def fill_count(opt, value):
    for state in opt.state.values():
        state["step"].fill_(value)


def replace_count(opt, value):
    for state in opt.state.values():
        state["step"] = torch.tensor(value)


@pytest.mark.parametrize("metric", ["euclidean", "retain"])
@pytest.mark.parametrize("change", [set_count, fill_count, replace_count], ids=lambda change: change.__name__)
def test_a_step_count_that_somebody_changes_is_the_one_that_counts(change, metric):
    (params, opt), (others, fresh) = (
        made(AdamW, torch.float32, metric=metric),
        made(AdamW, torch.float32, metric=metric),
    )
    for step in itertools.chain(range(2), (5, 7, 8)):
        if step == 5:
            change(opt, 100.0)
            change(fresh, 100.0)
        take(params, opt, step, by_phases=False)
        take(others, fresh, step, by_phases=False)
        fresh._renew(fresh._two_phase.skipped)
    assert {float(state["step"]) for state in opt.state.values()} == {103.0}
    assert_same_bits(snapshot(opt), snapshot(fresh))
