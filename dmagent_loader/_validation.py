"""What others wrote: read with limits, checked before it is used, shown in messages without flooding them."""

from __future__ import annotations

import errno
import math
import operator
import os
import reprlib
import stat
from typing import Any

from dmagent_loader.errors import ConfigurationError

_SHOWN = reprlib.Repr()
_SHOWN.maxlevel = 3
_SHOWN.maxstring = _SHOWN.maxlong = _SHOWN.maxother = 100


def read_regular(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """The bytes of a regular file.

    A downloaded folder may hold a named pipe, which makes readers wait for ever, or a link to ``/dev/zero``, which
    never ends.

    Args:
        path: The file; links are followed.
        most_bytes: A larger file is refused before it is read.

    Raises:
        OSError: It cannot be read, is no regular file, or is too large (``EFBIG``).
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
    """What a file is, from its mode, for messages."""
    kinds = (
        (stat.S_ISREG, "a regular file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), "no file")


def is_finite_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float holds: JSON allows integers of any size."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number from 0 up to what an index of samples can be."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def whole_number(name: str, value: Any, *, least: int | None = None) -> int:
    """A setting that is a whole number, as a plain int: numpy's integers hash and serialise in other ways.

    Args:
        name: Of the setting, for messages.
        value: What was given.
        least: Its smallest value; None: any, of any size.

    Raises:
        ConfigurationError: It is no whole number, too small, or larger than an index of samples can be.
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


def shown(value: Any) -> str:
    """A value for a message: its `repr`, cut if it is long or deep."""
    try:
        return _SHOWN.repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
