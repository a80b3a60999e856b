"""What readers yield: records, and what could not be read as one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, time
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from dmagent_loader._validation import shown

TokenArray = NDArray[np.integer[Any]]


class Record(NamedTuple):
    """A record of an input.

    Attributes:
        origin: Where it stands, for messages.
        value: A row as a mapping from column to value, a whole text, or the tokens of a document.
    """

    origin: str
    value: dict[str, Any] | str | TokenArray


class Rejected(NamedTuple):
    """A record that is not a document.

    Attributes:
        origin: Where it stands.
        reason: The fault, its place, and the remedy.
        excerpt: The beginning of the record.
    """

    origin: str
    reason: str
    excerpt: str


class Repeating(dict[str, Any]):
    """A JSON object that has a name more than once; it holds the last value."""


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, marked if a name comes more than once; an ``object_pairs_hook``."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else Repeating(found)


def repeats_inside(value: object) -> bool:
    """Whether an object somewhere in a JSON value has a name more than once."""
    left = [value]
    while left:  # not recursive: values may be nested as deeply as the parser allows
        found = left.pop()
        if isinstance(found, Repeating):
            return True
        left += found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    return False


Reject = Callable[[Rejected], object]
"""What is done with a record that is not a document."""


def rejected(origin: str, fault: str, value: object) -> Rejected:
    """A rejected record whose reason is ``ORIGIN FAULT``."""
    return Rejected(origin, f"{origin} {fault}", shown(value))


def json_value(value: object) -> str:
    """A value of a table that JSON has no type for, as text: the ``default`` of `json.dumps`.

    Raises:
        TypeError: It has no text that says all of it, such as bytes.
    """
    if isinstance(value, (date, time, Decimal, UUID)):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")
