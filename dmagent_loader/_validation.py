"""Validation of untrusted input: bounded reads, type checks, and short representations for messages."""

from __future__ import annotations

import errno
import math
import operator
import os
import reprlib
import stat
from collections.abc import Sequence
from typing import Any

from dmagent_loader.errors import ConfigurationError

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 100


def read_regular(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """Reads a regular file of limited size.

    A downloaded folder may hold a named pipe, which blocks its readers for ever, or a link to ``/dev/zero``, which
    never ends.

    Args:
        path: Path of the file; links are followed.
        most_bytes: Largest size in bytes; a larger file is refused before it is read.

    Raises:
        OSError: The file cannot be read, is not a regular file, or is too large (``EFBIG``).
    """
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, f"it is {kind_of(status.st_mode)}, not a regular file", os.fspath(path))
        if status.st_size <= most_bytes:
            data = file.read(status.st_size + 1)
        if status.st_size > most_bytes or len(data) > most_bytes:
            raise OSError(
                errno.EFBIG, f"it has {status.st_size} bytes, more than the {most_bytes} expected", os.fspath(path)
            )
    return data


def kind_of(mode: int) -> str:
    """The kind of a file, for messages, from its mode."""
    kinds = (
        (stat.S_ISREG, "a regular file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), "no file")


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object whose names are distinct; an ``object_pairs_hook`` for `json.loads`.

    Parsers differ in which of two entries of the same name they keep, and the other one is lost in silence.

    Raises:
        ValueError: A name comes twice.
    """
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"the name {name[:100]!r} comes twice")
        members[name] = value
    return members


def is_finite_number(value: Any) -> bool:
    """Whether a JSON value is a number that fits a float; JSON allows integers of any size."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def are_finite_numbers(values: Sequence[Any]) -> bool:
    """Whether `is_finite_number` holds for all values; of a long ledger of floats, these are the most."""
    return (set(map(type, values)) == {float} and math.isfinite(sum(values))) or all(map(is_finite_number, values))


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number from 0 to the largest sample index."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def whole_number(name: str, value: Any, *, least: int | None = None) -> int:
    """Converts a setting to a plain int; numpy's integers hash and serialise differently.

    Args:
        name: Name of the setting, for messages.
        value: Value as passed by the user.
        least: Smallest allowed value; None allows any.

    Raises:
        ConfigurationError: The value is not a whole number, too small, or larger than any sample index.
    """
    if isinstance(value, bool):
        raise ConfigurationError(f"{name} is {value}; it must be a whole number")
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ConfigurationError(f"{name} is {shown(value)}; it must be a whole number") from error
    if least is not None and number < least:
        raise ConfigurationError(f"{name} is {number}; it must be at least {least}")
    if least is not None and not is_count(number - least):
        raise ConfigurationError(f"{name} is {shown(number)}; that is larger than any index of samples")
    return number


def added_tokens(of_nothing: list[int], of_text: list[int]) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and after every text.

    Args:
        of_nothing: Tokens of the empty text.
        of_text: Tokens of a short text.
    """
    pairs = zip(of_nothing, of_text, strict=False)
    num_before = next((number for number, (one, other) in enumerate(pairs) if one != other), len(of_nothing))
    before, after = of_nothing[:num_before], of_nothing[num_before:]
    return before, after if of_text[-len(after) :] == after else []


def shown(value: Any) -> str:
    """The `repr` of a value for a message, shortened if it is long or deeply nested."""
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
