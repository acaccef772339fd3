"""Find out what cannot work before anything is trained."""

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
    if settings.steps < settings.looks:
        raise InputError(
            f"--steps must be at least {settings.looks}, as often as a run is looked at, got {settings.steps}."
        )
    if not 0 <= settings.warm_up <= 1:
        raise InputError(f"--warm-up must be a share of the steps, from 0 to 1, got {settings.warm_up}.")
    for name, values in (("--lrs", settings.lrs), ("--tuning-weights", settings.tuning_weights)):
        if len(set(values)) < len(values) or min(values) <= 0:
            raise InputError(f"{name} must be positive and different, got {' '.join(map(str, values))}.")
    firsts = pairwise(sorted(settings.blocks))
    least = min((second - first for first, second in firsts), default=settings.authors)
    if settings.blocks and not 0 < settings.authors <= least:
        raise InputError(
            f"--blocks must be at least --authors apart, so that no two share rows: {settings.authors} authors from "
            f"each of {' '.join(map(str, settings.blocks))} on."
        )
    check_device(settings.device)
    load_data(settings)
