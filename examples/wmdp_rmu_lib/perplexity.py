"""How surprised a model is by passages."""

import math
from collections.abc import Iterator, Sequence

import torch
from shared_lib.encoding import IGNORE_INDEX
from shared_lib.models import Model, logits_of

from blur_optim.losses import sequence_log_probs, token_counts

from .corpora import Batch, collate


def batches_of(passages: Sequence[list[int]], size: int, device: torch.device | str) -> Iterator[Batch]:
    """Yield all passages in batches, in order."""
    for i in range(0, len(passages), size):
        yield collate(passages[i : i + size], device)


@torch.inference_mode()
def perplexity(model: Model, passages: Sequence[list[int]], batch_size: int) -> float:
    r"""Compute the perplexity of a token.

    .. math:: \exp\Bigl(-\tfrac{1}{N} \sum_{i,t} \log \pi(x_{i,t} \mid x_{i,<t})\Bigr)

    Returns:
        infinity where it exceeds the range of floats.
    """
    log_prob, count = 0.0, 0
    for batch in batches_of(passages, batch_size, model.device):
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
        log_prob += sequence_log_probs(logits_of(model, batch), labels).double().sum().item()
        count += int(token_counts(labels).sum())
    try:
        return math.exp(-log_prob / count)
    except OverflowError:
        return math.inf
