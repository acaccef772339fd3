"""Peak memory by category, and time, of one training step of a real transformer: what each way of unlearning costs.

The unit G is one gradient set in the model's dtype. Peaks are above parameters and optimizer state, of a step after the
first, each method's in a process of its own. The baseline is the weighted sum: one backward pass through the sum of
both losses, then AdamW(fused=True).

    python benchmarks/memory_bench.py --csv memory.csv --plot memory.png
    python benchmarks/memory_bench.py --methods reference int8 --rounds 0        # memory alone
"""

import argparse
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from baselines import Hold, Loss, original_step, pcgrad_step, torchjd_step
from harness import Candidate, Clock, Result, compare, header, write_csv
from memory_tracker import (
    ALLOCATOR,
    GRADIENTS,
    PARAMETERS,
    REST,
    STASH,
    STATE,
    MemoryTracker,
    cuda_peak,
    process_peak,
    tensors_in,
)
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from blur_optim import BLUR
from blur_optim.kernels import BACKENDS, select_backend
from blur_optim.losses import ga_loss, nll_loss
from blur_optim.stash import STASHES

GAMMA = 1.0
BASELINE = "weighted_sum"


@dataclass(frozen=True)
class Model:
    """A Llama with random weights.

    Args:
        tied: the embedding is the output layer. Autograd then holds three gradients of its size while it sums two,
            whichever method asked for them.
        batch, length: sequences of each of the two losses, and their tokens.
    """

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    tied: bool
    batch: int
    length: int

    def build(self) -> LlamaForCausalLM:
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=self.hidden,
                num_hidden_layers=self.layers,
                intermediate_size=self.intermediate,
                vocab_size=self.vocabulary,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                tie_word_embeddings=self.tied,
                use_cache=False,
            )
        )


#: Few tokens, so that gradients and not activations decide: with the first, the weighted sum's peak is 1.41 G.
MODELS = {
    "llama-134m": Model(768, 12, 2048, 32000, 12, 12, tied=False, batch=1, length=32),
    "smollm-135m": Model(576, 30, 1536, 49152, 9, 3, tied=True, batch=1, length=32),
    "tiny": Model(256, 2, 512, 2048, 4, 2, tied=False, batch=1, length=16),
}
DEFAULT_MODEL = "llama-134m"


@dataclass(frozen=True)
class Settings:
    """What the command line says; crosses to the measuring processes."""

    model: str
    batch: int
    length: int
    dtype: str = "float32"
    device: str = "cpu"
    checkpointing: bool = False
    threads: int | None = None


def settings_of(model: str, batch: int | None = None, length: int | None = None, **options: Any) -> Settings:
    """The settings with the model's own batch and length where none are given."""
    own = MODELS[model]
    return Settings(model, batch or own.batch, length or own.length, **options)


class Problem:
    """The model, a batch to forget, a batch to retain, and the one AdamW whose state all methods share."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(0)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.model = MODELS[settings.model].build().to(settings.device, getattr(torch, settings.dtype)).train()
        if settings.checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # The new name is not there in every transformers 5.
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        shape = (2, settings.batch, settings.length)
        self.forget_ids, self.retain_ids = torch.randint(self.model.config.vocab_size, shape, device=settings.device)
        # What is to be forgotten and retained at once: gradients of random tokens alone are orthogonal, and a wrong
        # coefficient would not show.
        half = settings.length // 2
        self.retain_ids[:, :half] = self.forget_ids[:, :half]
        self.params = list(self.model.parameters())
        self.hold: Hold = lambda tensors: None
        self.use_adamw(lr=1e-5)

    def use_adamw(self, **options: float) -> None:
        self.options = options
        self.adamw = torch.optim.AdamW(self.params, fused=True, **options)

    @property
    def unit(self) -> int:
        return sum(p.nbytes for p in self.params)

    def forget_loss(self) -> Tensor:
        return ga_loss(self.model(input_ids=self.forget_ids).logits, self.forget_ids)

    def retain_loss(self) -> Tensor:
        return nll_loss(self.model(input_ids=self.retain_ids).logits, self.retain_ids)


Step = Callable[[], object]


def weighted_sum(problem: Problem) -> Step:
    def step() -> None:
        (problem.forget_loss() + problem.retain_loss()).backward()
        problem.adamw.step()
        problem.adamw.zero_grad()

    return step


def two_backwards(problem: Problem) -> Step:
    """The weighted sum for who thinks of memory: the first graph is gone before the second is made."""

    def step() -> None:
        problem.forget_loss().backward()
        problem.retain_loss().backward()
        problem.adamw.step()
        problem.adamw.zero_grad()

    return step


def blur(problem: Problem, stash: str, backend: str | None = None) -> Callable[..., object]:
    options = {"gamma": GAMMA, "stash": stash, "backend": backend, "fused": True, **problem.options}
    opt = BLUR(problem.params, torch.optim.AdamW, **options)
    opt.state = problem.adamw.state

    def step(forget: Loss = problem.forget_loss, retain: Loss = problem.retain_loss) -> object:
        def named() -> Tensor:
            problem.hold(tensors_in({name: value for name, value in vars(opt).items() if name != "base"}))
            return retain()

        return opt.step(forget, named)

    return step


class DotsInHooks:
    """Kernels that take the dots of a parameter as soon as it has its retain gradient, which is in the cache then."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels
        self.rows: list[Tensor] = []
        self.forget: dict[Tensor, Tensor] = {}

    def hook(self, p: Tensor) -> None:
        self.rows.append(self.kernels.multi_tensor_dots([self.forget[p]], [p.grad], [0], 1))

    def multi_tensor_dots(self, *arguments: object) -> Tensor:
        rows, self.rows = self.rows, []
        return torch.stack(rows).sum(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)


