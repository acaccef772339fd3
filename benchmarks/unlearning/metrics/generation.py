"""Greedy continuations, many at once."""

from collections.abc import Sequence

import torch
from shared_lib.encoding import encode
from shared_lib.models import Model, Tokenizer
from shared_lib.rows import Row
from transformers import GenerationConfig

from .likelihood import Progress, evaluating

BATCH_SIZE = 64
# An answer may be longer than the true one: "It was written by X" for "X". MUSE gives every answer 32 tokens.
MIN_ROOM = 32


def answer_questions(
    model: Model,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    min_room: int = MIN_ROOM,
    progress: Progress | None = None,
) -> list[str]:
    """Answer each row's question greedily, in at most as many tokens as the true answer has, or ``min_room`` if more.

    TOFU's own code lets every answer grow to 200 tokens with its prompt. The difference lies in rambling answers alone,
    whose tails hardly add to the recall of a true answer, but cost most of the time.
    """
    examples = [encode(tokenizer, row.question, row.answer) for row in rows]
    return continue_texts(
        model,
        tokenizer,
        [example.prompt for example in examples],
        [max(len(example.answer), min_room) for example in examples],
        progress=progress,
    )


def continue_texts(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    rooms: Sequence[int],
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> list[str]:
    """Continue each prompt with the most probable tokens, ``rooms[i]`` at most or up to the end-of-text token.

    A text doesn't depend on what else is in its batch. Batches hold rows of similar room and length, and end as soon
    as all their rows have.

    Returns:
        What follows the prompts, without special tokens and outer blanks, in the order of ``prompts``.
    """
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (rooms[i], len(prompts[i])))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            room = max(rooms[i] for i in index)
            for i, ids in zip(index, _generate(model, tokenizer, [prompts[i] for i in index], room), strict=True):
                texts[i] = tokenizer.decode(ids[: rooms[i]], skip_special_tokens=True).strip()
            if progress:
                progress(start + len(index), len(prompts))
    return texts


@torch.inference_mode()
def _generate(model: Model, tokenizer: Tokenizer, prompts: Sequence[list[int]], room: int) -> list[list[int]]:
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]  # on the left: the continuations begin together
    end = tokenizer.eos_token_id
    output = model.generate(
        input_ids=torch.tensor([[end] * n + ids for n, ids in zip(padding, prompts, strict=True)], device=model.device),
        attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in padding], device=model.device),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=room, eos_token_id=end, pad_token_id=end, use_cache=True
        ),
    )
    return [ids[: ids.index(end)] if end in ids else ids for ids in output[:, width:].tolist()]
