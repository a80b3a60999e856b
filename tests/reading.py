"""Reading configs of tests: no progress bar, indexes in the test's own folder."""

from __future__ import annotations

import os
from dataclasses import replace

from dmagent_loader import ReadingConfig


def quiet(cache_dir: str | os.PathLike[str], reading: ReadingConfig | None = None) -> ReadingConfig:
    """The given config, else the default, without a bar and with its own index folder."""
    return replace(reading or ReadingConfig(), cache_dir=cache_dir, progress=False)
