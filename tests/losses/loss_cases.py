"""Small cases of the losses, written down so that every number is known; and all losses with their arguments bound."""

import math
from types import SimpleNamespace

import torch
from torch import nn

LOG = math.log


def log_sigmoid(x: float) -> float:
    return -LOG(1 + math.exp(-x))


def grad_of(loss_fn, *inputs):
    """The gradients of ``loss_fn(*inputs)`` with respect to each input, which stay untouched."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(loss_fn(*leaves), leaves)


# Next-token probabilities over three words, written down so that every log-probability is a known logarithm.
# Row 0 predicts words 1 and 2 (its first label is given, its last position predicts nothing); row 1 only word 0.
PROBABILITIES = torch.tensor(
    [
        [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]],
        [[0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.2, 0.2, 0.6]],
    ],
    dtype=torch.float64,
)
LOGITS = PROBABILITIES.log() + torch.tensor([[[3.0], [-2.0], [0.0]]], dtype=torch.float64)  # any offset
LABELS = torch.tensor([[2, 1, 2], [1, -100, 0]])
ROW_LOG_PROBS = [LOG(0.25) + LOG(0.7), LOG(0.8)]
PREDICTS = torch.tensor([[True, True, False], [False, True, False]])  # the positions that count
REFERENCE_PROBABILITIES = torch.tensor(
    [
        [[0.25, 0.25, 0.5], [0.1, 0.2, 0.7], [1 / 3, 1 / 3, 1 / 3]],
        [[0.1, 0.1, 0.8], [0.4, 0.4, 0.2], [0.1, 0.8, 0.1]],
    ],
    dtype=torch.float64,
)
REFERENCE_LOGITS = REFERENCE_PROBABILITIES.log()
COUNTS = torch.tensor([2, 5])
LOG_PROBS = torch.tensor([-3.0, -0.5], dtype=torch.float64)
REFERENCE = torch.tensor([-2.0, -4.0], dtype=torch.float64)
CHOSEN = torch.tensor([-6.0, -7.0], dtype=torch.float64)
REFERENCE_CHOSEN = torch.tensor([-6.5, -5.0], dtype=torch.float64)


class ToyModel(nn.Module):
    """Bigram logits; a frozen layer that two parents share. Records its calls, and raises on demand."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(40, 40)
        self.dropout = nn.Dropout(0.5)
        self.frozen_norm = nn.LayerNorm(40).eval()
        self.head = nn.Sequential(self.frozen_norm)
        self.calls = []
        self.error = None

    def forward(self, input_ids, **inputs):
        self.calls.append({"input_ids": input_ids, **inputs})
        assert not any(module.training for module in self.modules())
        assert not torch.is_grad_enabled()
        if self.error is not None:
            raise self.error
        return SimpleNamespace(logits=self.head(self.dropout(self.table(input_ids))))
