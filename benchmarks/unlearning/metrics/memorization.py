"""Memorisation: how much of a text a model reproduces."""

from collections.abc import Sequence

from shared_lib.encoding import Example
from shared_lib.models import Model, Tokenizer
from shared_lib.rows import Row
from torch import Tensor

from .generation import answer_questions, continue_texts
from .likelihood import Progress, TokenScores
from .rouge import rouge_l

VERBATIM_TOKENS = 128  # of the true continuation that are compared, as in MUSE's code


def without_end(scores: TokenScores, example: Example, end: int | None) -> TokenScores:
    """Leave the end-of-text token out: whether a model also stops is no part of having memorised a text.

    open-unlearning leaves out the last token of every answer, which is that one. An answer of nothing else keeps it.
    """
    count = len(scores.log_probs)
    return scores.first(count - 1) if example.answer[-1] == end and count > 1 else scores


def exact_memorization(correct: Tensor) -> float:
    r"""Count the tokens that the model predicts, given the true ones before them.

    .. math:: EM = \frac{1}{n} \sum_t [\arg\max_v \pi(v \mid x, y_{<t}) = y_t]      (arXiv:2205.10770; open-unlearning)

    Args:
        correct: ``[n]`` bool, n >= 1; :attr:`TokenScores.correct`.
    Returns:
        In [0, 1]; higher = more memorised.
    """
    _check(correct)
    return correct.double().mean().item()


def extraction_strength(correct: Tensor) -> float:
    r"""Tell how little of a text makes the model say the rest of it, word for word.

    .. math:: ES = 1 - \frac{1}{n} \min \{k : \arg\max_v \pi(v \mid x, y_{<t}) = y_t \ \forall t \geq k\}
        (arXiv:2506.12618 and open-unlearning; after arXiv:2012.07805)

    Where every token from k on is predicted from the true tokens before it, greedy decoding after k tokens says the
    same, so that one teacher-forced pass suffices. open-unlearning's loop stops at k = n - 1, and thus gives 1/n, not
    0, to a text whose last token is wrong; we take k = n, as the formula says.

    Args:
        correct: ``[n]`` bool, n >= 1; :attr:`TokenScores.correct`.
    Returns:
        In [0, 1]; higher = more memorised: 1 if the prompt alone suffices, 0 if the last token is wrong.
    """
    _check(correct)
    suffix = correct.flip(0).int().cumprod(dim=0).sum().item()
    return suffix / len(correct)


def verbatim_memorization(
    model: Model,
    tokenizer: Tokenizer,
    passages: Sequence[Example],
    prefix: int,
    *,
    room: int = VERBATIM_TOKENS,
    progress: Progress | None = None,
) -> list[float]:
    r"""Compare what the model says after a passage's first tokens with how the passage goes on (MUSE's VerbMem).

    .. math:: \mathrm{ROUGE}_{F_1}\big(f(x_{[:l]}), x_{[l+1:]}\big)      (arXiv:2407.06460, section 3)

    With F1 of ROUGE-L without stems, and both cut to ``room`` tokens, as in the code of MUSE.

    Args:
        passages: prompt and answer are taken as one text.
        prefix: l, the number of tokens shown.
    Returns:
        For each passage in [0, 1]; higher = more memorised.
    Raises:
        ValueError: a passage has no token after its prefix.
    """
    texts = [prompt + answer for prompt, answer in passages]
    for i, text in enumerate(texts):
        if len(text) <= prefix:
            raise ValueError(f"`passages[{i}]` must have more tokens than the prefix of {prefix}, got {len(text)}.")
    rests = [text[prefix : prefix + room] for text in texts]
    said = continue_texts(
        model, tokenizer, [text[:prefix] for text in texts], [len(rest) for rest in rests], progress=progress
    )
    true = [tokenizer.decode(rest, skip_special_tokens=True).strip() for rest in rests]
    return rouge_l(true, said, "f1", stem=False)


def knowledge_memorization(
    model: Model, tokenizer: Tokenizer, questions: Sequence[Row], *, progress: Progress | None = None
) -> list[float]:
    r"""Compare the answers to questions about a text with the true ones (MUSE's KnowMem).

    .. math:: \mathrm{ROUGE}_{F_1}(f(q), a)      (arXiv:2407.06460, section 3)

    With F1 of ROUGE-L without stems, as in the code of MUSE, which also shows the model a few solved questions first.
    Models that were trained on questions need none; for others, put them into ``questions`` (the muse track does).

    Returns:
        For each question in [0, 1]; higher = more memorised.
    """
    said = answer_questions(model, tokenizer, questions, progress=progress)
    return rouge_l([row.answer for row in questions], said, "f1", stem=False)


def _check(correct: Tensor) -> None:
    if len(correct) == 0:
        raise ValueError("`correct` must have at least one token, got none.")
