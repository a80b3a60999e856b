"""Holds unit tests to their rule: they start no process and do not sleep, so that all of them take a minute."""

from __future__ import annotations

import contextlib
import multiprocessing.process
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

_STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
"""Audit events of Python."""
_LONGEST_SLEEP = 0.001

_found: list[list[str]] = []
"""For each `alone` block that is open, the innermost last: what was done in it against the rule."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Fails a test that starts a process or sleeps inside this block, also in a thread or where it swallows errors."""
    found: list[str] = []
    _found.append(found)
    start, sleep = multiprocessing.process.BaseProcess.start, time.sleep

    def refused_start(process: multiprocessing.process.BaseProcess) -> None:
        _refuse(f"starts {process.name}")  # raises no audit event if it is spawned

    def refused_sleep(seconds: float) -> None:
        if seconds > _LONGEST_SLEEP:
            _refuse(f"sleeps for {seconds:g} s")  # time.sleep raises no audit event before Python 3.12
        sleep(seconds)

    multiprocessing.process.BaseProcess.start = refused_start  # type: ignore[method-assign]
    time.sleep = refused_sleep
    try:
        yield
    finally:
        multiprocessing.process.BaseProcess.start, time.sleep = start, sleep  # type: ignore[method-assign]
        _found.remove(found)
    if found:
        _fail(found[0])


def _refuse(fault: str) -> None:
    _found[-1].append(fault)
    _fail(fault)


def _fail(fault: str) -> None:
    pytest.fail(
        f"a test in tests/unit {fault}: tests that start processes or wait belong to tests/processes, in the folder "
        "named like the package's"
    )


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _found and event in _STARTS:
        _refuse(f"starts a process ({event} {arguments[0] if arguments else ''})".replace(" )", ")"))


sys.addaudithook(_watch)
