"""Folders of partial results: each belongs to one set of settings, and no file in it is ever half-written."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from dmagent_loader.errors import StateError


def claim(directory: Path, settings: Mapping[str, Any], what: str) -> None:
    """Makes a folder the place of one computation, or refuses one that belongs to another.

    Args:
        directory: Created if missing.
        settings: JSON-serialisable; everything that the results depend on.
        what: The results, for the message.

    Raises:
        StateError: The folder holds results of other settings or data.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "settings.json"
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in settings if found.get(key) != json.loads(text)[key]]
        if differing:
            raise StateError(
                f"{directory} holds {what} of other {', '.join(differing)}: continuing would mix two computations; "
                "use the old settings, or another directory"
            )
        return
    write_bytes(path, text.encode())


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, durable: bool = True) -> None:
    """Writes a safetensors file, whole or not at all; `durable` as in `write_bytes`."""
    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}), durable=durable)


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Writes a file beside its place, flushes it to disk and renames it.

    Args:
        path: The file.
        data: Its content.
        durable: Wait until it is on the disk. Without, it survives a kill of the process, but not a loss of power.
    """
    # A name by lot: two that work on one unit, on two machines maybe, must not write into each other's file.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    with partial.open("wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    partial.replace(path)
