"""What is fuzzed, and the property of each: only documented errors, whatever the bytes.

A harness is a function of bytes that returns if the property holds. Time and memory are bounded by whoever calls it:
atheris, or the tests.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

NAMES = {
    "tar": "fuzz.shards",
    "members": "fuzz.shards",
    "npy": "fuzz.shards",
    "manifest": "fuzz.shards",
    "cache": "fuzz.shards",
    "overview": "fuzz.shards",
    "checkpoint": "fuzz.runs",
    "state": "fuzz.runs",
}
"""Harness -> module."""


def harness(name: str) -> tuple[Callable[[bytes], None], list[bytes]]:
    """A harness, and inputs to begin with."""
    module = importlib.import_module(NAMES[name])
    return module.HARNESSES[name], module.SEEDS[name]()
