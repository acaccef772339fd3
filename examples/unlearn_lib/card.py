"""The model card: what was done to the model, with what, and what came of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .report import as_text, rows_of_table, tell_stop

CAVEAT = """\
Unlearning is not proven deletion. The scores say how these rows, asked in this way, are answered; other words, other
languages, a few steps of fine-tuning or an attack on the weights may still bring out what was to be forgotten. What a
law or a contract asks for, these numbers do not show. Look at the model's answers before you rely on it."""


def make_card(results: Mapping[str, Any], hub_names: Sequence[str]) -> str:
    """Return the README.md of the model's folder, with the header that the Hugging Face hub reads."""
    settings, is_adapter = results["settings"], results["settings"]["keep_adapter"]
    header = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["unlearning", "blur", *(["lora"] if settings["lora"] else [])],
        **({} if Path(settings["model"]).exists() else {"base_model": settings["model"]}),
        **({"datasets": list(hub_names)} if hub_names else {}),
    }
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {Path(settings['model']).name}, unlearned",
        _what(settings),
        "## Before and after\n\n" + _markdown(rows_of_table(results)),
        "Probability is that of the answers per token, averaged over rows; perplexity is over all their tokens; "
        "ROUGE-L is the share of the true answer that the model says. The rows to forget are those that were trained "
        'on; rows "held out" are rows to retain that were not.'
        + (f"\n\n{tell_stop(results)}" if results["stop"] else ""),
        "## What this does not show\n\n" + CAVEAT,
        "## Data\n\n" + _data(results["data"]),
        "## Statistics\n\n" + _statistics(results),
        "## How it was made\n\n" + _how(results),
    ]
    return "\n\n".join(parts) + "\n"


def _what(settings: Mapping[str, Any]) -> str:
    how = f"LoRA of rank {settings['lora']}" if settings["lora"] else "all weights"
    if settings["lora_embeddings"]:
        how += " and the token embeddings"
    saved = ", kept apart: load it on the base model" if settings["keep_adapter"] else ""
    return (
        f"`{settings['model']}` after unlearning with BLUR ([arXiv:2506.08164](https://arxiv.org/abs/2506.08164)): "
        f"forget loss {settings['method']}, retain loss {settings['retain_loss']}, rule {settings['rule']}, metric "
        f"{settings['metric']}; trained: "
        f"{how}{saved}."
    )


def _data(data: Mapping[str, Mapping[str, Any]]) -> str:
    cells = [["option", "source", "rows", "cut", "sha256"]]
    cells += [
        [option, fact["source"], str(fact["rows"]), str(fact["cut"]), f"`{fact['sha256']}`"]
        for option, fact in data.items()
    ]
    held_out = data["--retain"]["held_out"]
    note = f"\n\n{held_out} rows of `--retain` were held out." if held_out else ""
    return _markdown(cells) + note


def _statistics(results: Mapping[str, Any]) -> str:
    cells = [["", "first", "last", "mean"]]
    for name, values in results["statistics"].items():
        cells.append([name.replace("_", " "), *(as_text(values[which], ".4g") for which in ("first", "last", "mean"))])
    return f"Over {results['steps']} steps, at those that were logged:\n\n" + _markdown(cells)


def _how(results: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    settings = [["setting", "value"], *([name, f"`{value}`"] for name, value in results["settings"].items())]
    seconds = results["training_seconds_since_last_start"]
    took = "" if seconds is None else f" Training took {seconds:.0f} s since the last start."
    return (
        f"```bash\n{results['command']}\n```\n\n{results['processes']} process(es).{took} Versions: {versions}.\n\n"
        + _markdown(settings)
    )


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    header, *rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join([header, "|" + "---|" * len(cells[0]), *rows])
