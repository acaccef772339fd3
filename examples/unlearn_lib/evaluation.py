"""Scores before and after: how probable the answers are, and how much of them the model says by itself."""

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from shared_lib.encoding import Example, batches_in_order
from shared_lib.metrics import answer_prompts, rouge_l_recall, thin_out
from shared_lib.models import Tokenizer, logits_of

from blur_optim.losses import sequence_log_probs, token_counts

from . import processes


class Scores(NamedTuple):
    """A model's scores on a set of rows; None for a number that is not finite, or could not be computed.

    probability: of the answers, per token, averaged over rows. perplexity: over all answers' tokens. rouge_l: the
    share of the true answer that the model says, where rows have a prompt.
    """

    rows: int
    probability: float | None
    perplexity: float | None
    rouge_l: float | None


def score_sets(
    model: Any, tokenizer: Tokenizer, sets: Mapping[str, Sequence[Example]], options: argparse.Namespace
) -> dict[str, Scores]:
    """Score a model on every set. Each process takes its share of the rows, and all return the same."""
    return {name: _score(model, tokenizer, thin_out(rows, options.eval_rows), options) for name, rows in sets.items()}


def _score(model: Any, tokenizer: Tokenizer, rows: Sequence[Example], options: argparse.Namespace) -> Scores:
    log_probs, counts = _log_probs(model, _share(rows), options.batch_size)
    asked = thin_out([row for row in rows if row.prompt], options.generate_rows) if options.generate_rows else []
    recalls = _recalls(model, tokenizer, _share(asked), options.batch_size)
    parts = gather_object([(log_probs, counts, recalls)])
    return summarise(*([value for part in parts for value in part[i]] for i in range(3)))


def summarise(log_probs: Sequence[float], counts: Sequence[int], recalls: Sequence[float]) -> Scores:
    """Return the scores of rows whose answers have these log-probabilities and numbers of tokens."""
    means = torch.tensor(log_probs, dtype=torch.float64) / torch.tensor(counts)
    perplexity = torch.tensor(-math.fsum(log_probs) / sum(counts), dtype=torch.float64).exp()
    rouge_l = sum(recalls) / len(recalls) if recalls else None
    return Scores(len(counts), _finite(means.exp().mean()), _finite(perplexity), rouge_l)


@torch.inference_mode()
def _log_probs(model: Any, rows: Sequence[Example], batch_size: int) -> tuple[list[float], list[int]]:
    model.eval()
    log_probs: list[float] = []
    counts: list[int] = []
    for batch in batches_in_order(rows, batch_size, model.device):
        log_probs += sequence_log_probs(logits_of(model, batch), batch["labels"]).tolist()
        counts += token_counts(batch["labels"]).tolist()
    return log_probs, counts


def _recalls(model: Any, tokenizer: Tokenizer, rows: Sequence[Example], batch_size: int) -> list[float]:
    answers = answer_prompts(model, tokenizer, rows, batch_size)
    truths = [tokenizer.decode(row.answer, skip_special_tokens=True).strip() for row in rows]
    return [rouge_l_recall([truth], [answer]) for truth, answer in zip(truths, answers, strict=True)]


def _share(rows: Sequence[Example]) -> Sequence[Example]:
    return rows[processes.rank() :: processes.count()]


def _finite(value: torch.Tensor) -> float | None:
    return value.item() if value.isfinite() else None
