"""What a run found: the numbers as JSON, and as a table."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table
from shared_lib.versions import installed_versions

from .evaluation import Scores

PACKAGES = ("blur_optim", "torch", "transformers", "accelerate", "peft", "tokenizers", "datasets", "safetensors")
#: Title and field of what the table shows before and after, and how.
COLUMNS = (("probability", "probability", ".3f"), ("perplexity", "perplexity", ".4g"), ("ROUGE-L", "rouge_l", ".3f"))
STATISTICS = (
    *("cosine", "forget_norm", "retain_norm", "forget_coefficient", "retain_coefficient"),
    *("metric_cosine", "metric_forget_norm", "metric_retain_norm", "effective_share"),  # With --metric retain.
)


def make_results(
    facts: Mapping[str, Any],
    before: Mapping[str, Scores],
    after: Mapping[str, Scores],
    logs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return all that is recorded of a run, as JSON takes it."""
    summary = next((log for log in reversed(logs) if "train_runtime" in log), {})
    return {
        "command": command(),
        **facts,
        "versions": installed_versions(PACKAGES),
        "scores": {
            name: {"before": before[name]._asdict(), "after": scores._asdict()} for name, scores in after.items()
        },
        "steps": max((log["step"] for log in logs), default=0),
        "stop": last_look(logs),
        "statistics": summarise_statistics(logs),
        # The Trainer counts from the last start.
        "training_seconds_since_last_start": summary.get("train_runtime"),
    }


def summarise_statistics(logs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return first, last and mean of what BLUR saw at the steps that were logged."""
    steps = [log for log in logs if "blur_cosine" in log]
    series = {name: [log[f"blur_{name}"] for log in steps if f"blur_{name}" in log] for name in STATISTICS}
    series |= {name: [log[name] for log in steps] for name in ("forget_loss", "retain_loss")}
    return {
        name: {"first": values[0], "last": values[-1], "mean": fmean(values)}
        for name, values in series.items()
        if values
    }


def last_look(logs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return what the last look at --stop-at found: nats per token, and the step; None where nobody looked."""
    looks = [log for log in logs if "stop_forget_log_prob" in log]
    if not looks:
        return None
    forget, holdout = looks[-1]["stop_forget_log_prob"], looks[-1]["stop_holdout_log_prob"]
    return {"step": looks[-1]["step"], "forget": forget, "never seen": holdout, "reached": forget <= holdout}


def tell_stop(results: Mapping[str, Any]) -> str:
    """Say whether the rows to forget became as improbable as rows never seen."""
    stop = results["stop"]
    what = f"{stop['forget']:.3f} nats per token at step {stop['step']}, {stop['never seen']:.3f} before it all"
    if stop["reached"]:
        return f"Stopped: the answers to forget are as improbable as rows never seen ({what})."
    return (
        f"The answers to forget are still likelier than rows never seen ({what}). Give more --epochs or a larger --lr."
    )


def command() -> str:
    """Return the command line, as a shell takes it."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def rows_of_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells, the header first: each score before and after."""
    header = ["rows", "number", *(f"{title} {when}" for title, _, _ in COLUMNS for when in ("before", "after"))]
    cells = [header]
    for name, scores in results["scores"].items():
        numbers = [as_text(scores[when][field], style) for _, field, style in COLUMNS for when in ("before", "after")]
        cells.append([name, str(scores["after"]["rows"]), *numbers])
    return cells


def as_text(value: float | None, style: str) -> str:
    """Return a number, or a dash where there is none."""
    return "–" if value is None else format(value, style)


def make_table(results: Mapping[str, Any]) -> Table:
    """Return the table to print."""
    table = Table(title="before → after")
    table.add_column("rows")
    table.add_column("number", justify="right")
    for title, _, _ in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for name, number, *values in rows_of_table(results)[1:]:
        pairs = zip(values[::2], values[1::2], strict=True)
        table.add_row(name, number, *(f"{before} → {after}" for before, after in pairs))
    return table
