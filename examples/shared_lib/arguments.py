"""Types for argparse: numbers within bounds, with errors that say the bounds."""

import argparse
import math
from collections.abc import Callable


def whole(at_least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers of at least ``at_least``."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < at_least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {at_least}, got {text!r}")
        return int(text)

    return parse


def not_negative(text: str) -> float:
    """Parse a number of at least 0."""
    return _number(text, lambda value: value >= 0, "a number of at least 0")


def positive(text: str) -> float:
    """Parse a number above 0."""
    return _number(text, lambda value: value > 0, "a positive number")


def fraction(text: str) -> float:
    """Parse a number of at least 0 and less than 1."""
    return _number(text, lambda value: 0 <= value < 1, "a number of at least 0 and less than 1")


def _number(text: str, is_valid: Callable[[float], bool], contract: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and is_valid(value)):
        raise argparse.ArgumentTypeError(f"must be {contract}, got {text!r}")
    return value
