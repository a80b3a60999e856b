"""From the bytes of a fuzzer to inputs that get past checksums and syntax; and what all harnesses share."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

NASTY: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**53 + 1,
    2**63,
    -(2**63) - 1,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "0",
    "x" * 300,
    "\ud800",
    "../../etc/passwd",
    "/dev/zero",
    "pipe:true",
    "{0..999999999}.tar",
    [],
    {},
    [[]],
    {"": None},
    [0.5, 0.5],
    [1e308, 1e308],
    [10**400, 1],
)
"""JSON values that break careless readers."""


class Choices:
    """Decisions taken from bytes; 0 when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    @property
    def left(self) -> int:
        """Bytes that are left."""
        return len(self._data) - self._position

    def byte(self) -> int:
        """The next byte."""
        self._position += 1
        return self._data[self._position - 1] if self._position <= len(self._data) else 0

    def below(self, limit: int) -> int:
        """A number from 0 up to `limit`, exclusive."""
        return int.from_bytes(bytes(self.byte() for _ in range(2)), "little") % max(1, limit)

    def integer(self) -> int:
        """A number of up to nine bytes, of either sign."""
        size = 1 + self.byte() % 9
        return int.from_bytes(bytes(self.byte() for _ in range(size)), "little", signed=True)

    def rest(self) -> bytes:
        """All bytes that are left."""
        rest, self._position = self._data[self._position :], len(self._data)
        return rest


def edited(document: Any, choices: Choices, most_edits: int = 6) -> Any:
    """A copy of JSON values with some of them replaced, removed, repeated or taken from the bytes."""
    root = [copy.deepcopy(document)]
    for _ in range(1 + choices.byte() % most_edits):
        places = _places(root)
        parent, key = places[choices.below(len(places))]
        action = choices.byte() % 6
        if action <= 1:
            parent[key] = copy.deepcopy(NASTY[choices.byte() % len(NASTY)])
        elif action == 2:
            parent[key] = choices.integer()
        elif action == 3 and parent is not root:
            if isinstance(parent, dict):
                del parent[key]
            else:
                parent.pop(key)
        elif action == 4:
            if isinstance(parent, dict):
                parent[f"{key}{choices.byte()}"] = copy.deepcopy(parent[key])
            elif parent is not root:
                parent.insert(key, copy.deepcopy(parent[key]))
        elif action == 5:
            try:
                parent[key] = json.loads(bytes(choices.byte() for _ in range(choices.byte() % 32)))
            except (ValueError, RecursionError):
                parent[key] = choices.byte() / 16
        if not choices.left:
            break
    return root[0]


def _places(root: list[Any], most: int = 500) -> list[tuple[Any, Any]]:
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [root]
    while waiting and len(places) < most:
        node = waiting.pop(0)
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                waiting.append(node[key])
    return places


def edit_seeds() -> list[bytes]:
    """Inputs for `edited`, after a first byte that chooses a mode."""
    return [bytes([mode, *range(start, start + 24)]) for mode in range(4) for start in (0, 40, 90, 200)]


def json_seeds(document: Any) -> list[bytes]:
    """Edits of JSON values, and the values themselves."""
    return [*edit_seeds(), b"\0" + json.dumps(document).encode()]


def expect(error: Exception, text: str = "") -> None:
    """A documented error is short, and says what it should."""
    assert len(str(error)) < 5000
    assert text in str(error)


@functools.cache
def folder() -> Path:
    """Where this process keeps what a harness reads, in memory if possible."""
    return Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None, prefix="dmagent-fuzz-"))
