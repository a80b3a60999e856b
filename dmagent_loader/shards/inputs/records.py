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
