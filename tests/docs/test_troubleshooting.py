"""Every message on the page of messages is one that the package gives."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from launching import REPOSITORY

PAGE = REPOSITORY / "docs" / "troubleshooting.md"
MESSAGES = re.findall(r"^### `(.*)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
VALUE = "…"


def texts(path: Path) -> list[str]:
    """All strings of a module, with `VALUE` for whatever is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.sub(r"%(\.\d)?[sdrgf]", VALUE, node.value))
    return found


@pytest.fixture(scope="module")
def all_texts() -> list[str]:
    return [text for path in (REPOSITORY / "dmagent_loader").rglob("*.py") for text in texts(path)]


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 30
    assert len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_package_gives_this_message(message: str, all_texts: list[str]) -> None:
    """Catches a page that stays behind when a message is reworded."""
    words = re.sub(rf"'{VALUE}'", VALUE, message)
    pattern = re.compile(".*".join(re.escape(piece) for piece in words.split(VALUE)), re.DOTALL)
    assert any(pattern.search(text) for text in all_texts), f"no string of the package contains {message!r}"
