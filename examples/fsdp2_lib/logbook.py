"""What a run tells: a line of JSON and a line on the console every few steps, and a progress bar."""

import json
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shared_lib.method import coefficient_text
from torch import Tensor
from tqdm import tqdm


class Logbook:
    """Log to ``path`` from the first process; the others take part in the collective operations.

    Args:
        first_step: lines of this step and later ones, which an interrupted run may have left, are dropped.
    """

    def __init__(self, path: Path, first_step: int, steps: int) -> None:
        self.is_first = dist.get_rank() == 0
        self.path = path
        self.tokens, self.since, self.began = 0, first_step, time.perf_counter()
        if self.is_first:
            kept = path.read_text().splitlines() if first_step and path.is_file() else []
            path.write_text("".join(f"{line}\n" for line in kept if json.loads(line)["step"] <= first_step))
        self.bar = tqdm(total=steps, initial=first_step, desc="unlearning", unit="step", disable=not self.is_first)

    def advance(self, tokens: int) -> None:
        self.tokens += tokens
        self.bar.update()

    def write(self, step: int, losses: Tensor, statistics: dict[str, Any], lr: float) -> None:
        """Log the state after ``step`` steps; every process calls this.

        Args:
            losses: [2], this process's part.
        """
        dist.all_reduce(losses)
        forget, retain = (losses / dist.get_world_size()).tolist()
        memory = torch.tensor(peak_bytes(losses.device), device=losses.device)
        dist.all_reduce(memory, dist.ReduceOp.MAX)
        seconds = (time.perf_counter() - self.began) / max(1, step - self.since)
        record = {
            "step": step,
            "forget_loss": forget,
            "retain_loss": retain,
            "lr": lr,
            "seconds_per_step": seconds,
            "tokens_per_second": self.tokens / (seconds * max(1, step - self.since)),
            "peak_gib": memory.item() / 2**30,
            **statistics,
        }
        self.tokens, self.since, self.began = 0, step, time.perf_counter()
        if self.is_first:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            self.bar.write(_as_text(record))

    def say(self, text: str) -> None:
        if self.is_first:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()


def _as_text(record: dict[str, Any]) -> str:
    return (
        f"step {record['step']:>5}  forget {record['forget_loss']:.4f}  retain {record['retain_loss']:.4f}  "
        f"cos {record['cosine']:+.3f}  |g_f| {record['forget_norm']:.3g}  |g_r| {record['retain_norm']:.3g}  "
        f"ξ {coefficient_text(record['forget_coefficient'])}  "
        f"{record['tokens_per_second']:.0f} tokens/s  {record['peak_gib']:.2f} GiB"
    )


def progress(items: Iterable[int], title: str) -> Iterable[int]:
    """Show a bar on the first process."""
    return tqdm(items, desc=title, unit="batch", leave=False, disable=dist.get_rank() != 0)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held: of the GPU's allocator, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
