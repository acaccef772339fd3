"""The tracker against cases that are counted by hand and against the process, and the command end to end."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import memory_bench
import memory_methods
import pytest
import torch
from memory_tracker import (
    ALLOCATOR,
    CATEGORIES,
    GRADIENTS,
    PARAMETERS,
    REST,
    STASH,
    STATE,
    MemoryTracker,
    process_peak,
    tensors_in,
)
from torch import nn

from blur_optim.step.stash import STASHES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KIB = 1024


def kib(count: int) -> torch.Tensor:
    return torch.empty(count * KIB, dtype=torch.uint8)


def test_memory_counts_from_its_allocation_until_it_is_free() -> None:
    with MemoryTracker() as tracker:
        a, b = kib(3), kib(4)
        assert tracker.current == 7 * KIB
        del a
        assert tracker.current == 4 * KIB
        c = kib(2)
        assert tracker.current == 6 * KIB
        assert tracker.peak == 7 * KIB  # Above what is there now: the peak remembers.
        del b, c
    assert tracker.current == 0


def test_what_is_freed_outside_of_the_mode_is_no_longer_counted() -> None:
    with MemoryTracker() as tracker:
        a = kib(3)
    del a
    assert tracker.current == 0


def test_views_share_one_storage_which_lives_as_long_as_the_last() -> None:
    with MemoryTracker() as tracker:
        a = kib(4)
        part = a.view(4, KIB)[1]
        also = a.detach()
        assert tracker.current == 4 * KIB
        del a, also
        assert tracker.current == 4 * KIB
        del part
        assert tracker.current == 0


def test_in_place_operators_allocate_nothing() -> None:
    a = torch.zeros(KIB)
    with MemoryTracker() as tracker:
        tracker.label(PARAMETERS, [a])
        a.add_(1).mul_(2)
        torch._foreach_mul_([a], 2.0)
        assert tracker.peak == 4 * KIB
        a + 1
        assert tracker.peak == 8 * KIB
        assert tracker.current == 4 * KIB


def test_a_resized_storage_counts_with_its_new_size() -> None:
    with MemoryTracker() as tracker:
        a = kib(1)
        a.resize_(3 * KIB)
        assert tracker.current == 3 * KIB


def test_other_devices_are_not_counted() -> None:
    with MemoryTracker() as tracker:
        elsewhere = torch.empty(KIB, device="meta")
        assert tracker.current == 0
    del elsewhere


def test_the_peak_begins_anew_from_what_is_there() -> None:
    with MemoryTracker() as tracker:
        kept, dropped = kib(1), kib(8)
        del dropped
        tracker.reset_peak()
        assert tracker.peak == KIB
        assert tracker.at_peak == dict.fromkeys(CATEGORIES, 0) | {REST: KIB}
    del kept


def test_what_autograd_saves_counts_until_the_graph_is_gone() -> None:
    x = torch.ones(KIB, requires_grad=True)
    with MemoryTracker([x]) as tracker:
        tracker.label(PARAMETERS, [x])
        y = x.exp()  # Its result is saved for the backward pass,
        loss = y.sum()
        del y
        assert tracker.current == 8 * KIB + 4
        loss.backward()  # which frees it.
        del loss
    assert tracker.by_category() == dict.fromkeys(CATEGORIES, 0) | {PARAMETERS: 4 * KIB, GRADIENTS: 4 * KIB}


def test_gradients_that_move_to_a_stash_change_their_category() -> None:
    p = nn.Parameter(torch.ones(KIB))
    with MemoryTracker([p]) as tracker:
        tracker.label(PARAMETERS, [p])
        p.sum().backward()
        first = p.grad
        tracker.label(STASH, [first])
        assert tracker.by_category()[GRADIENTS] == 4 * KIB  # It is still the gradient of p.
        p.grad = None
        assert tracker.by_category()[STASH] == 4 * KIB
        p.square().sum().backward()
        assert tracker.by_category()[GRADIENTS] == tracker.by_category()[STASH] == 4 * KIB
        tracker.label(PARAMETERS, [first])  # A label stays.
        assert tracker.by_category()[PARAMETERS] == 4 * KIB


def test_the_categories_are_those_of_the_peak_not_of_the_end() -> None:
    p = nn.Parameter(torch.ones(KIB))
    opt = torch.optim.AdamW([p], fused=True)
    p.grad = torch.ones(KIB)
    opt.step()
    with MemoryTracker([p]) as tracker:
        tracker.label(PARAMETERS, [p])
        tracker.label(STATE, tensors_in(opt.state))
        tracker.label(GRADIENTS, [p.grad])
        scratch = torch.empty(2 * KIB)
        del scratch
        opt.zero_grad()
    expected = {PARAMETERS: 4 * KIB, STATE: 8 * KIB + 4, GRADIENTS: 4 * KIB, STASH: 0, REST: 8 * KIB}
    assert tracker.at_peak == expected
    assert tracker.current == 12 * KIB + 4


def test_tensors_are_found_in_containers_and_objects_but_not_among_keys() -> None:
    class Holder:
        def __init__(self) -> None:
            self.kept = {torch.zeros(1): (torch.ones(2), [torch.ones(3)])}
            self.itself = self
            self.name = "no tensor"

    assert sorted(t.numel() for t in tensors_in(Holder())) == [2, 3]


KNOWN_SIZE = """
import torch
from memory_tracker import MemoryTracker, process_peak

def run():
    a = torch.zeros(25 << 20)           # 100 MiB that stay,
    for _ in range(3):
        b = a + 1                       # and as much again, three times.
        del b

run()
seen = process_peak(run)
with MemoryTracker() as tracker:
    run()
