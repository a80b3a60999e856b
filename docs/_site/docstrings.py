"""Docstrings as the reference shows them: examples as code, names in single backticks as links to their entries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
ENTRIES = {
    entry.rpartition(".")[2]: entry
    for page in sorted(REFERENCE.glob("*.md"))
    for entry in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}
"""Last part of the name -> entry of the reference. Names that several trainers have are told apart by their module."""

AMBIGUOUS = {"DataMixingCallback"}

_NAME = re.compile(r"(?<!`)`([A-Za-z_]\w*)`(?!`)")
_EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Changes docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **settings: Any) -> None:
        """Griffe knows a section "Examples", not "Example"."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = _NAME.sub(_linked, text)


def _linked(found: re.Match[str]) -> str:
    name = found[1]
    if name not in ENTRIES or name in AMBIGUOUS:
        return found[0]
    return f"[`{name}`][{ENTRIES[name]}]"
