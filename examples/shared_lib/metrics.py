"""What a model knows: probability of the answers, ROUGE-L of what it says, and the truth ratio."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig

from blur_optim.losses import sequence_log_probs, token_counts

from .encoding import Example, batches_in_order, encode, encode_rows
from .models import Model, Tokenizer, logits_of
from .rows import Row

T = TypeVar("T")
BATCH_SIZE = 64
GENERATE_AT_MOST = 80  # rows of a kind whose answers are generated: generating costs far more than probabilities


class Scores(NamedTuple):
    """A model's scores on one kind of rows; ``truth_ratio`` is None where it was not asked for, or no row allows it."""

    probability: float
    rouge_l: float
    truth_ratio: float | None


def score(model: Model, tokenizer: Tokenizer, rows: Sequence[Row], with_truth_ratio: bool) -> Scores:
    """Score a model on rows; ROUGE-L on at most 80 of them, evenly spaced."""
    some = thin_out(rows, GENERATE_AT_MOST)
    return Scores(
        probability=mean_probability(model, encode_rows(tokenizer, rows)),
        rouge_l=rouge_l_recall([row.answer for row in some], generate_answers(model, tokenizer, some)),
        truth_ratio=median_truth_ratio(model, tokenizer, rows) if with_truth_ratio else None,
    )


def thin_out(rows: Sequence[T], at_most: int) -> Sequence[T]:
    """Return the rows, or so many of them, evenly spaced."""
    return [rows[i * len(rows) // at_most] for i in range(at_most)] if len(rows) > at_most else rows


def mean_probability(model: Model, examples: Sequence[Example]) -> float:
    r"""Average the answers' probability per token over the rows.

    .. math:: \mathrm{mean}_i \, \pi(y_i \mid x_i)^{1/|y_i|}      (arXiv:2401.06121, section 2.2)
    """
    return answer_probabilities(model, examples).mean().item()


@torch.inference_mode()
def answer_probabilities(model: Model, examples: Sequence[Example]) -> Tensor:
    """Return exp(mean log-probability of the answer's tokens) for each example, ``[n]``."""
    model.eval()
    result = torch.empty(len(examples))
    for batch in batches_in_order(examples, BATCH_SIZE, model.device):
        log_probs = sequence_log_probs(logits_of(model, batch), batch["labels"])
        result[batch["index"].cpu()] = (log_probs / token_counts(batch["labels"])).exp().cpu()
    return result


def median_truth_ratio(model: Model, tokenizer: Tokenizer, rows: Sequence[Row]) -> float | None:
    r"""Tell how probable wrong answers are beside the true one, in other words than it was learned in.

    .. math:: R = \frac{\mathrm{mean}_j \, \pi(\hat y_j \mid x)^{1/|\hat y_j|}}
        {\pi(\tilde y \mid x)^{1/|\tilde y|}}      (arXiv:2401.06121, equation 1)

    with the paraphrased answer :math:`\tilde y` and wrong answers :math:`\hat y_j`. Under 1, the
    model tells true from wrong; at 1 and above it does not. The median over rows is returned: where the model knows
    nothing, a few rows of very large R make the mean.

    Returns:
        None where no row has both a paraphrase and wrong answers; other rows are left out.
    """
    rows = [row for row in rows if row.paraphrased_answer and row.perturbed_answers]
    if not rows:
        return None
    examples = [
        encode(tokenizer, row.question, answer)
        for row in rows
        for answer in (row.paraphrased_answer, *row.perturbed_answers)
    ]
    probabilities = answer_probabilities(model, examples)
    sizes = [1 + len(row.perturbed_answers) for row in rows]
    ratios = torch.stack([truth_ratio(part[0], part[1:]) for part in probabilities.split(sizes)])
    return ratios.median().item()


def truth_ratio(paraphrase: Tensor, wrong: Tensor) -> Tensor:
    """Return the mean of ``wrong`` over ``paraphrase``: probabilities per token, ``[j]`` and 0-d."""
    return wrong.mean() / paraphrase


def generate_answers(model: Model, tokenizer: Tokenizer, rows: Sequence[Row]) -> list[str]:
    """Answer each row's question greedily, with room for the longest true answer."""
    return answer_prompts(model, tokenizer, encode_rows(tokenizer, rows))


def answer_prompts(
    model: Model, tokenizer: Tokenizer, examples: Sequence[Example], batch_size: int = BATCH_SIZE
) -> list[str]:
    """Answer each prompt greedily, with room for the longest true answer."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].answer))
    answers = [""] * len(examples)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        for i, ids in zip(index, _generate(model, tokenizer, [examples[i] for i in index]), strict=True):
            answers[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return answers


@torch.inference_mode()
def _generate(model: Model, tokenizer: Tokenizer, examples: Sequence[Example]) -> list[list[int]]:
    width = max(len(example.prompt) for example in examples)
    padding = [width - len(example.prompt) for example in examples]  # on the left: the answers begin together
    end = tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(len(example.answer) for example in examples),
        eos_token_id=end,
        pad_token_id=end,
    )
    output = model.generate(
        input_ids=torch.tensor([[end] * n + e.prompt for n, e in zip(padding, examples, strict=True)]).to(model.device),
        attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in padding]).to(model.device),
        generation_config=config,
    )
    return [ids[: ids.index(end)] if end in ids else ids for ids in output[:, width:].tolist()]


def rouge_l_recall(references: Sequence[str], answers: Sequence[str]) -> float:
    """Average the ROUGE-L recall of the answers: the longest common subsequence's share of the reference."""
    from rouge_score.rouge_scorer import RougeScorer  # Here: the training processes need not wait for it.

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    recalls = [scorer.score(r, a)["rougeL"].recall for r, a in zip(references, answers, strict=True)]
    return sum(recalls) / len(recalls)