def dots_in_hooks(problem: Problem) -> Step:
    """An experiment, as ``reference`` but for where the dots are taken."""
    kernels = DotsInHooks(select_backend(None, problem.params[0].device))
    BACKENDS["dots_in_hooks"] = kernels
    step_of = blur(problem, "reference", "dots_in_hooks")

    def forget() -> Tensor:
        loss = problem.forget_loss()
        loss.backward()
        kernels.forget = {p: p.grad for p in problem.params}
        return loss.detach()

    def retain() -> Tensor:
        handles = [p.register_post_accumulate_grad_hook(kernels.hook) for p in problem.params]
        loss = problem.retain_loss()
        loss.backward()
        for handle in handles:
            handle.remove()
        kernels.forget.clear()
        return loss.detach()

    return lambda: step_of(forget, retain)


def original(problem: Problem) -> Step:
    p = problem
    return lambda: original_step(p.params, p.adamw, p.forget_loss, p.retain_loss, GAMMA, p.hold)


def torchjd(problem: Problem, lean: bool) -> Step:
    p = problem
    return lambda: torchjd_step(p.params, p.adamw, p.forget_loss, p.retain_loss, GAMMA, p.hold, lean)


def pcgrad(problem: Problem) -> Step:
    return lambda: pcgrad_step(problem.adamw, problem.forget_loss, problem.retain_loss)


@dataclass(frozen=True)
class Limit:
    """What a method has to meet, with the default model, batch and length in float32.

    Args:
        over_sum: peak above that of the weighted sum, in G.
        peak: bounds of the peak itself, in G.
        time: bounds of the time over that of the weighted sum.
    """

    over_sum: float | None = None
    peak: tuple[float, float] | None = None
    time: tuple[float, float] | None = None

    def peak_bounds(self, weighted_sum: float) -> tuple[float, float] | None:
        if self.over_sum is None:
            return self.peak
        low, high = self.peak or (0.0, float("inf"))
        return low, min(high, weighted_sum + self.over_sum)


@dataclass(frozen=True)
class Method:
    """One way to take a step.

    Args:
        tolerance: for ways to compute BLUR's update, how far theirs may be from that of ``reference``, relative to its
            norm: roundings of float32 sums, or what the stash's format keeps. None: another update.
    """

    title: str
    make: Callable[[Problem], Step]
    limit: Limit = field(default_factory=Limit)
    tolerance: float | None = None


