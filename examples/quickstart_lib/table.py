"""What a person reads at the end, down to 60 columns."""

import re
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .results import Results

NARROW = 70  # Below this many columns, headings are broken.
LONGEST_ANSWER = 200  # A ruined model goes on and on.
LEGEND = (
    "probability: of the true answer, per token. ROUGE-L: how much of the true answer the model says. truth ratio: "
    "how probable wrong answers are beside the true one, reworded; from 1 on, the model cannot tell them apart. "
    "95 % kept: the least probability on the way while retained and untouched rows had 95 % of theirs. "
    "cos: of the angle between the two gradients, mean over the steps. time: of a step, over the weighted sum's. "
    "retain metric: the step that costs the retain loss least, docs/method.md. "
    "The goal is the last column, the model that never saw the forgotten authors."
)
_NARROW_HEADINGS = {
    "before": "be-\nfore",
    "gradient ascent": "gra-\ndient\nascent",
    "weighted sum": "weigh-\nted\nsum",
    "normalized": "nor-\nmal-\nized",
    "without them": "with-\nout\nthem",
}
_PURPOSE = {"forget": "to forget", "retain": "to retain", "untouched": "known before and left untouched"}
DIGITS = (
    "A small network is to have no opinion on 40 images of a three (KL to uniform) and keep the rest, other threes "
    "too. Each weighted sum beside the BLUR run of lowest KL whose retain loss is no higher:"
)


def tell(console: Console, results: Results, methods: Sequence[str], baseline: str) -> None:
    """Print all of it; ``methods`` are compared with the baseline in words."""
    console.print()
    _print_training(console, results)
    print_answers(console, results.answers)
    _print_title(console, "Forgetting two authors")
    print_scores(console, results, baseline)
    for method in methods:
        console.print(compare(results, method, baseline))
    console.print()
    _print_title(console, "Second act: forgetting forty digits")
    print_digits(console, results)
    console.print()


def _print_title(console: Console, title: str) -> None:
    console.print(Text(title, style="bold underline"))


def _print_training(console: Console, results: Results) -> None:
    for name, (known, epochs, probability) in results.training.items():
        if not known:
            console.print(
                f"Note: the model {name} does not know its answers. It reached a probability of {probability:.2f} when "
                f"its {epochs} epochs were used up; all below is to be read with that in mind. Raise --epochs.\n",
                style="yellow",
            )


def print_answers(console: Console, answers: Mapping[str, Mapping[str, str]]) -> None:
    """Print a question of each kind with its true answer, and what each model says."""
    for kind, said in answers.items():
        table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in said.items():
            table.add_row(name, _shortened(text))
        _print_title(console, f"A question {kind}")
        console.print(table)
        console.print()


def _shortened(text: str) -> Text:
    if not text:
        return Text("(says nothing)", style="dim")
    once = re.sub(r"(\S+?)( ?\1){4,}", r"\1 \1 \1 …", " ".join(text.split()))
    return Text(once if len(once) <= LONGEST_ANSWER else once[: LONGEST_ANSWER - 2] + " …")


def print_scores(console: Console, results: Results, baseline: str) -> None:
    """Print one column a model, one row a measure."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for name in results.scores:
        table.add_column(_heading(name, console.width), justify="right", no_wrap=True)
    for kind in results.rows:
        table.add_row(Text(kind, style="bold"))
        _add_kind(table, results, kind)
    _add_steps(table, results, baseline)
    console.print(", ".join(f"{count} rows {_PURPOSE[kind]}" for kind, count in results.rows.items()), style="dim")
    console.print(table)
    console.print(LEGEND, style="dim")
    console.print()


def _heading(name: str, width: int) -> str:
    broken = _NARROW_HEADINGS.get(name) if width < NARROW else None
    return broken or name.replace(" ", "\n")


def _add_kind(table: Table, results: Results, kind: str) -> None:
    columns = [kinds[kind] for kinds in results.scores.values()]
    table.add_row(" probability", *(f"{s.probability:.2f}" for s in columns))
    table.add_row(" ROUGE-L", *(f"{s.rouge_l:.2f}" for s in columns))
    if kind == "forget":
        traces = [results.traces.get(name) for name in results.scores]
        table.add_row(" 95 % kept", *("-" if t is None else f"{t.forgotten_while_kept():.2f}" for t in traces))
        table.add_row(" truth ratio", *("-" if s.truth_ratio is None else f"{s.truth_ratio:.2f}" for s in columns))


def _add_steps(table: Table, results: Results, baseline: str) -> None:
    traces = [results.traces.get(name) for name in results.scores]
    cosines = [trace.mean_cosine if trace else None for trace in traces]
    times = [trace.time_relative_to(results.traces[baseline]) if trace else None for trace in traces]
    table.add_row(Text("each step", style="bold"))
    table.add_row(" cos", *("-" if cosine is None else f"{cosine:.2f}" for cosine in cosines))
    table.add_row(" time", *("-" if time is None else f"{time:.2f}x" for time in times))


def compare(results: Results, method: str, baseline: str) -> str:
    """Say in numbers how a method ended beside the baseline."""
    ours, theirs = results.scores[method], results.scores[baseline]
    changes = [
        f"{kind} {ours[kind].probability:.3f} ({ours[kind].probability - theirs[kind].probability:+.3f})"
        for kind in results.rows
    ]
    return f"Probability under {method} (and the change from the {baseline}): " + ", ".join(changes) + "."


def print_digits(console: Console, results: Results) -> None:
    """Print each weighted sum beside the BLUR run that forgets most at a retain loss no higher."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("weighted\nsum", "retain\nloss", "forget\nKL", "BLUR", "retain\nloss", "forget\nKL", "KL\nratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for sum_, blur in results.digits_matches:
        left = [f"λ={sum_.weight:g}", f"{sum_.retain_loss:.3f}", f"{sum_.forget_kl:.3f}"]
        right = ["none", "-", "-", "-"]
        if blur:
            ratio = blur.forget_kl / sum_.forget_kl
            right = [f"γ={blur.weight:g}", f"{blur.retain_loss:.3f}", f"{blur.forget_kl:.3f}", f"{ratio:.2f}"]
        table.add_row(*left, *right)
    console.print(DIGITS, style="dim")
    console.print(table)
