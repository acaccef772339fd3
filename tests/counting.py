"""A language model whose probabilities are known without computing."""

from types import SimpleNamespace

import torch
from torch import Tensor


class Counter(torch.nn.Module):
    """Predict token t + 1 after token t with probability 1/2, and each other of the 9 tokens with 1/16."""

    device = torch.device("cpu")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        probabilities = torch.full((*input_ids.shape, 9), 1 / 16)
        probabilities.scatter_(-1, ((input_ids + 1) % 9).unsqueeze(-1), 0.5)
        return SimpleNamespace(logits=probabilities.log())
