"""Put models to the test, side by side."""

from collections.abc import Mapping

from rich.progress import Progress
from shared_lib.metrics import Scores, generate_answers, score
from shared_lib.models import Model, Tokenizer
from shared_lib.rows import Row, Split


def judge(
    models: Mapping[str, Model], tokenizer: Tokenizer, split: Split, progress: Progress
) -> dict[str, dict[str, Scores]]:
    """Score every model on every kind of rows; the truth ratio is for those to forget."""
    bar = progress.add_task("scoring", total=len(models) * len(split), note="")
    scores: dict[str, dict[str, Scores]] = {name: {} for name in models}
    for name, model in models.items():
        for kind, rows in split._asdict().items():
            scores[name][kind] = score(model, tokenizer, rows, with_truth_ratio=kind == "forget")
            progress.advance(bar)
    return scores


def ask(models: Mapping[str, Model], tokenizer: Tokenizer, row: Row) -> dict[str, str]:
    """Ask every model one question."""
    said = {name: generate_answers(model, tokenizer, [row])[0] for name, model in models.items()}
    return {"question": row.question, "true answer": row.answer, **said}
