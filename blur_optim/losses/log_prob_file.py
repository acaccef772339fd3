"""The file of stored log-probabilities: safetensors, and always whole."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from blur_optim.losses.checks import import_optional
from blur_optim.losses.fingerprints import KEY_BYTES

FORMAT = "blur_optim.reference_log_probs"
VERSION = "1"  # Raise it when keys, fingerprints or the layout change, so that no old file is misread.


class Contents(NamedTuple):
    """What a file holds: the model's fingerprint, and a log-probability by example key."""

    model: str
    log_probs: dict[bytes, float]


def import_safetensors() -> Any:
    """Return the module ``safetensors`` with its ``torch`` part, which needs numpy to write."""
    import_optional("numpy")
    import_optional("safetensors.torch")
    return import_optional("safetensors")


def write_log_probs(path: Path, model: str, log_probs: Mapping[bytes, float]) -> None:
    """Write n >= 1 log-probabilities in such a way that ``path`` holds them all or what it held before.

    The file has ``keys`` [n, 16] uint8 and ``log_probs`` [n] float32, and in its metadata the format, its version
    and the model's fingerprint.

    Raises:
        OSError: it can't be written, such as for a full disk.
        ImportError: safetensors or numpy isn't installed.
    """
    keys = torch.frombuffer(bytearray(b"".join(log_probs)), dtype=torch.uint8).view(-1, KEY_BYTES)
    values = torch.tensor(list(log_probs.values()), dtype=torch.float32, device="cpu")
    metadata = {"format": FORMAT, "version": VERSION, "model": model}
    content = import_safetensors().torch.save({"keys": keys, "log_probs": values}, metadata=metadata)
    with _replacing(path) as file:
        file.write(content)


def read_log_probs(path: Path) -> Contents:
    """Read what :func:`write_log_probs` wrote.

    Raises:
        OSError: there is no such file, or it can't be read.
        ValueError: it is of another kind, of another version, or damaged.
        ImportError: safetensors or numpy isn't installed.
    """
    safetensors = import_safetensors()
    path.open("rb").close()  # Of a folder, or a file that may not be read, safetensors does not say what is wrong.
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            keys, log_probs = file.get_tensor("keys").numpy().tobytes(), file.get_tensor("log_probs").tolist()
    except safetensors.SafetensorError as error:
        raise ValueError(_not_ours(path, str(error))) from error
    split = [keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)]
    return Contents(metadata["model"], dict(zip(split, log_probs, strict=True)))


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(_not_ours(path, "it is of another kind"))
    if metadata.get("version") != VERSION:
        raise ValueError(_not_ours(path, f"it has version {metadata.get('version')}, this code reads {VERSION}"))


def _not_ours(path: Path, reason: str) -> str:
    return (
        f"`path` must name a file that ReferenceLogProbs can read, got {str(path)!r}: {reason}. "
        "Give another path, or delete the file to have it computed anew."
    )


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write to that takes ``path``'s place at the end, and only then."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # Two processes may write at once.
    try:
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # Else a power cut may keep the new name and lose what it stands for.
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