LIMITS = {
    "reference": Limit(over_sum=1.0, peak=(0, 2.05), time=(0, 1.06)),
    "bfloat16": Limit(over_sum=0.55, time=(0, 1.08)),
    "int8": Limit(over_sum=0.30),
    "recompute": Limit(over_sum=0.05, time=(0, 1.55)),
    "original": Limit(peak=(3.3, float("inf")), time=(1.58, 1.83)),
}
EXACT = 1e-3
#: TorchJD's Gramian is one float32 matrix product over all parameters; 5e-3 was measured on 134M.
LONG_SUMS = 2e-2
#: A stash of 8 mantissa bits rounds u by up to 4e-3 of an element; int8 in blocks of 256 by 6e-3 of its norm, measured.
STASH_TOLERANCES = {"bfloat16": 1e-2, "int8": 3e-2}
#: Parameters in bfloat16 round the update that is compared, by up to 4e-3 of the parameter.
DTYPE_TOLERANCES = {"float32": 0.0, "bfloat16": 2e-2}


def stashes() -> list[str]:
    """The stashes that ``BLUR`` accepts; ``"recompute"`` need not be in the table of those that hold a copy."""
    accepted = []
    for name in dict.fromkeys([*STASHES, "recompute"]):
        try:
            BLUR([torch.nn.Parameter(torch.zeros(1))], lr=0.0, stash=name)
        except ValueError:
            continue
        accepted.append(name)
    return accepted


def methods() -> dict[str, Method]:
    found = {BASELINE: Method("weighted sum", weighted_sum)}
    found["two_backwards"] = Method("sum, two backwards", two_backwards)
    for name in stashes():
        tolerance = STASH_TOLERANCES.get(name, EXACT)
        found[name] = Method(f"BLUR, {name}", partial(blur, stash=name), LIMITS.get(name, Limit()), tolerance)
    found["dots_in_hooks"] = Method("reference, dots in hooks", dots_in_hooks, tolerance=EXACT)
    found["original"] = Method("original code", original, LIMITS["original"], EXACT)
    found["torchjd"] = Method("TorchJD", partial(torchjd, lean=False), tolerance=LONG_SUMS)
    found["torchjd_lean"] = Method("TorchJD, lean", partial(torchjd, lean=True), tolerance=LONG_SUMS)
    found["pcgrad"] = Method("PCGrad", pcgrad)
    return found


METHODS = methods()


@dataclass
class Peak:
    """Bytes at the peak of one step.

    Args:
        process: from the process's resident memory, or from CUDA's allocator; None where the system does not tell.
    """

    unit: int
    at_peak: dict[str, int]
    process: int | None

    @property
    def above_state(self) -> float:
        """In G, without parameters and optimizer state."""
        return sum(self.at_peak[name] for name in (GRADIENTS, STASH, REST)) / self.unit


def measure(settings: Settings, name: str) -> Peak:
    """Take the peak of a method's second step (process) and third (tracker). For a process of its own."""
    problem = Problem(settings)
    step = METHODS[name].make(problem)
    step()
    device = problem.params[0].device.type
    process = cuda_peak(step) if device == "cuda" else process_peak(step)
    tracker = MemoryTracker(problem.params, device)
    tracker.label(PARAMETERS, [*problem.params, *problem.model.buffers()])
    tracker.label(STATE, tensors_in(problem.adamw.state))
    problem.hold = partial(tracker.label, STASH)
    tracker.reset_peak()
    with tracker:
        step()
    return Peak(problem.unit, tracker.at_peak, process)


def check(settings: Settings, names: Iterable[str]) -> dict[str, float]:
    """Return how far the update of each way to take BLUR's step is from that of ``reference``, relative to its norm.

    With eps far above the gradients, the first step of AdamW is proportional to the update; with the usual one it is
    its sign, which the smallest roundings turn. The learning rate lifts the step above the roundings of parameters.

    Raises:
        AssertionError: beyond the tolerance.
    """
    problem = Problem(settings)
    start = [p.detach().clone() for p in problem.params]

    def change(name: str) -> list[Tensor]:
        with torch.no_grad():
            torch._foreach_copy_(problem.params, start)
        problem.use_adamw(lr=100.0, eps=1.0, weight_decay=0.0)
        METHODS[name].make(problem)()
        return [p.detach() - s for p, s in zip(problem.params, start, strict=True)]

    expected = change("reference")
    errors = {}
    for name in names:
        tolerance = METHODS[name].tolerance
        if tolerance is None or name == "reference":
            continue
        errors[name] = _distance(change(name), expected)
        allowed = tolerance + DTYPE_TOLERANCES[settings.dtype]
        if not errors[name] <= allowed:
            raise AssertionError(f"The step of {name} is wrong: {errors[name]:.1e} from BLUR's, not {allowed:.0e}.")
    return errors


