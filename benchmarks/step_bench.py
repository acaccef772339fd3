"""The whole optimizer step, through the public API, for the parameter lists of real models.

The baseline is the step of a weighted sum: one AdamW(fused=True) step on gradients that are already summed. BLUR
measures, projects and updates in ``opt.step(forget, retain)`` with closures that only assign gradients.

    python benchmarks/step_bench.py --models smollm-135m tiny --threads 1

``--host`` prints what a step costs the host beside its arithmetic: lists of small tensors, many param groups, a
compressed stash, each in units of AdamW(fused=True) on the same tensors and with the limit that it has to keep.

    python benchmarks/step_bench.py --host --threads 1
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from baselines import original_update
from harness import Candidate, Clock, Result, compare, header, show, write_csv
from rich.console import Console
from rich.table import Table
from torch import Tensor

from blur_optim import BLUR
from blur_optim.step.rules import RULES


def llama(hidden: int, layers: int, intermediate: int, vocabulary: int, kv: int, tied: bool) -> list[tuple[int, ...]]:
    """The parameter shapes of a Llama, layer by layer."""
    layer = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    layer += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate), (hidden,), (hidden,)]
    return [(vocabulary, hidden), *(layer * layers), (hidden,), *([] if tied else [(vocabulary, hidden)])]


def lora(hidden: int, layers: int, intermediate: int, kv: int, rank: int) -> list[tuple[int, ...]]:
    """The adapters of PEFT's LoRA on all linear layers of a Llama."""
    linear = llama(hidden, 1, intermediate, 0, kv, tied=True)[1:8]
    return [shape for out, inner in linear * layers for shape in ((rank, inner), (out, rank))]


MODELS: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "smollm-135m": lambda: llama(576, 30, 1536, 49152, 192, tied=True),
    "llama-1b": lambda: llama(2048, 16, 8192, 128256, 512, tied=True),
    "llama-7b": lambda: llama(4096, 32, 11008, 32000, 4096, tied=False),
    "lora-7b": lambda: lora(4096, 32, 11008, 4096, rank=16),
    "tiny": lambda: [(1000,)] * 3000,
}


@dataclass(frozen=True)
class HostCase:
    """A list of tensors on which a step is to cost at most ``limit`` times that of AdamW(fused=True), if it has one."""

    name: str
    shapes: list[tuple[int, ...]]
    limit: float | None
    groups: int = 1
    options: dict[str, object] = field(default_factory=dict)


HOST_CASES = (
    HostCase("3000 tensors of 1000 elements", [(1000,)] * 3000, 1.8),
    HostCase("300 tensors of 1000 elements", [(1000,)] * 300, 1.8),
    HostCase("3000 tensors in 300 groups", [(1000,)] * 3000, 2.0, groups=300),
    HostCase("300 tensors of 1000, stash='int8'", [(1000,)] * 300, 4.0, options={"stash": "int8"}),
    HostCase("300 tensors of 1000, metric='retain'", [(1000,)] * 300, None, options={"metric": "retain"}),
    HostCase("3000 tensors of 1000, metric='retain'", [(1000,)] * 3000, None, options={"metric": "retain"}),
    HostCase("128M elements in 16 tensors", [(1 << 23,)] * 16, 1.7),
)


def host_table(arguments: argparse.Namespace, console: Console) -> list[Result]:
    """Time the cases of ``HOST_CASES``, each beside its own baseline."""
    device, clock = torch.device(arguments.device), Clock(torch.device(arguments.device))
    table = Table(title="host: BLUR in units of AdamW(fused=True) on the same tensors", title_justify="left")
    for column in ("tensors", "ratio", "20-80 %", "limit"):
        table.add_column(column, justify="left" if column == "tensors" else "right", no_wrap=True)
    results: list[Result] = []
    for case in HOST_CASES:
        baseline, (blur,) = host_candidates(case, device)
        source, target = torch.randn(2, 1 << 20, device=device)
        copy = Candidate("copy", lambda s=source, t=target: t.copy_(s), 2 * source.nbytes)
        rounds = arguments.rounds * (5 if len(case.shapes) <= 300 else 1)  # The shorter, the noisier.
        found, *_ = compare(case.name, [blur], baseline, copy, clock, rounds, dtype="float32", size=case.name)
        limit = "" if case.limit is None else f"{case.limit:.1f}"
        table.add_row(case.name, f"{found.ratio:.2f}", f"{found.ratio_20:.2f}-{found.ratio_80:.2f}", limit)
        results.append(found)
    console.print(table)
    return results


