"""The compiled loops of the order of samples, where they were built."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

PURE_PYTHON_VARIABLE = "DMAGENT_PURE_PYTHON"
"""Set to 1 to do without the compiled loops, for example to look for a fault. The samples stay the same."""
_INTERFACE = 1
"""Must be that of `_compiled.c`: an editable installation keeps what was built from older code."""


def compiled_loops() -> ModuleType | None:
    """The module `_compiled`; None if it was not built, or is not to be used."""
    if os.environ.get(PURE_PYTHON_VARIABLE, "") not in ("", "0"):
        return None
    try:
        found = importlib.import_module("dmagent_loader.mixture._compiled")
    except ImportError:
        return None
    return found if getattr(found, "INTERFACE", None) == _INTERFACE else None


COMPILED = compiled_loops()
