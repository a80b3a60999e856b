"""Untrusted values: what is too large, of another type or of another kind is refused, and messages stay short."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmagent_loader._validation import is_count, is_finite_number, kind_of, read_regular, shown, whole_number
from dmagent_loader.errors import ConfigurationError


@pytest.mark.parametrize(
    ("value", "is_number", "counts"),
    [
        (0, True, True),
        (3, True, True),
        (-1, True, False),
        (2**62 - 1, True, True),
        (2**62, True, False),
        (10**400, False, False),
        (1.5, True, False),
        (1.0, True, False),
        (float("nan"), False, False),
        (float("-inf"), False, False),
        (True, False, False),
        (None, False, False),
        ("3", False, False),
        ([3], False, False),
    ],
    ids=lambda value: shown(value),
)
def test_numbers_of_json_are_told_apart(value: Any, is_number: bool, counts: bool) -> None:
    assert is_finite_number(value) is is_number
    assert is_count(value) is counts


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_become_plain_ones(value: Any) -> None:
    assert type(whole_number("seed", value)) is int
    assert whole_number("seed", value, least=3) == 3


@pytest.mark.parametrize(
    ("value", "least", "message"),
    [
        (True, None, "seed is True; it must be a whole number"),
        (1.0, None, "seed is 1.0; it must be a whole number"),
        ("7", None, "seed is '7'"),
        (None, 0, "seed is None"),
        (0, 1, "seed is 0; it must be at least 1"),
        (10**400, 1, "larger than any index of samples"),
        (1 << 62, 0, "larger than any index of samples"),
    ],
)
def test_other_values_are_refused_by_name(value: Any, least: int | None, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        whole_number("seed", value, least=least)


def test_a_seed_may_have_any_size() -> None:
    assert whole_number("seed", -(10**400)) == -(10**400)


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, list(range(10**6)), dict.fromkeys(range(1000), "y" * 1000), 10**5000, [[[[[[[1]]]]]]]],
    ids=["text", "list", "dictionary", "integer", "depth"],
)
def test_a_value_in_a_message_is_cut(value: Any) -> None:
    assert len(shown(value)) < 800


def test_a_value_that_cannot_be_shown_is_named_by_its_type() -> None:
    """Python refuses to write integers of more than 4,300 digits, and values that contain themselves have no end."""

    class Endless:
        def __repr__(self) -> str:
            return repr(self)

    assert "int too large to show" in shown(10**5000)
    assert "Endless" in shown(Endless())
    itself: list[Any] = []
    itself.append(itself)
    assert len(shown(itself)) < 100


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    (tmp_path / "link").symlink_to(path)
    assert read_regular(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes, more than the 4 expected") as error:
        read_regular(path, 4)
    assert error.value.errno == errno.EFBIG


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "a named pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "a character device"),
        (os.mkdir, "directory|a folder"),
    ],
    ids=["pipe", "device", "folder"],
)
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, make: Any, words: str) -> None:
    """A pipe without a writer would make a reader wait for ever, and /dev/zero has no end."""
    path = tmp_path / "state.json"
    make(path)
    with pytest.raises(OSError, match=words):
        read_regular(path, 100)


def test_kinds_of_files_have_names(tmp_path: Path) -> None:
    assert kind_of(tmp_path.stat().st_mode) == "a folder"
    assert kind_of(Path(__file__).stat().st_mode) == "a regular file"
    assert kind_of(0) == "no file"