def host_candidates(case: HostCase, device: torch.device) -> tuple[Candidate, list[Candidate]]:
    """One BLUR and its baseline, each with its own state, over the same parameters in equal groups."""
    forget, retain = randn(case.shapes, device, torch.float32), randn(case.shapes, device, torch.float32)
    size = len(case.shapes) // case.groups

    params = [torch.nn.Parameter(t) for t in randn(case.shapes, device, torch.float32)]

    def groups() -> list[dict[str, object]]:
        return [{"params": params[i : i + size]} for i in range(0, len(params), size)]

    adamw = torch.optim.AdamW(groups(), lr=1e-5, fused=True)
    opt = BLUR(groups(), torch.optim.AdamW, lr=1e-5, fused=True, **case.options)

    def assign(grads: Sequence[Tensor]) -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    def weighted_sum() -> None:
        assign(retain)
        adamw.step()
        adamw.zero_grad()

    def blur() -> None:
        opt.step(lambda: assign(forget), lambda: assign(retain))

    return Candidate("baseline: AdamW(fused=True)", weighted_sum), [Candidate("BLUR", blur)]


def randn(shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def candidates(
    shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype, rules: Sequence[str]
) -> tuple[Candidate, list[Candidate]]:
    params = [torch.nn.Parameter(t) for t in randn(shapes, device, dtype)]
    forget, retain = randn(shapes, device, dtype), randn(shapes, device, dtype)
    adamw = torch.optim.AdamW(params, lr=1e-5, fused=True)

    def assign(grads: Sequence[Tensor]) -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    def weighted_sum() -> None:
        assign(retain)
        adamw.step()
        adamw.zero_grad()

    def original() -> None:
        assign(original_update(forget, retain, gamma=1.0))
        adamw.step()
        adamw.zero_grad()

    def step_of(opt: BLUR) -> Callable[[], object]:
        return lambda: opt.step(lambda: assign(forget), lambda: assign(retain))

    def blur(**options: object) -> BLUR:
        opt = BLUR(params, torch.optim.AdamW, lr=1e-5, fused=True, **options)
        opt.state = adamw.state  # One for all, or large models would not fit.
        return opt

    found = [Candidate(f"BLUR, rule={rule!r}", step_of(blur(rule=rule))) for rule in rules]
    found.append(Candidate("BLUR, metric='retain'", step_of(blur(metric="retain"))))
    found.append(Candidate("BLUR, scope='parameter'", step_of(blur(scope="parameter"))))
    found.append(Candidate("BLUR, clipped", step_of(blur(max_grad_norm=1.0))))
    found.append(Candidate("BLUR, backend='foreach'", step_of(blur(backend="foreach"))))
    found.append(Candidate("original code", original))
    return Candidate("baseline: AdamW(fused=True)", weighted_sum), found


def run(arguments: argparse.Namespace, console: Console) -> list[Result]:
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = Clock(device)
    console.print(header(device, clock), highlight=False)
    if arguments.host:
        return host_table(arguments, console)
    results: list[Result] = []
    dtype = getattr(torch, arguments.dtype)
    for name in arguments.models:
        shapes = MODELS[name]()
        baseline, others = candidates(shapes, device, dtype, arguments.rules)
        source, target = torch.randn(2, 1 << 24, device=device)
        copy = Candidate("copy of 64 MiB", lambda s=source, t=target: t.copy_(s), 2 * source.nbytes)
        found = compare(name, others, baseline, copy, clock, arguments.rounds, dtype=arguments.dtype, size=name)
        count = sum(torch.Size(shape).numel() for shape in shapes)
        show(f"{name}: {len(shapes)} tensors, {count / 1e6:.0f}M {arguments.dtype} parameters", found[:-1], console)
        results += found
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm-135m", "tiny"])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=["blur", "weighted_sum", "normalized"])
    parser.add_argument("--threads", type=int, help="CPU threads; 1 measures CPU time")
    parser.add_argument("--host", action="store_true", help="the table of the host's time and its limits alone")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    console = Console()
    results = run(arguments, console)
    if arguments.csv:
        write_csv(arguments.csv, results, header(torch.device(arguments.device), Clock(torch.device(arguments.device))))


if __name__ == "__main__":
    main()
