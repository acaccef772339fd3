"""One teacher-forced pass: what a model predicts for every answer token."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from shared_lib.encoding import IGNORE_INDEX, Batch, Example, collate
from shared_lib.models import Model, logits_of
from torch import Tensor

# Padded tokens of a batch. TOFU's answers on one thread (AMD EPYC), 0.7M parameters, vocabulary 2048: 26.9k tokens a
# CPU-second in batches of 1024, 28.4k of 2048, 26.9k of 4096; 2.8M parameters: 11.4k, 11.4k, 10.8k.
BATCH_TOKENS = 2048
MIN_VARIANCE = 1e-6  # as in open-unlearning: a certain prediction has no spread to divide by

Progress = Callable[[int, int], None]  # rows done, rows in all


class TokenScores(NamedTuple):
    """What a model predicts for the n answer tokens of one example; tensors ``[n]`` on the CPU.

    log_probs: float32, of the true token. correct: bool, whether that is the most probable one. mean, std: float32,
    of the log-probability of a token drawn from the prediction itself, as Min-K%++ needs; None unless asked for.
    """

    log_probs: Tensor
    correct: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None

    def first(self, count: int) -> "TokenScores":
        """Return the scores of the first tokens."""
        return TokenScores(*(None if part is None else part[:count] for part in self))


@torch.inference_mode()
def token_scores(
    model: Model,
    examples: Sequence[Example],
    *,
    vocabulary: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> list[TokenScores]:
    r"""Score every answer token, given the prompt and the true tokens before it.

    .. math:: \log \pi(y_t \mid x, y_{<t}), \quad
        \mu_t = \sum_v \pi_t(v) \log \pi_t(v), \quad
        \sigma_t^2 = \sum_v \pi_t(v) \log^2 \pi_t(v) - \mu_t^2      (the last two: arXiv:2404.02936, equation 3)

    The very first token of a sequence is predicted by nothing: without a prompt, an answer of n tokens has n - 1
    scores. The model's training mode is as before afterwards.

    Args:
        vocabulary: whether :math:`\mu` and :math:`\sigma` are wanted; about 5 % slower.
        batch_tokens: about how many tokens a batch has with its padding; it changes the speed alone.
        progress: called after each batch.
    Returns:
        In the order of ``examples``.
    Raises:
        ValueError: an example has no token to predict.
    Cost: one forward pass. The logits of one batch are kept, never those of two.
    """
    for i, (prompt, answer) in enumerate(examples):
        if not answer or len(prompt) + len(answer) < 2:
            raise ValueError(
                f"`examples[{i}]` must have a token to predict, got a prompt of {len(prompt)} and an answer of "
                f"{len(answer)} tokens."
            )
    result: dict[int, TokenScores] = {}
    with evaluating(model):
        for batch in _batches(model, examples, batch_tokens):
            result.update(zip(batch["index"].tolist(), _score(model, batch, vocabulary), strict=True))
            if progress:
                progress(len(result), len(examples))
    return [result[i] for i in range(len(examples))]


@torch.inference_mode()
def next_log_probs(
    model: Model,
    prompts: Sequence[list[int]],
    candidates: Sequence[int],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Tensor:
    """Return the log-probability of each candidate token right after each prompt: ``[prompts, candidates]``."""
    result = torch.empty(len(prompts), len(candidates))
    done = 0
    with evaluating(model):
        for batch in _batches(model, [Example(prompt, []) for prompt in prompts], batch_tokens):
            last = batch["attention_mask"].sum(dim=1) - 1
            logits = logits_of(model, batch)[torch.arange(len(last), device=last.device), last]
            result[batch["index"].cpu()] = logits.float().log_softmax(dim=-1)[:, list(candidates)].cpu()
            done += len(last)
            if progress:
                progress(done, len(prompts))
    return result


def _batches(model: Model, examples: Sequence[Example], tokens: int) -> Iterator[Batch]:
    # The longest first: if the memory doesn't suffice, that shows at once.
    lengths = [len(prompt) + len(answer) for prompt, answer in examples]
    order = sorted(range(len(examples)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        size = max(1, tokens // lengths[order[start]])
        yield collate(examples, order[start : start + size], model.device)
        start += size


def _score(model: Model, batch: Batch, vocabulary: bool) -> Iterator[TokenScores]:
    labels = batch["labels"][:, 1:]
    predicted = labels != IGNORE_INDEX
    targets = labels[predicted]
    log_probs = logits_of(model, batch)[:, :-1][predicted].float().log_softmax(dim=-1)  # [N, V], without the prompts
    parts = [log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), log_probs.argmax(dim=-1) == targets]
    if vocabulary:
        parts += _mean_and_std(log_probs)
    counts = predicted.sum(dim=1).tolist()
    return map(TokenScores, *(part.cpu().split(counts) for part in parts))


def _mean_and_std(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    weighted = log_probs.exp().mul_(log_probs)
    mean = weighted.sum(dim=-1)
    variance = weighted.mul_(log_probs).sum(dim=-1) - mean.square()
    return mean, variance.clamp_(min=MIN_VARIANCE).sqrt_()


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Switch dropout and the like off; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def token_log_probs(
    model: Model, examples: Sequence[Example], *, batch_tokens: int = BATCH_TOKENS, progress: Progress | None = None
) -> list[Tensor]:
    """Return the log-probability of every answer token, ``[n]`` for each example; higher = more memorised."""
    return [s.log_probs for s in token_scores(model, examples, batch_tokens=batch_tokens, progress=progress)]


def row_log_probs(model: Model, examples: Sequence[Example], *, progress: Progress | None = None) -> Tensor:
    r"""Average the log-probability over each answer's tokens.

    .. math:: \ell_i = \frac{1}{|y_i|} \log \pi(y_i \mid x_i)

    Returns:
        ``[rows]`` float64, <= 0; higher = more memorised.
    """
    return average_rows(token_log_probs(model, examples, progress=progress))


def average_rows(log_probs: Sequence[Tensor]) -> Tensor:
    """Average each row's tokens: ``[rows]`` float64."""
    return torch.tensor([row.double().mean().item() for row in log_probs], dtype=torch.float64)


def mean_log_prob(model: Model, examples: Sequence[Example]) -> float:
    r"""Average the answers' log-probability per token over the rows: :math:`\mathrm{mean}_i \, \ell_i`, <= 0.

    Higher = more memorised. Unlike the probability it still tells strongly forgotten rows apart.
    """
    return log_prob_and_probability(model, examples)["log_prob"]


def probability(model: Model, examples: Sequence[Example]) -> float:
    r"""Average the answers' probability per token over the rows, in [0, 1]; higher = more memorised.

    .. math:: \mathrm{mean}_i \, \pi(y_i \mid x_i)^{1/|y_i|}      (arXiv:2401.06121, section 2.2)
    """
    return log_prob_and_probability(model, examples)["probability"]


def log_prob_and_probability(model: Model, examples: Sequence[Example]) -> dict[str, float]:
    """Return :func:`mean_log_prob` and :func:`probability`, as ``log_prob`` and ``probability``, of one pass."""
    rows = row_log_probs(model, examples)
    return {"log_prob": rows.mean().item(), "probability": rows.exp().mean().item()}
