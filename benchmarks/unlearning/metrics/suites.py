"""All of a benchmark's metrics of one model, as one flat dict; resumable part by part."""

from .suite_choices import choice_scores
from .suite_muse import MuseEvaluation, MuseScores, muse_scores
from .suite_parts import Scores
from .suite_tofu import TofuEvaluation, TofuReference, TofuScores, tofu_scores

__all__ = [
    "MuseEvaluation",
    "MuseScores",
    "Scores",
    "TofuEvaluation",
    "TofuReference",
    "TofuScores",
    "choice_scores",
    "muse_scores",
    "tofu_scores",
]
