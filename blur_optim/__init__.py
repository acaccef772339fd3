"""BLUR: bi-level unlearning as a torch.optim wrapper (arXiv:2506.08164)."""

from blur_optim.chained import ChainedOptimizer
from blur_optim.optimizer import BLUR
from blur_optim.step.rules import Dots
from blur_optim.step.statistics import StepStatistics

__all__ = ["BLUR", "ChainedOptimizer", "Dots", "StepStatistics"]
