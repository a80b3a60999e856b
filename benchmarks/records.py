"""Lines of JSON that finished runs add to a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a process that was killed may have left half of one."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def add(path: Path, line: dict[str, Any]) -> None:
    """One line more, on a line of its own even if the last writer was killed in the middle of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_whole = not path.exists() or path.stat().st_size == 0 or path.read_bytes()[-1:] == b"\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if is_whole else "\n") + json.dumps(line) + "\n")


def rounded(numbers: npt.ArrayLike, digits: int = 5) -> list[Any]:
    """Numbers as lists, rounded; NaN becomes None."""
    array = np.round(np.asarray(numbers, dtype=np.float64), digits)
    return _plain(array.tolist())


def _plain(values: Iterable[Any]) -> list[Any]:
    return [_plain(v) if isinstance(v, list) else (None if v != v else v) for v in values]