def _distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    difference = sum((a - e).double().square().sum() for a, e in zip(actual, expected, strict=True))
    return float((difference / sum(e.double().square().sum() for e in expected)).sqrt())


def in_new_process(run: Callable[..., Any], *arguments: object) -> Any:
    # The fork server has imported what takes long, and run nothing: its children start soon, and clean.
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(run, *arguments).result()


def time_steps(settings: Settings, names: Sequence[str], rounds: int) -> dict[str, Result]:
    """Time all methods in this process, in turn."""
    problem = Problem(settings)
    device = problem.params[0].device
    candidates = {name: Candidate(name, METHODS[name].make(problem)) for name in names}
    baseline = candidates.pop(BASELINE)
    source, target = torch.randn(2, 1 << 24, device=device)
    copy = Candidate("copy", lambda: target.copy_(source), 2 * source.nbytes)
    labels = {"dtype": settings.dtype, "size": settings.model}
    found = compare("step", list(candidates.values()), baseline, copy, Clock(device), rounds, **labels)
    return {result.candidate: result for result in found[:-1]}


@dataclass
class Row:
    """One line of the CSV. Peaks without a unit in the name are in G, above parameters and optimizer state."""

    method: str
    unit_bytes: int
    parameters_bytes: int
    optimizer_state_bytes: int
    gradients_bytes: int
    stash_bytes: int
    activations_and_temporaries_bytes: int
    peak: float
    over_sum: float
    peak_low: float | None
    peak_high: float | None
    process: float | None
    time: float | None
    time_20: float | None
    time_80: float | None
    time_low: float | None
    time_high: float | None
    error: float | None


def rows_of(
    settings: Settings, peaks: dict[str, Peak], times: dict[str, Result], errors: dict[str, float]
) -> list[Row]:
    rows = []
    has_limits = settings == replace(settings_of(DEFAULT_MODEL), device=settings.device, threads=settings.threads)
    baseline = peaks[BASELINE].above_state
    for name, peak in peaks.items():
        limit, time = METHODS[name].limit if has_limits else Limit(), times.get(name)
        low, high = limit.peak_bounds(baseline) or (None, None)
        time_low, time_high = limit.time or (None, None)
        rows.append(
            Row(
                name,
                peak.unit,
                *(peak.at_peak[category] for category in (PARAMETERS, STATE, GRADIENTS, STASH, REST)),
                peak.above_state,
                peak.above_state - baseline,
                low,
                high,
                None if peak.process is None else peak.process / peak.unit,
                *((time.ratio, time.ratio_20, time.ratio_80) if time else (None, None, None)),
                time_low,
                time_high,
                errors.get(name),
            )
        )
    return rows


def verdict(value: float, low: float | None, high: float | None) -> str:
    """A limit as the tables show it."""
    if low is None or high is None:
        return ""
    text = f"≤ {high:.2f}" if low == 0 else f"≥ {low:.2f}" if high == float("inf") else f"{low:.2f}-{high:.2f}"
    return f"{text} {'ok' if low <= value <= high else 'MISSED'}"


def show_memory(rows: Sequence[Row], console: Console) -> None:
    first = rows[0]
    title = f"Peak above parameters and optimizer state, in gradient sets of {first.unit_bytes / 1e6:.0f} MB"
    memory = Table("method", title=title, title_justify="left", box=SIMPLE_HEAD)
    memory.columns[0].no_wrap = True
    for name in ("peak", "limit", "process", "grads", "stash", "rest"):
        memory.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        parts = row.gradients_bytes, row.stash_bytes, row.activations_and_temporaries_bytes
        memory.add_row(
            METHODS[row.method].title,
            f"{row.peak:.2f}",
            verdict(row.peak, row.peak_low, row.peak_high),
            "" if row.process is None else f"{row.process:.2f}",
            *(f"{part / row.unit_bytes:.2f}" for part in parts),
        )
    console.print(memory)


