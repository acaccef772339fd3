"""Write what each step saw: one JSON line a step (:mod:`blur_optim.record.record_file`), and TensorBoard scalars."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from blur_optim.optimizer import BLUR
from blur_optim.record.record_file import FORMAT, Record, drop_torn_line, line_of, read_record
from blur_optim.step.plan import own_name
from blur_optim.step.statistics import StepStatistics, read_tensors

__all__ = ["Record", "Recorder", "read_record"]

_PER_ROW = ("forget_coefficient", "retain_coefficient")
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class Recorder:
    """Write ``opt.statistics`` of every n-th step, and what you add, as JSON lines and as TensorBoard scalars.

    Nothing is read from the device but on the steps that are recorded, where it is one copy. Each line is written whole
    and handed to the operating system at once, so what was recorded survives the process.

    Example::

        with Recorder("run.jsonl", opt, every=10, alignment=True) as recorder:
            for forget, retain in closures:
                forget_loss, retain_loss = opt.step(forget, retain)
                recorder.record(forget_loss=forget_loss, retain_loss=retain_loss)

    With many processes make one on **each** rank: rank 0 writes, the others write nothing. Norms, cosines and
    coefficients are those over all ranks; a loss is rank 0's own unless you have averaged it.

    Args:
        path: the file, conventionally ``.jsonl``; None for TensorBoard alone. Where it exists the recorder appends, and
            step numbers go on from its last.
        opt: the optimizer, without what a framework has put around it.
        every: record the first step and each whose number divides by this.
        alignment: record cosine and norms within each parameter too, with ``metric="retain"`` those in the metric
            beside the plain ones, whatever the scope: the kernels keep them apart in the pass that they make anyway.
            The sums over parameters are then rounded otherwise: in float64 with ``native``, within float32 chunks with
            ``foreach``. Their all-reduce carries three numbers a parameter, ten in the metric.
        tensorboard: folder of a TensorBoard run.
        model: names the parameters. Not needed where ``opt`` was given ``model.named_parameters()``.
        step: the number of the last step taken, where a run is resumed from an older checkpoint than the file's end.
        metadata: what else the first line shall hold.

    Raises:
        TypeError: ``opt`` is not a :class:`blur_optim.BLUR`.
        ValueError: ``every`` is below 1, there is nowhere to write, or ``path`` is a file of another kind.
        ImportError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        opt: BLUR,
        *,
        every: int = 1,
        alignment: bool = False,
        tensorboard: str | os.PathLike[str] | None = None,
        model: nn.Module | None = None,
        step: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(opt, BLUR):
            raise TypeError(f"`opt` must be a BLUR, got {type(opt).__name__}. Pass what it wraps, often opt.optimizer.")
        if every < 1:
            raise ValueError(f"`every` must be >= 1, got {every!r}.")
        if path is None and tensorboard is None:
            raise ValueError("`path` must be given where `tensorboard` is not, got None for both.")
        self.opt, self.every, self.alignment, self.model = opt, every, alignment, model
        self._metadata = dict(metadata or {})
        self._names: dict[int, str] = {}
        self._file: Any = None
        self._board: Any = None
        #: The number of the last step.
        self.step = step or 0
        if _is_writer():
            self._open(path, tensorboard, step)
        # A number that all ranks agree on: which steps take the dots of each parameter depends on it.
        self.step = _from_first_rank(self.step) if step is None else self.step
        self._prepare()

    def record(self, *, step: int | None = None, **values: Any) -> None:
        """Count a step that ``opt`` has taken, and record it if its turn has come. Call it on all ranks.

        Args:
            step: its number, where you count yourself; else one more than the last.
            **values: numbers, 0-d tensors, lists of numbers, or any other JSON. Tensors are read only if recorded.

        Raises:
            RuntimeError: ``opt`` has taken no step yet.
            ValueError: a name is one that the recorder uses, such as ``cosine``.
        """
        statistics = self.opt.statistics
        if statistics is None:
            raise RuntimeError("`record` must follow a step of the optimizer, got none. Call opt.step() first.")
        self.step = self.step + 1 if step is None else step
        if self._is_due(self.step) and (self._file is not None or self._board is not None):
            self._write(statistics, values)
        self._prepare()

    def close(self) -> None:
        """Close the file and the TensorBoard run. Nothing is lost without it."""
        self.opt.record_alignment = False
        for output in (self._file, self._board):
            if output is not None:
                output.close()
        self._file = self._board = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- Inside ------------------------------------------------------------------------------------------------------

    def _open(self, path: Any, tensorboard: Any, step: int | None) -> None:
        if path is not None:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            drop_torn_line(path)
            if step is None and path.exists() and path.stat().st_size:
                self.step = max((line["step"] for line in read_record(path).steps), default=0)
            # Unbuffered: a line is one write, and is with the operating system when record() returns.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        if tensorboard is not None:
            self._board = _summary_writer(tensorboard, self.step)

    def _is_due(self, step: int) -> bool:
        return step == 1 or step % self.every == 0

    def _prepare(self) -> None:
        """Have the next step take what it will be asked for."""
        self.opt.record_alignment = self.alignment and self._is_due(self.step + 1)

    def _write(self, statistics: StepStatistics, values: Mapping[str, Any]) -> None:
        names = _parameter_names(self.opt, self.model)
        if names != self._names:
            self._names = names
            self._line({"metadata": self._describe()})
        recorded = self._recorded(statistics)
        if taken := values.keys() & {*recorded, "step", "time", "alignment"}:
            raise ValueError(f"`values` must not use names of the recorder, got {sorted(taken)}.")
        tensors = {name: value for name, value in {**values, **recorded}.items() if isinstance(value, Tensor)}
        line = {"step": self.step, "time": time.time(), **values, **recorded, **read_tensors(tensors)}
        line["skipped"] = int(line["skipped"])
        places = [self._names.get(id(p), "") for p in statistics.params]
        for name in _PER_ROW:
            line[name] = self._by_row(line[name], places)
        for name in [name for name in line if name.startswith("alignment.")]:
            line.setdefault("alignment", {})[name.partition(".")[2]] = self._in_order(line.pop(name), places)
        self._line(line)
        if self._board is not None:
            for tag, value in _scalars(line, list(self._names.values())):
                self._board.add_scalar(tag, value, self.step)

    def _recorded(self, statistics: StepStatistics) -> dict[str, Any]:
        """What belongs to the step; tensors are still on their device."""
        recorded: dict[str, Any] = {**statistics.tensors()}
        for name in ("gamma", "retain_weight"):
            recorded[name] = _of_groups([group[own_name(name, group)] for group in self.opt.param_groups])
        recorded["lr"] = _of_groups([group["lr"] for group in self.opt.param_groups if "lr" in group])
        dots = statistics.parameter_dots
        if dots is not None and statistics.parameter_cosines is not None:
            recorded["alignment.cosine"] = statistics.parameter_cosines
            recorded["alignment.forget_norm"] = dots.forget_norm_sq.sqrt()
            recorded["alignment.retain_norm"] = dots.retain_norm_sq.sqrt()
        in_metric = statistics.parameters_in_metric
        if in_metric is not None and statistics.parameter_metric_cosines is not None:
            recorded["alignment.metric_cosine"] = statistics.parameter_metric_cosines
            recorded["alignment.metric_forget_norm"] = in_metric.dots.forget_norm_sq.sqrt()
            recorded["alignment.metric_retain_norm"] = in_metric.dots.retain_norm_sq.sqrt()
        return recorded

    def _by_row(self, values: list[float], places: list[str]) -> Any:
        if self.opt.scope == "parameter":
            return self._in_order(values, places)
        return values[0] if len(values) == 1 else values

    def _in_order(self, values: list[float], places: list[str]) -> list[float | None]:
        """One value for each name of the metadata; None where a parameter had no gradient."""
        found = dict(zip(places, values, strict=True))
        # More digits than a float32 gradient has would only make the file large.
        return [float(f"{found[name]:.7g}") if name in found else None for name in self._names.values()]

    def _describe(self) -> dict[str, Any]:
        opt, names = self.opt, list(self._names.values())
        rule = opt.rule if isinstance(opt.rule, str) else getattr(opt.rule, "__qualname__", repr(opt.rule))
        return {
            "format": FORMAT,
            "rule": rule,
            "normalize": opt.normalize,
            "scope": opt.scope,
            **{n: [float(g[own_name(n, g)]) for g in opt.param_groups] for n in ("gamma", "retain_weight")},
            "max_grad_norm": opt.max_grad_norm,
            "metric": opt.metric,
            "damping": opt.damping if opt.metric == "retain" else None,
            "stash": opt.stash,
            "backend": opt.backend,
            "base": type(opt.base).__name__,
            "every": self.every,
            "ranks": _world_size(),
            "versions": _versions(),
            "rows": names if opt.scope == "parameter" else [f"group {i}" for i in range(len(opt.param_groups))],
            "parameters": names,
            **self._metadata,
        }

    def _line(self, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(line_of(values))


def _of_groups(values: list[Any]) -> Any:
    """One number where all groups have the same, else a list; tensors stay tensors."""
    tensor = next((value for value in values if isinstance(value, Tensor)), None)
    if tensor is not None:
        return tensor if len(values) == 1 else torch.stack([torch.as_tensor(v, device=tensor.device) for v in values])
    return float(values[0]) if len(set(values)) == 1 else [float(value) for value in values]


def _scalars(line: Mapping[str, Any], names: list[str]) -> Iterator[tuple[str, float]]:
    """The numbers of a line by the tags that TensorBoard groups by."""
    for name, value in line.items():
        if name == "alignment":
            for part, values in value.items():
                yield from ((f"alignment_{part}/{p}", v) for p, v in zip(names, values, strict=True) if v is not None)
        elif isinstance(value, list):
            numbers = [(i, v) for i, v in enumerate(value) if isinstance(v, int | float)]
            yield from ((f"blur_{name}/{i}", float(v)) for i, v in numbers)
        elif isinstance(value, int | float) and name not in ("step", "time"):
            yield f"blur/{name}", float(value)


def _parameter_names(opt: BLUR, model: nn.Module | None) -> dict[int, str]:
    """A name for the id of every parameter, in the order of the param groups."""
    known = {} if model is None else {id(p): _plain(name) for name, p in model.named_parameters()}
    names: dict[int, str] = {}
    for index, (group, params) in enumerate(zip(opt.param_groups, opt.params_by_group(), strict=True)):
        given = group.get("param_names") or []
        for i, p in enumerate(params):
            names[id(p)] = known.get(id(p)) or (_plain(given[i]) if i < len(given) else f"group{index}.{i}")
    return names


def _plain(name: str) -> str:
    """The name without what DDP, FSDP1, compilation and checkpointing put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def _summary_writer(folder: Any, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "`tensorboard` must be installed for Recorder(tensorboard=...). `pip install 'blur_optim[tensorboard]'`."
        ) from error
    # What an interrupted run has shown beyond the step that this one goes on from disappears.
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _many_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_writer() -> bool:
    return not _many_ranks() or torch.distributed.get_rank() == 0


def _versions() -> dict[str, str]:
    """torch by its own word, which names the build (``+cu130``); blur_optim may be a folder on the path."""
    try:
        own = importlib.metadata.version("blur_optim")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"
    return {"blur_optim": own, "torch": torch.__version__}


def _world_size() -> int:
    return torch.distributed.get_world_size() if _many_ranks() else 1


def _from_first_rank(number: int) -> int:
    if _world_size() == 1:
        return number
    numbers = [number]
    torch.distributed.broadcast_object_list(numbers)
    return numbers[0]
