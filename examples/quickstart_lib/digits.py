"""The second act: a small network forgets forty digits whose like it must keep.

The forty images look like the others of their class, which stay. So the gradients point against each other
(their cosine is near -1), and how they are combined decides what is forgotten. The forget loss is
KL(uniform || p). With KL(p || uniform), which is bounded, weighted sum and BLUR end on par.
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blur_optim import BLUR

CLASS, COUNT, LR, WEIGHT_DECAY = 3, 40, 3e-3, 0.01
LAMBDAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
GAMMAS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
RUNS = len(LAMBDAS) + len(GAMMAS)


class Digits(NamedTuple):
    """Images ``[n, 64]`` in [0, 1]: those to forget, and the others with their labels."""

    forget: Tensor
    retain: Tensor
    labels: Tensor


class Outcome(NamedTuple):
    """One run of one method: its weight (lambda or gamma), and where it ended."""

    method: str
    weight: float
    forget_kl: float
    retain_loss: float
    retain_accuracy: float
    median_cosine: float


class Match(NamedTuple):
    """A weighted sum, and the BLUR run that forgets most at a retain loss no higher; None where there is none."""

    weighted_sum: Outcome
    blur: Outcome | None


def forget_digits(steps: int, seed: int, advance: Callable[[], None]) -> list[Outcome]:
    """Run weighted sums over lambda and BLUR over gamma from the same network; ``advance`` is called after each."""
    digits = load()
    start = train_network(digits, steps, seed)
    settings = [("weighted_sum", 1.0, weight) for weight in LAMBDAS] + [("blur", gamma, 1.0) for gamma in GAMMAS]
    outcomes = []
    for rule, gamma, retain_weight in settings:
        outcomes.append(_unlearn(copy.deepcopy(start), digits, steps, rule, gamma, retain_weight))
        advance()
    return outcomes


def load() -> Digits:
    """Return scikit-learn's digits; the first forty images of the class are those to forget."""
    from sklearn.datasets import load_digits  # Here: the training processes need not wait for it.

    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    forget = torch.zeros(len(labels), dtype=torch.bool)
    forget[(labels == CLASS).nonzero()[:COUNT, 0]] = True
    return Digits(images[forget], images[~forget], labels[~forget])


def train_network(digits: Digits, steps: int, seed: int) -> nn.Module:
    """Train a network of one hidden layer on all images."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    images = torch.cat([digits.retain, digits.forget])
    labels = torch.cat([digits.labels, torch.full((len(digits.forget),), CLASS)])
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network


def kl_to_uniform(logits: Tensor) -> Tensor:
    r"""Average KL(uniform || p) over images: 0 where the network has no opinion.

    .. math:: -\log C - \tfrac{1}{C} \sum_c \log p_c
    """
    log_probs = F.log_softmax(logits, dim=-1)
    return -log_probs.mean() - math.log(logits.shape[-1])


def _unlearn(network: nn.Module, digits: Digits, steps: int, rule: str, gamma: float, retain_weight: float) -> Outcome:
    optimizer = BLUR(
        network.parameters(),
        base=torch.optim.AdamW,
        rule=rule,
        gamma=gamma,
        retain_weight=retain_weight,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
    )

    def forget() -> Tensor:
        loss = kl_to_uniform(network(digits.forget))
        loss.backward()
        return loss

    def retain() -> Tensor:
        loss = F.cross_entropy(network(digits.retain), digits.labels)
        loss.backward()
        return loss

    cosines = []
    for _ in range(steps):
        optimizer.step(forget, retain)
        cosines.append(optimizer.statistics.cosine)
    weight = retain_weight if rule == "weighted_sum" else gamma
    return _outcome(network, digits, rule, weight, torch.stack(cosines).median().item())


@torch.no_grad()
def _outcome(network: nn.Module, digits: Digits, rule: str, weight: float, cosine: float) -> Outcome:
    logits = network(digits.retain)
    return Outcome(
        method=rule,
        weight=weight,
        forget_kl=kl_to_uniform(network(digits.forget)).item(),
        retain_loss=F.cross_entropy(logits, digits.labels).item(),
        retain_accuracy=(logits.argmax(-1) == digits.labels).double().mean().item(),
        median_cosine=cosine,
    )


def match_at_retain_loss(outcomes: list[Outcome]) -> list[Match]:
    """Set beside each weighted sum the BLUR run that forgets most without a higher retain loss."""
    blur = [outcome for outcome in outcomes if outcome.method == "blur"]
    return [
        Match(
            sum_, min((b for b in blur if b.retain_loss <= sum_.retain_loss), key=lambda b: b.forget_kl, default=None)
        )
        for sum_ in outcomes
        if sum_.method == "weighted_sum"
    ]
