"""Folders of partial results: each belongs to one set of settings, and its files are never half-written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from dmagent_loader._files import write_atomically
from dmagent_loader.errors import StateError

SETTINGS = "settings.json"
"""Name of the file with the settings of a folder."""


def claim(directory: Path, settings: Mapping[str, Any], what: str) -> None:
    """Reserves a folder for one computation, or refuses one that belongs to another.

    Args:
        directory: The folder, created if missing.
        settings: Everything that the results depend on, JSON-serialisable.
        what: Name of the results in the error message.

    Raises:
        StateError: The folder holds results of other settings or data.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / SETTINGS
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in settings if found.get(key) != json.loads(text)[key]]
        if differing:
            raise StateError(
                f"{directory} holds {what} of other {', '.join(differing)}: continuing would mix two computations; "
                "use the old settings or another directory"
            )
        return
    write_atomically(path, text.encode())


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, durable: bool = True) -> None:
    """Writes a safetensors file, whole or not at all; `durable` as in `write_atomically`."""
    write_atomically(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}), durable=durable)
