"""Fields of a JSON object, with errors that name the file and the field."""

import math
from collections.abc import Iterator
from typing import Any

from shared_lib.errors import InputError
from shared_lib.records import short


class Fields:
    """A JSON object that says which field of which file is not as it should be."""

    def __init__(self, where: str, values: Any, prefix: str = "") -> None:
        self.where, self.prefix = where, prefix
        if not isinstance(values, dict):
            subject = f"field `{prefix.removesuffix('.')}`" if prefix else "the content"
            raise InputError(f"{where}: {subject} must be a JSON object, got {short(values)}.")
        self.values = values

    def get(self, name: str, kind: type | tuple[type, ...], contract: str) -> Any:
        """Return the field; without it, or with one of another type, raise."""
        value = self.values.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            got = short(value) if name in self.values else "no such field"
            raise InputError(f"{self.where}: field `{self.prefix}{name}` must be {contract}, got {got}.")
        return value

    def text(self, name: str) -> str:
        return self.get(name, str, "a string")

    def flag(self, name: str) -> bool:
        return self.get(name, bool, "true or false")

    def integer(self, name: str) -> int:
        return self.get(name, int, "an integer")

    def number(self, name: str) -> float:
        value = self.get(name, (int, float), "a number")
        if not math.isfinite(value):
            raise InputError(f"{self.where}: field `{self.prefix}{name}` must be finite, got {value}.")
        return float(value)

    def number_or_none(self, name: str) -> float | None:
        """Return None for a field that is absent, null or not finite."""
        value = self.values.get(name)
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return None
        return self.number(name)

    def numbers(self, name: str) -> tuple[float, ...]:
        values = self.get(name, list, "a list of numbers")
        items = Fields(
            self.where, dict(zip(map(str, range(len(values))), values, strict=True)), f"{self.prefix}{name}."
        )
        return tuple(items.number(str(i)) for i in range(len(values)))

    def child(self, name: str) -> "Fields":
        return Fields(self.where, self.get(name, dict, "a JSON object"), f"{self.prefix}{name}.")

    def children(self, name: str) -> Iterator["Fields"]:
        for i, value in enumerate(self.get(name, list, "a list")):
            yield Fields(self.where, value, f"{self.prefix}{name}[{i}].")
