"""What a run of a Trainer was begun with, kept in its checkpoints, and compared where it is resumed."""

from __future__ import annotations

import warnings
from typing import Any

#: The key of ``TrainerState.stateful_callbacks`` that a checkpoint carries it under.
STATE_KEY = "BLURTrainer"

METHOD = (
    *("beta", "simnpo_delta", "gamma", "retain_weight", "rule", "normalize", "scope", "stash", "epoch_over"),
    *("metric", "damping"),
)
# What of the Trainer's own a resumed run reads anew, and what it takes from the checkpoint's optimizer and scheduler.
_READ_ANEW = (
    *("optim", "lr_scheduler_type", "max_grad_norm", "seed", "data_seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
)
_KEPT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


def describe_run(trainer: Any) -> dict[str, Any]:
    """Everything that a run's numbers depend on and its arguments say, in a form that JSON takes."""
    args = trainer.args
    described = {name: _plain(getattr(args, name, None)) for name in (*METHOD, *_READ_ANEW, *_KEPT)}
    forget, retain = trainer.chosen_losses
    described |= {"forget_loss": _plain(forget), "retain_loss": _plain(retain)}
    if trainer.chosen_rule is not None:
        described["rule"] = _plain(trainer.chosen_rule)
    rows = trainer.train_dataset
    return described | {"forget_rows": len(rows.forget), "retain_rows": len(rows.retain)}


def warn_of_differences(begun: dict[str, Any], now: dict[str, Any]) -> None:
    """Say with what a run is resumed that it was not begun with, and which of the two holds."""
    differs = [name for name in now if name in begun and begun[name] != now[name]]
    if differs:
        kept = [name for name in differs if name in _KEPT]
        new = [name for name in differs if name not in _KEPT]
        told = "; ".join(
            f"{', '.join(f'{n} {now[n]!r} (begun with {begun[n]!r})' for n in names)}: {verdict}"
            for names, verdict in ((new, "the new hold from here on"), (kept, "the checkpoint's stay"))
            if names
        )
        warnings.warn(f"The run is resumed with other arguments than it was begun with. {told}.", stacklevel=2)


def _plain(value: Any) -> Any:
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"
    value = getattr(value, "value", value)  # Of an enum.
    return value if isinstance(value, bool | int | float | str | None) else str(value)
