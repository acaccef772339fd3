"""Find out what cannot work before anything is trained."""

import math
from itertools import pairwise

from shared_lib.errors import InputError
from shared_lib.models import check_device

from .methods import parse_method
from .settings import Settings
from .tracks import load_data


def check_settings(settings: Settings) -> None:
    """See that methods, seeds, device and data are as they should be.

    Raises:
        InputError: they are not.
    """
    if not settings.data and settings.track != "tofu":
        raise InputError(f"--data must name a folder or a data set of the hub for the {settings.track} track.")
    for method in settings.methods:
        parse_method(method)
    if len(set(settings.methods)) < len(settings.methods):
        raise InputError(f"--methods must be different, got {' '.join(settings.methods)}.")
    if settings.tuning_seed in settings.seeds or len(set(settings.seeds)) < len(settings.seeds):
        raise InputError(f"--seeds must be different, and other than the tuning seed {settings.tuning_seed}.")
    for name, given in (("--lora-rank", settings.lora_rank), ("--embeddings", settings.embeddings)):
        if given and any(parse_method(method).forget_loss == "rmu" for method in settings.methods):
            raise InputError(f"{name}: RMU trains weights of its layers and no others. Leave rmu out of --methods.")
    if settings.embeddings and (settings.embeddings == "trained") != bool(settings.lora_rank):
        raise InputError(
            f"--embeddings must be trained with --lora-rank, and frozen or only without, got {settings.embeddings!r}."
        )
    if settings.learning is not None and not 0 < settings.learning.lr < math.inf:
        raise InputError(f"--training-lr must be positive, got {settings.learning.lr}.")
    for name in ("steps", "batch_size", "accumulation", "looks"):
        if getattr(settings, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(settings, name)}.")
    if settings.steps < settings.looks:
        raise InputError(
            f"--steps must be at least {settings.looks}, as often as a run is looked at, got {settings.steps}."
        )
    if settings.lora_rank < 0:
        raise InputError(f"--lora-rank must be at least 1, or left out for all weights, got {settings.lora_rank}.")
    if not 0 <= settings.warm_up <= 1:
        raise InputError(f"--warm-up must be a share of the steps, from 0 to 1, got {settings.warm_up}.")
    for name, values in (("--lrs", settings.lrs), ("--tuning-weights", settings.tuning_weights)):
        if len(set(values)) < len(values) or not all(math.isfinite(value) and value > 0 for value in values):
            raise InputError(f"{name} must be positive and different, got {' '.join(map(str, values))}.")
    _check_blocks(settings)
    check_device(settings.device)
    for number in range(len(settings.blocks) or 1):
        load_data(settings, number)


def _check_blocks(settings: Settings) -> None:
    if settings.authors < 0:
        raise InputError(f"--authors must be how many a model knows, or 0 for all there are, got {settings.authors}.")
    if not settings.blocks:
        return
    given = " ".join(map(str, settings.blocks))
    if settings.track != "tofu":
        raise InputError(f"--blocks must be left out with --track {settings.track}: it has one set of data for all.")
    if len(settings.blocks) < 2 or min(settings.blocks) < 0:
        raise InputError(f"--blocks must be two or more, one to tune on and others to compare on, got {given}.")
    least = min(second - first for first, second in pairwise(sorted(settings.blocks)))
    if not 0 < settings.authors <= least:
        raise InputError(
            f"--blocks must be at least --authors apart, so that no two share rows: {settings.authors} authors from "
            f"each of {given} on."
        )
    tuned = settings.tuning_seed % settings.targets
    if on_it := [seed for seed in settings.seeds if seed % settings.targets == tuned]:
        raise InputError(
            f"--seeds must not fall on the block that is tuned on, as {' '.join(map(str, on_it))} would: which of the "
            f"--blocks a seed takes is its remainder by {settings.targets}, their number."
        )
