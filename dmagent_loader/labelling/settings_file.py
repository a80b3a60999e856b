"""The settings of a job, in a file beside what it has written, so that only the same job continues it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmagent_loader._files import write_atomically
from dmagent_loader.errors import ConfigurationError


def differing_settings(path: Path, settings: Mapping[str, Any], stored: bytes | None = None) -> list[str]:
    """Notes the settings of a job, or compares them with those of the job that is noted.

    Args:
        path: The file; its folder is made.
        settings: Name -> JSON value.
        stored: The file of the output, where that is not the one at `path`; None: there is none.

    Returns:
        Names of the settings that differ; none if the job is new.

    Raises:
        ConfigurationError: The file cannot be read or written.
    """
    text = json.dumps(settings, indent=1)
    try:
        differing = _differing(text, stored) if stored is not None else []
        if differing:
            return differing
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_atomically(path, text.encode())
        return _differing(text, path.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"the settings {path} of the job cannot be written or read ({error}): choose another --output, or remove "
            f"{str(path.parent)!r} to begin again"
        ) from error


def _differing(text: str, noted: bytes) -> list[str]:
    earlier = dict(json.loads(noted))
    return sorted(name for name, value in json.loads(text).items() if earlier.get(name) != value)
