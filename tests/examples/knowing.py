"""A small model that knows some rows."""

from pathlib import Path

import torch
from shared_lib.encoding import encode_rows
from shared_lib.models import load_model, load_tokenizer, save_model
from shared_lib.records import read_rows
from unlearn_lib.tokens import collate


def know(model: Path, rows: Path, folder: Path) -> None:
    """Teach the small Llama in ``model`` the rows, and write it to ``folder``."""
    tokenizer, llama = load_tokenizer(model), load_model(model, "cpu")
    batch = collate(encode_rows(tokenizer, read_rows(str(rows))))
    optimizer = torch.optim.AdamW(llama.parameters(), lr=5e-3)
    for _ in range(12):
        optimizer.zero_grad()
        llama(**batch).loss.backward()
        optimizer.step()
    save_model(llama, tokenizer, folder)
