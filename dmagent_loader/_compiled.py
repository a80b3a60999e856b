"""Loops in C, where they were built. Each stands beside Python code that does the same."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

PURE_PYTHON_VARIABLE = "DMAGENT_PURE_PYTHON"
"""Set to 1 to do without compiled loops, for example to look for a fault. The samples stay the same."""
INTERFACES = {
    "dmagent_loader.mixture._order": 2,
    "dmagent_loader.mixture._rows": 1,
    "dmagent_loader.shards._reading": 1,
}
"""Module -> the number that it must have as ``INTERFACE``: an editable installation keeps what was built from older
code."""


def compiled_loops(name: str) -> ModuleType | None:
    """A compiled module; None if it was not built, or is not to be used."""
    if _is_unwanted():
        return None
    try:
        found = importlib.import_module(name)
    except ImportError:
        return None
    return found if getattr(found, "INTERFACE", None) == INTERFACES[name] else None


def why_in_python() -> str | None:
    """The reason why some loops are those in Python, and the remedy; None if all are those in C."""
    if _is_unwanted():
        return f"{PURE_PYTHON_VARIABLE} is set"
    if all(map(compiled_loops, INTERFACES)):
        return None
    return (
        "they were not built when the package was installed, or were built from older code; install a C compiler and "
        "the headers of Python, and then the package again"
    )


def _is_unwanted() -> bool:
    return os.environ.get(PURE_PYTHON_VARIABLE, "") not in ("", "0")