def show_times(rows: Sequence[Row], console: Console) -> None:
    time = Table("method", title="Time of a step relative to the weighted sum's", title_justify="left", box=SIMPLE_HEAD)
    time.columns[0].no_wrap = True
    for name in ("ratio", "20-80 %", "limit", "error of u"):
        time.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        time.add_row(
            METHODS[row.method].title,
            f"{row.time:.2f}",
            f"{row.time_20:.2f}-{row.time_80:.2f}",
            verdict(row.time, row.time_low, row.time_high),
            "" if row.error is None else f"{row.error:.0e}",
        )
    console.print(time)


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = rows[0].time is not None
    figure, axes = plt.subplots(
        1, 1 + timed, figsize=(6 + 3 * timed, 0.4 * len(rows) + 1.4), layout="constrained", sharey=True, squeeze=False
    )
    memory = axes[0, 0]
    names = [METHODS[row.method].title for row in rows]
    left = [0.0] * len(rows)
    parts = [(GRADIENTS, "gradients_bytes", "#4477aa"), (STASH, "stash_bytes", "#ee6677")]
    parts.append((REST, "activations_and_temporaries_bytes", "#bbbbbb"))
    for label, column, color in parts:
        widths = [getattr(row, column) / row.unit_bytes for row in rows]
        memory.barh(names, widths, left=left, label=label, color=color)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    ends = [max(row.peak, row.process or 0) for row in rows]
    for y, (row, end) in enumerate(zip(rows, ends, strict=True)):
        memory.annotate(f"{row.peak:.2f}", (end, y), (5, 0), textcoords="offset points", va="center", fontsize=8)
    seen = [(row.process, y) for y, row in enumerate(rows) if row.process is not None]
    if seen:
        memory.scatter(*zip(*seen, strict=True), marker="|", color="black", zorder=3, label="peak of the process")
    memory.set_xlim(right=1.12 * max(ends))
    memory.invert_yaxis()
    memory.set_xlabel("gradient sets above parameters and optimizer state", fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    if timed:
        bars = axes[0, 1].barh(names, [row.time for row in rows], color="#228833")
        axes[0, 1].bar_label(bars, [f"{row.time:.2f}" for row in rows], padding=3, fontsize=8)
        axes[0, 1].axvline(1, color="black", linewidth=0.8)
        axes[0, 1].set_xlim(right=1.15 * max(row.time for row in rows))
        axes[0, 1].set_xlabel("time of a step / weighted sum", fontsize=9)
    for ax in axes[0]:
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=150)


def run(settings: Settings, names: Sequence[str], rounds: int, console: Console) -> list[Row]:
    errors = in_new_process(check, settings, names)
    progress = tqdm(names, desc="memory", leave=False, disable=None)
    peaks = {name: in_new_process(measure, settings, name) for name in progress}
    rows = rows_of(settings, peaks, {}, errors)
    show_memory(rows, console)
    if rounds:
        rows = rows_of(settings, peaks, time_steps(settings, names, rounds), errors)
        show_times(rows, console)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=MODELS, default=DEFAULT_MODEL)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", type=int, help="sequences of each loss")
    parser.add_argument("--length", type=int, help="tokens of a sequence")
    parser.add_argument("--dtype", choices=DTYPE_TOLERANCES, default="float32", help="of model, gradients and state")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations layer by layer")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing; 0 leaves it out")
    parser.add_argument("--threads", type=int, help="CPU threads; 1 measures CPU time")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.rounds == 1 or arguments.rounds < 0:
        parser.error(f"`--rounds` must be 0 or at least 2, for the quantiles, got {arguments.rounds}.")
    return arguments


def main() -> None:
    arguments = parse()
    os.environ.update(ALLOCATOR)  # For the processes that are started from here on; this one has its settings already.
    options = ("batch", "length", "dtype", "device", "checkpointing", "threads")
    settings = settings_of(arguments.model, **{name: getattr(arguments, name) for name in options})
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console = Console()
    description = (
        f"{header(device, Clock(device))}, {settings.model}, {settings.dtype}, batch {settings.batch} x "
        f"{settings.length} tokens{', checkpointing' if settings.checkpointing else ''}"
    )
    console.print(description, highlight=False)
    names = list(dict.fromkeys([BASELINE, *arguments.methods]))
    rows = run(settings, names, arguments.rounds, console)
    if arguments.csv:
        write_csv(arguments.csv, rows, description)
    if arguments.plot:
        plot(rows, arguments.plot, description)


if __name__ == "__main__":
    main()
