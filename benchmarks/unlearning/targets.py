"""The target, which knows everything, and the retrained model, which never saw what is to be forgotten."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from shared_lib.errors import TrainingError
from shared_lib.models import load_model, load_tokenizer, quiet_transformers, save_model
from shared_lib.training import Recipe, learn

from .settings import Settings
from .small_models import save_small_model
from .tracks import load_data

CACHE_FORMAT = 1  # Raise it when the training changes, so that models of the old kind are not taken.
TARGET, RETRAINED = "target", "retrained"
ENOUGH = 0.5  # of the probability asked for: a target that knows less cannot show anything

Report = Callable[[int, float], None]


def model_folder(cache: Path, settings: Settings, role: str, number: int) -> Path:
    """Return where the model of this role is, or will be, kept."""
    if settings.learning is None:
        return Path(settings.model if role == TARGET else settings.retrained)
    data = [settings.track, settings.data, settings.subset, settings.authors, settings.passages, settings.max_length]
    if settings.blocks:
        data.append(["block", settings.blocks[number]])
    if settings.retain_data:
        data.append(settings.retain_data)
    parts = [CACHE_FORMAT, role, number, settings.model, settings.gguf_file, asdict(settings.learning), data]
    return cache / "models" / f"{settings.track}-{role}-{number}-{_hash(parts)}"


def is_trained(cache: Path, settings: Settings, role: str, number: int) -> bool:
    return settings.learning is None or model_folder(cache, settings, role, number).is_dir()


def train(cache: Path, settings: Settings, role: str, number: int, report: Report = lambda epoch, known: None) -> None:
    """Train one model and keep it. Interrupted, it leaves nothing.

    Raises:
        TrainingError: the target hardly knows its answers afterwards.
    """
    assert settings.learning is not None
    home = model_folder(cache, settings, role, number)
    home.parent.mkdir(parents=True, exist_ok=True)
    quiet_transformers()
    torch.set_num_threads(settings.threads)
    recipe = _recipe(settings, number)
    scratch = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=home.parent))
    try:
        data = load_data(settings, number)
        start, gguf_file = settings.model, settings.gguf_file or None
        if settings.is_small:
            start, gguf_file = str(scratch / "start"), None
            save_small_model(scratch / "start", settings.model, data.texts(), recipe.seed)
        torch.manual_seed(recipe.seed)
        tokenizer = load_tokenizer(start, gguf_file)
        model = load_model(start, settings.device, gguf_file)
        task = data.task(tokenizer, settings)
        history = learn(model, task.known if role == TARGET else task.kept, recipe, report)
        if role == TARGET and history[-1] < ENOUGH * recipe.known:
            raise TrainingError(
                f"{settings.name}: the target must know its data before it can forget, but the mean probability of a "
                f"token is {history[-1]:.2f} after {len(history)} epochs. Train longer, or take a larger model."
            )
        save_model(model, tokenizer, scratch / "model")
        record = {"recipe": asdict(recipe), "probability": history, "parameters": model.num_parameters()}
        (scratch / "model" / "training.json").write_text(json.dumps(record, indent=1))
        os.replace(scratch / "model", home)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _recipe(settings: Settings, number: int) -> Recipe:
    learning = settings.learning
    return Recipe(
        learning_rate=learning.lr,
        max_epochs=learning.epochs,
        batch_size=learning.batch_size,
        known=learning.known,
        seed=number,
        device=settings.device,
        threads=settings.threads,
    )


def _hash(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]
