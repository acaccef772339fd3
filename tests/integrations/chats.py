"""A tokenizer of a few words with a chat template, and chats of them."""

import torch
from tiny import VOCABULARY

WORDS = [
    *("what", "is", "the", "name", "of", "author", "book", "who", "wrote", "red", "blue", "green"),
    *("one", "two", "three", "yes", "no", "it", "was", "why", "not"),
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "user", "assistant"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }} {{ eos_token }} {% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    assert len(vocabulary) <= VOCABULARY
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chats(count, seed):
    """Rows of questions and answers, of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def say(length):
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))

    turns = [(say(4 + i % 3), say(3 + i % 4)) for i in range(count)]
    roles = ("user", "assistant")
    return [{"messages": [{"role": r, "content": c} for r, c in zip(roles, turn, strict=True)]} for turn in turns]
