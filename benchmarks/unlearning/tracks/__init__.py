"""The tracks: TOFU, MUSE and WMDP, each as data to learn, to forget and to keep, and as scores."""

from collections.abc import Iterator
from typing import Protocol

from shared_lib.models import Tokenizer

from ..settings import Settings
from .task import Task

TRACKS = ("tofu", "muse", "wmdp")


class Data(Protocol):
    """The data of a setting, read and checked, before there is a tokenizer."""

    def texts(self) -> Iterator[str]:
        """Yield what a tokenizer is trained on."""

    def task(self, tokenizer: Tokenizer, settings: Settings) -> Task:
        """Return the task for models with this tokenizer."""


def load_data(settings: Settings, number: int = 0) -> Data:
    """Read the data of the track, of the target with this number where each has its own.

    Raises:
        InputError: something is missing or not as it should be; names file, line and field.
    """
    if settings.track == "tofu":
        from .tofu import TofuData

        return TofuData(settings, number)
    if settings.track == "muse":
        from .muse import MuseData

        return MuseData(settings)
    from .wmdp import WmdpData

    return WmdpData(settings)
