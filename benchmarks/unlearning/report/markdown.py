"""The report as GitHub Markdown."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from . import numbers
from .compare import NO_PAIR, ONE_SEED, TAUS, TRIFLE, Paired
from .figures import DRAWINGS
from .reading import MAIN_TAU, reading
from .summary import Summary
from .table import Cell, Column, Table

TRACKS = {"tofu": "TOFU", "muse": "MUSE", "wmdp": "WMDP"}
FIGURES = "figures"  # the folder beside the Markdown file
MISSING_NAMED = 12

FORMATS: Mapping[str, Callable[[Cell], str]] = {
    "text": str,
    "count": str,
    "weight": numbers.weight,
    "log": lambda cell: numbers.spread(cell, 2),
    "probability": lambda cell: numbers.spread(cell, 3),
    "score": numbers.spread,
    "p": numbers.p_value,
    "share": lambda cell: numbers.percent(cell.mean),
    "span": numbers.span,
    "number": lambda cell: numbers.fixed(cell, 3),
    "ratio": lambda cell: f"{cell:.2f}",
    "paired": lambda cell: numbers.interval(cell, 3),
    "wins": lambda cell: f"{cell.wins} of {cell.pairs}",
    "pairs": lambda cell: pairs(cell),
    "verdict": lambda cell: {NO_PAIR: numbers.NOTHING, ONE_SEED: "one seed"}.get(cell.verdict, cell.verdict),
}

READING = (
    f"Written by rule from the numbers below. *At equal retain*: {numbers.percent(MAIN_TAU)} of the target's p_retain "
    "and p_untouched kept. Lower log p_forget is more forgotten. In brackets: 95 % interval of the difference over "
    "seeds."
)
EQUAL_RETAIN = (
    "Lowest log p_forget of any weight and any moment that keeps so much of the target's p_retain and p_untouched "
    "(between two looks at a run, linear in p), "
    "mean ± standard deviation over seeds. *Difference*: to the weighted sum of the same losses, seed by seed, with a "
    "95 % t interval; negative forgets more. *Wins*: seeds in which it forgets more. *Verdict*: better or worse where "
    f"the interval excludes 0 and the difference is at least {TRIFLE}, otherwise a tie."
)
HYPERVOLUME = (
    "Area dominated in 1 − p_forget and the lesser of p_retain and p_untouched as a share of the target's, above (0, "
    "0). More is better; a positive difference is a better one."
)
SECTIONS = {
    "equal retain": ("Forgetting at equal retain", "trade-off", EQUAL_RETAIN),
    "line": (
        "On the straight line",
        None,
        "The same comparison, with θ₀ + s(θ_u − θ₀) in place of the moments of a run: θ₀ the target, θ_u the end of "
        "the run, s from 1 down to where 99 % is kept. It asks which way a method went, not how far.",
    ),
    "ratios": (
        "Run by run",
        None,
        "p_forget where it is lowest of what keeps so much, and how many times the weighted sum's of the same losses "
        "and the retrained model's it is: median [least, largest] over seeds, and in how many of those with a value of "
        "the other's.",
    ),
    "selected": (
        "At the selected weight",
        "memorisation",
        "Learning rate and weight w were chosen on the tuning seed alone. Mean ± standard deviation over the other "
        "seeds, at the end of the run. log p: of an answer's tokens; p: its exponential, mean over rows. The goal is "
        "the row of the retrained model. Where there is a weighted sum of the same losses, the second table has the "
        "difference to it, seed by seed, with a 95 % t interval.",
    ),
    "scores": (
        "All scores at the selected weight",
        None,
        "The benchmark's own measures, mean ± standard deviation over seeds; p-values as median [least, largest]. The "
        "goal is the row of the retrained model.",
    ),
    "gradients": (
        "How the gradients met",
        "gradients",
        "At the selected weight. For BLUR without a metric the update is u = ξ·g_f + α·g_r with ξ = γ − α·c and "
        "c = ⟨g_r, g_f⟩/‖g_f‖²; for the weighted sum ξ = γ. Opposed: ⟨g_r, g_f⟩ < 0. Ranges are over all steps and "
        "seeds. *cos in the metric*: by ⟨g_r, P g_f⟩. *Effective share*: of the coordinates, how many carry x = P g_f, "
        "the direction that forgets (without the tensors' own scales of scope='parameter'): (Σx²)²/(n·Σx⁴), median "
        "over a run's steps.",
    ),
    "weights": (
        "Every weight",
        "weights",
        "The ablation of γ (and λ = 1/w of the weighted sum), at the end of the run.",
    ),
    "tuning": (
        "What tuning tried",
        None,
        "Lowest log p_forget along the runs of the tuning seed, on its own target, and the area that each dominates. "
        "*One setting*: of those tried with all the losses the one whose worst is best, by its hypervolume as a share "
        "of that of what was chosen for the losses.",
    ),
    "relearning": (
        "Relearning",
        "relearning",
        "Probabilities before and after some of the forgotten rows were trained again, at the selected weight.",
    ),
    "quantized": (
        "In 4 bits",
        None,
        "Probabilities before and after the matrices are rounded to 4 bits (nearest, in groups of 32), at the selected "
        "weight. What was only hidden can come back.",
    ),
    "restored": (
        "With the old token embeddings",
        None,
        "Probabilities before and after the target's token embeddings are put back, at the selected weight: what was "
        "forgotten in them alone comes back, and who has them can have it.",
    ),
    "stopping": (
        "Stopping",
        None,
        "At the selected weight: the first look at which the rows to forget are as improbable as rows that nobody "
        "learned are to the target, and what is kept there. Further forgetting is no merit in itself.",
    ),
    "cost": ("Cost", None, ""),
}


OPTIONAL = ("line", "tuning", "quantized", "restored", "stopping")  # only some settings look there


def pairs(cell: Paired) -> str:
    """Say how many seeds were compared, and why others were not."""
    reasons = (
        ("only the weighted sum has a value", cell.only_theirs),
        ("only this one", cell.only_ours),
        ("neither", cell.neither),
        ("not run", cell.not_run),
    )
    notes = [f"{count}: {reason}" for reason, count in reasons if count]
    return "; ".join([f"{cell.pairs} of {cell.seeds}", *notes])


def write(summary: Summary, tables: Mapping[str, tuple[Table, ...]], figures: Mapping[str, str]) -> str:
    """Return the report; ``figures`` are names of files in the folder of figures, by key."""
    blocks = [*_head(summary), "## Reading", READING, _list(reading(summary)) or "Nothing can be compared yet."]
    for key, (title, figure, note) in SECTIONS.items():
        shown = [table for table in tables[key] if table.rows]
        if key in OPTIONAL and not shown:
            continue
        blocks += [f"## {title}", note]
        if not shown:
            blocks += ["Not measured."]
        if figure in figures:
            drawing = DRAWINGS[figure]
            blocks += [f"![{drawing.alternative}]({FIGURES}/{figures[figure]})", f"*{drawing.caption}*"]
        for table in shown:
            if table.key == "hypervolume":
                blocks.append(HYPERVOLUME)
            if table.key == "cost":
                blocks.append(_cost(summary))
            blocks.append(table_text(table, titled=len(shown) > 1))
    blocks += [
        "## Reproduce",
        f"```bash\n{summary.setting.values.get('command', '')}\n```",
        "## Limits",
        _limits(summary),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _head(summary: Summary) -> Iterator[str]:
    setting, values = summary.setting, summary.setting.values
    yield f"# Unlearning on {TRACKS.get(setting.track, setting.track)}: {setting.name}"
    yield f"Written by `{values.get('command', 'unknown')}`, commit {values.get('commit', 'unknown')}."
    yield _completeness(summary)
    yield "## What was compared"
    model, rows = values.get("model") or {}, values.get("rows") or {}
    size = model.get("parameters")
    versions = values.get("versions") or {}
    facts = {
        "data": values.get("data"),
        "rows": ", ".join(f"{kind} {count}" for kind, count in rows.items()),
        "model": f"{model.get('name', 'unnamed')}, {size:,} parameters" if size else model.get("name"),
        "trained": _trained(values),
        "methods": ", ".join(f"`{method.id}`" for method in setting.methods),
        "weights w": _weights(summary),
        "learning rates tried": ", ".join(map(numbers.weight, setting.lrs)),
        "seeds": f"{', '.join(map(str, setting.seeds))}; tuned on {setting.tuning_seed}",
        "each run": f"{values.get('steps', '?')} steps of {_rows_a_step(values)} rows to forget and as many to retain"
        + _warm_up(values),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    }
    yield _list(f"{name}: {fact}" for name, fact in facts.items() if fact)
    yield (
        "A method is a forget loss, a retain loss and a way for their gradients to meet. Every way has the gradient "
        "weights γ = w and α = 1, the same batches and the same number of steps; learning rates and weights were tried "
        "alike for all. *Target*: the model that runs begin from. *Retrained*: never saw the rows to forget. "
        "*Untouched*: rows that were known before and are neither forgotten nor rehearsed."
    )


def _trained(values: Mapping[str, Any]) -> str | None:
    """Return which weights are trained, where that is not all of them."""
    rank, embeddings = values.get("lora_rank"), values.get("embeddings")
    known = {"frozen": "all weights but the token embeddings", "only": "the token embeddings alone"}
    if not rank:
        return known.get(embeddings or "")
    return f"LoRA adapters of rank {rank}" + (" and the token embeddings" if embeddings else "")


def _warm_up(values: Mapping[str, Any]) -> str:
    share = values.get("warm_up")
    if share in (None, 0.1):
        return ""
    return f"; the learning rate rises over {numbers.percent(share)} of them" if share else "; without warm-up"


def _weights(summary: Summary) -> str:
    setting = summary.setting
    grid = ", ".join(map(numbers.weight, setting.weights))
    if all(set(method.weights) <= set(setting.weights) for method in summary.methods):
        return grid
    if not grid:
        return "what tuning chose; the tables have it"
    return f"{grid}, times what is natural for a method's losses, and what tuning chose; the tables have them"


def _rows_a_step(values: dict[str, object]) -> str:
    size, accumulated = values.get("batch_size", "?"), values.get("accumulation", 1)
    return str(size) if accumulated == 1 else f"{accumulated} x {size}"


def _completeness(summary: Summary) -> str:
    expected = sum(len(method.expected) for method in summary.methods)
    missing = {m.method: m.missing for m in summary.methods if m.missing}
    count = sum(map(len, missing.values()))
    seconds = sum(run.seconds for run in summary.setting.runs)
    text = (
        f"{expected - count} of {expected} runs on held-out seeds; {seconds / 3600:.1f} hours of unlearning and "
        "scoring, tuning included, summed over processes."
    )
    lacking = [name for name, found in _yardsticks(summary).items() if not found]
    if lacking:
        text += f" **Not there yet: {', '.join(lacking)}.**"
    if not missing:
        return text
    named = [f"`{method.id}` {_missing(pairs)}" for method, pairs in missing.items()]
    more = [f"and of {len(named) - MISSING_NAMED} more methods"] if len(named) > MISSING_NAMED else []
    return f"**Incomplete.** {text} Missing: {'; '.join(named[:MISSING_NAMED] + more)}."


def _yardsticks(summary: Summary) -> dict[str, object]:
    return {"target": summary.setting.targets, "retrained": summary.setting.retrained}


def _missing(pairs: tuple[tuple[float, int], ...]) -> str:
    by_weight: dict[float, list[int]] = {}
    for weight, seed in pairs:
        by_weight.setdefault(weight, []).append(seed)
    return ", ".join(
        f"w = {numbers.weight(weight)} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})"
        for weight, seeds in by_weight.items()
    )


def _cost(summary: Summary) -> str:
    return (
        f"Time of a step over that of `{summary.setting.cost_baseline}` with the same losses in the same run, median "
        "and scatter; gradient sets that are held at the peak beyond what it holds."
    )


def _limits(summary: Summary) -> str:
    seeds = len(summary.setting.seeds)
    comparisons = sum(summary.baseline(method) is not None for method in summary.methods) * (len(TAUS) + 1)
    steps = sorted({run.planned_steps for run in summary.sweep_runs})
    lines = [
        f"{seeds} seed{'s' * (seeds != 1)}. Intervals take differences to be normal and seeds to be independent; they "
        "do not cover the choice of data, model or learning rate.",
        f"{comparisons} intervals of 95 % are not corrected for their number: of comparisons without a difference, one "
        "in twenty comes out better or worse.",
        "At equal retain, the best of all weights and moments is taken on the rows that are reported. This favours "
        "everyone alike, and overstates what one would reach without looking. Runs are looked at a few times only, and "
        "with a few weights: what lies between is interpolated, or not seen.",
    ]
    if len(steps) > 1:
        lines.append(f"Runs differ in their number of steps: {', '.join(map(str, steps))}.")
    if summary.left_out:
        lines.append(
            f"{summary.left_out} run files belong to no method, seed, weight or learning rate of this setting and were "
            "left out."
        )
    return _list(lines)


def table_text(table: Table, *, titled: bool) -> str:
    """Return one table; a folded one opens at a click."""
    lines = [
        _row(column.name for column in table.columns),
        _row("---" if column.form == "text" else "---:" for column in table.columns),
        *(_row(map(_cell, table.columns, row)) for row in table.rows),
    ]
    text = "\n".join(lines)
    if table.folded:
        return f"<details><summary>{table.title}</summary>\n\n{text}\n\n</details>"
    return f"**{table.title}**\n\n{text}" if titled and table.title else text


def _cell(column: Column, cell: Cell) -> str:
    return numbers.NOTHING if cell is None else FORMATS[column.form](cell)


def _row(cells: Iterator[str] | map) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _list(lines: Iterator[str] | list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
