"""Fluency: is what a model says still language? Measured without a classifier from a hub."""

import math
import re
from collections import Counter
from collections.abc import Sequence

from shared_lib.encoding import Example
from shared_lib.models import Model, Tokenizer

from .likelihood import token_log_probs

# ROME's weights of the entropies; like there, the mean of the weighted ones is taken.
WEIGHTS = {2: 2 / 3, 3: 4 / 3}
REPEATED = 4  # the n of the repetition rate, as in arXiv:1908.04319
_WORD = re.compile(r"\w+|[^\w\s]")


def ngram_entropy(text: str) -> float:
    r"""Weigh the entropies of a text's bigrams and trigrams.

    .. math:: \tfrac12 \big(\tfrac23 H_2 + \tfrac43 H_3\big), \quad
        H_n = -\sum_g f_n(g) \log_2 f_n(g)      (ROME's GE; arXiv:2202.05262 and its code)

    with the relative frequencies f of the n-grams of words and punctuation marks. (ROME splits words with NLTK, which
    needs a download; here a word is a run of letters and digits.) It grows with the length, at most
    :math:`\approx \log_2` of the number of words, so compare it with that of other models on the same questions.

    Returns:
        In bits, >= 0; higher = more varied, low = repeats itself or says nothing. 0 for texts of up to two words.
    """
    words = _WORD.findall(text)
    return sum(weight * _entropy(_ngrams(words, n)) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def repetition_rate(text: str, n: int = REPEATED) -> float:
    r"""Count the n-grams that occurred before.

    .. math:: 1 - \frac{|\{\text{distinct n-grams}\}|}{|\{\text{n-grams}\}|}      (seq-rep-n; arXiv:1908.04319)

    Returns:
        In [0, 1); higher = repeats itself more. 0 for a text shorter than n words.
    """
    counts = _ngrams(_WORD.findall(text), n)
    return 1 - len(counts) / total if (total := counts.total()) else 0.0


def perplexity(judge: Model, tokenizer: Tokenizer, texts: Sequence[str]) -> float | None:
    r"""Ask another model how surprising the texts are.

    .. math:: \exp\Big(-\frac{1}{\sum_i n_i} \sum_i \sum_{t \geq 2} \log \pi_{judge}(y_{i,t} \mid y_{i,<t})\Big)

    Args:
        judge: a model of the language, such as the one before unlearning.
        tokenizer: that of ``judge``.
    Returns:
        >= 1; higher = stranger. None if no text has two tokens.
    """
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    log_probs = token_log_probs(judge, [Example([], text) for text in ids if len(text) > 1])
    count = sum(map(len, log_probs))
    return math.exp(-sum(row.double().sum().item() for row in log_probs) / count) if count else None


def _ngrams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _entropy(counts: Counter[tuple[str, ...]]) -> float:
    total = counts.total()
    return sum(count / total * math.log2(total / count) for count in counts.values())