print(tracker.peak, seen)
"""


@pytest.mark.skipif(process_peak(lambda: None) is None, reason="the kernel does not tell the peak of a process")
def test_the_tracker_agrees_with_the_process() -> None:
    environment = os.environ | ALLOCATOR | {"PYTHONPATH": str(BENCHMARKS), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", KNOWN_SIZE], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    tracked, seen = map(int, result.stdout.split())
    assert tracked == 200 << 20
    assert abs(seen - tracked) < 0.03 * tracked


TINY = memory_bench.settings_of("tiny", threads=1)


def test_the_check_before_measuring_accepts_another_way_to_the_same_update() -> None:
    assert memory_bench.check(TINY, ["original"])["original"] < 1e-6


@pytest.mark.parametrize("wrong", ["weighted_sum", "pcgrad"])
def test_the_check_before_measuring_refuses_another_update(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong == "pcgrad":
        pytest.importorskip("pytorch_optimizer", reason="needs pytorch-optimizer: pip install 'blur_optim[bench]'")
    widest = max(memory_methods.STASH_TOLERANCES.values())
    made = replace(memory_bench.METHODS[wrong], tolerance=widest)
    monkeypatch.setitem(memory_bench.METHODS, wrong, made)
    with pytest.raises(AssertionError, match=f"The step of {wrong} is wrong"):
        memory_bench.check(TINY, [wrong])


def test_a_limit_over_the_weighted_sum_and_one_of_its_own_hold_together() -> None:
    limit = memory_bench.Limit(over_sum=1.0, peak=(0, 2.05))
    assert limit.peak_bounds(1.0) == (0, 2.0)
    assert limit.peak_bounds(1.4) == (0, 2.05)
    assert memory_bench.Limit(over_sum=0.5).peak_bounds(1.4) == (0, 1.9)
    assert memory_bench.Limit().peak_bounds(1.4) is None


def test_a_missed_limit_shows() -> None:
    assert memory_bench.verdict(2.04, 0, 2.05) == "≤ 2.05 ok"
    assert memory_bench.verdict(2.06, 0, 2.05) == "≤ 2.05 MISSED"
    assert memory_bench.verdict(3.2, 3.3, float("inf")) == "≥ 3.30 MISSED"
    assert memory_bench.verdict(1.7, 1.58, 1.83) == "1.58-1.83 ok"
    assert memory_bench.verdict(1.7, None, None) == ""


def test_the_command_measures_every_method(tmp_path: Path) -> None:
    # One test, so that no other worker of pytest-xdist runs the command again.
    pytest.importorskip("torchjd", reason="needs torchjd: pip install 'blur_optim[bench]'")
    pytest.importorskip("pytorch_optimizer", reason="needs pytorch-optimizer: pip install 'blur_optim[bench]'")
    table = run_tiny(tmp_path)
    others = {
        "weighted_sum",
        "two_backwards",
        "dots_in_hooks",
        "original",
        "torchjd",
        "torchjd_lean",
        "pcgrad",
        "metric",
    }
    assert others | set(STASHES) <= table.keys()
    assert all(row["time"] > 0 for row in table.values())
    assert table["weighted_sum"]["time"] == 1
    check_parts(table)
    check_order({method: row["peak"] for method, row in table.items()})


def run_tiny(out: Path) -> dict[str, dict[str, float]]:
    """The numbers of the CSV by method and column."""
    command = [sys.executable, str(BENCHMARKS / "memory_bench.py"), "--model", "tiny", "--rounds", "2"]
    command += [
        "--threads",
        "1",
        "--device",
        "cpu",
        "--csv",
        str(out / "memory.csv"),
        "--plot",
        str(out / "memory.png"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    assert "Peak above parameters and optimizer state" in result.stdout
    assert (out / "memory.png").read_bytes().startswith(b"\x89PNG")
    first, *lines = (out / "memory.csv").read_text().splitlines()
    assert first.startswith("# cpu")
    rows = {row.pop("method"): row for row in csv.DictReader(lines)}
    return {method: {name: float(value) for name, value in row.items() if value} for method, row in rows.items()}


def check_parts(table: dict[str, dict[str, float]]) -> None:
    for row in table.values():
        unit = row["unit_bytes"]
        parts = ("gradients", "stash", "activations_and_temporaries")
        assert sum(row[f"{part}_bytes"] for part in parts) == pytest.approx(row["peak"] * unit)
        assert row["parameters_bytes"] == pytest.approx(unit, rel=1e-3)  # Beside them only the buffers of the rotation.
        assert row["optimizer_state_bytes"] == pytest.approx(2 * unit, rel=1e-3)
    unit = table["weighted_sum"]["unit_bytes"]
    assert table["weighted_sum"]["stash_bytes"] == 0
    # Beside the gradients, what BLUR keeps are the few numbers of the last projection.
    assert table["reference"]["stash_bytes"] == pytest.approx(unit, abs=256)
    assert table["original"]["stash_bytes"] == 2 * unit


def check_order(peak: dict[str, float]) -> None:
    by_size = [method for method in ("int8", "bfloat16", "reference", "original") if method in peak]
    assert by_size == sorted(by_size, key=peak.__getitem__)
    ours = peak.keys() & {*STASHES, "recompute", "dots_in_hooks", "metric"}
    assert all(peak[method] <= peak["two_backwards"] + 1.01 for method in ours)
    assert all(max(peak[method] for method in ours) < peak[method] for method in ("original", "torchjd", "pcgrad"))
    for method in ("dots_in_hooks", "metric"):
        assert peak[method] == pytest.approx(peak["reference"], abs=0.01)
    if "recompute" in peak:
        assert peak["recompute"] < peak["reference"] - 0.5
