"""Teach a model its authors, and keep trained models so that a second run need not."""

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from blur_optim.losses import nll_loss

from .encoding import Batch, Example, encode_rows, shuffled_batches
from .models import load_model, load_tokenizer, logits_of, quiet_transformers, save_model
from .rows import Row

CACHE_FORMAT = 1  # Raise it when the training below changes, so that models of the old kind are not taken.

Report = Callable[[int, float], None]  # (epochs done, probability of an answer's token)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. With its rows and its start, this determines the weights, so it is the cache key.

    known: stop after the epoch whose mean probability of an answer token, exp(-NLL), is at least this.
    """

    learning_rate: float
    max_epochs: int
    batch_size: int = 16
    weight_decay: float = 0.01
    known: float = 0.98
    seed: int = 0
    device: str = "cpu"
    threads: int = 1


def cache_key(start: str, rows: Sequence[Row], recipe: Recipe) -> str:
    """Return a name for what this training makes: the same for the same start, rows and recipe."""
    parts = [CACHE_FORMAT, start, _files_of(start), list(rows), asdict(recipe)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _files_of(start: str) -> list[tuple[str, int, int]]:
    """List a local model's files by size and time, so that a changed model is trained anew."""
    folder = Path(start)
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def learn_and_save(start: str, rows: Sequence[Row], recipe: Recipe, folder: Path, report: Report) -> None:
    """Train the causal LM at ``start`` on the rows, and write model, tokenizer and training.json to ``folder``."""
    quiet_transformers()
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    model, tokenizer = load_model(start, recipe.device), load_tokenizer(start)
    history = learn(model, encode_rows(tokenizer, rows), recipe, report)
    save_model(model, tokenizer, folder)
    (folder / "training.json").write_text(json.dumps({"recipe": asdict(recipe), "probability": history}, indent=1))


def learn(model: PreTrainedModel, examples: Sequence[Example], recipe: Recipe, report: Report) -> list[float]:
    """Train until the answers are known or the epochs are used up.

    Returns:
        The mean probability of an answer token in each epoch, measured while training.
    """
    steps = math.ceil(len(examples) / recipe.batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_and_cosine(steps, recipe.max_epochs))
    rng = random.Random(recipe.seed)
    history: list[float] = []
    model.train()
    while len(history) < recipe.max_epochs and (not history or history[-1] < recipe.known):
        batches = shuffled_batches(examples, recipe.batch_size, rng, recipe.device)
        nll = [_train_step(model, batch, optimizer, scheduler) for batch in batches]
        history.append(math.exp(-sum(loss * count for loss, count in nll) / sum(count for _, count in nll)))
        report(len(history), history[-1])
    return history


def _train_step(model: PreTrainedModel, batch: Batch, optimizer: Any, scheduler: Any) -> tuple[float, int]:
    loss = nll_loss(logits_of(model, batch), batch["labels"])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return loss.item(), int((batch["labels"] != -100).sum())


def _warm_up_and_cosine(steps: int, epochs: int) -> Callable[[int], float]:
    """Rise over the first epoch, then fall to a twentieth along a cosine."""

    def factor(step: int) -> float:
        return min((step + 1) / steps, 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * step / (epochs * steps))))

    return factor


def was_learned(folder: Path) -> tuple[bool, int, float]:
    """Return of a kept model whether it knew its answers, after how many epochs, and the probability."""
    record = json.loads((folder / "training.json").read_text())
    history = record["probability"]
    return history[-1] >= record["recipe"]["known"], len(history), history[-1]
