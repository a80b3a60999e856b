"""Loops in C, where they were built. Each stands beside Python code that does the same."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

PURE_PYTHON_VARIABLE = "DMAGENT_PURE_PYTHON"
"""Set to 1 to do without compiled loops, for example to look for a fault. The samples stay the same."""


def compiled_loops(name: str, interface: int) -> ModuleType | None:
    """A compiled module; None if it was not built, or is not to be used.

    Args:
        name: Its name.
        interface: The number that it must have as ``INTERFACE``: an editable installation keeps what was built from
            older code.
    """
    if os.environ.get(PURE_PYTHON_VARIABLE, "") not in ("", "0"):
        return None
    try:
        found = importlib.import_module(name)
    except ImportError:
        return None
    return found if getattr(found, "INTERFACE", None) == interface else None
