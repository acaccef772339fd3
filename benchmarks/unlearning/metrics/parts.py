"""Finished parts of a suite, kept in a file, so that an interrupted suite goes on where it stopped."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from shared_lib.models import Model

T = TypeVar("T")


class Parts:
    """Results by name, written to a JSON file after each.

    Args:
        path: the file; None keeps nothing.
        fingerprint: what the results depend on. A file with another one is not read, and overwritten.
    """

    def __init__(self, path: Path | None = None, fingerprint: str = "") -> None:
        self._path, self._fingerprint = path, fingerprint
        self._done: dict[str, object] = self._read()

    def get(self, name: str, compute: Callable[[], T]) -> T:
        """Return the part, computed unless the file has it. It must survive JSON: lists, dicts with text keys, ..."""
        if name not in self._done:
            self._done[name] = compute()
            self._write()
        return self._done[name]

    def _read(self) -> dict[str, object]:
        try:
            content = json.loads(self._path.read_bytes()) if self._path else {}
            return content["parts"] if content["fingerprint"] == self._fingerprint else {}
        except (OSError, ValueError, KeyError, TypeError):  # Missing, cut off, or something else.
            return {}

    def _write(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        unfinished.write_text(json.dumps({"fingerprint": self._fingerprint, "parts": self._done}))
        os.replace(unfinished, self._path)


def fingerprint(model: Model, *settings: object) -> str:
    """Hash the model's weights and the settings' representations. About 3 ms for each million of parameters."""
    digest = hashlib.sha256(repr(settings).encode("utf-8"))
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
