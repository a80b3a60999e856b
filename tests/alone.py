"""Holds unit tests to their rule: they start no process and do not sleep, so that all of them take a minute."""

from __future__ import annotations

import contextlib
import multiprocessing.process
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

_STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
"""Audit events of Python."""
_LONGEST_SLEEP = 0.001

_found: list[list[str]] = []
"""For each `alone` block that is open, the innermost last: what was done in it against the rule."""
_ours: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
"""Threads that were started in such blocks. Those of other tests in the same process may end later than their tests."""
_others: set[threading.Thread] = set()
"""Threads from before the block that are none of ours."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Fails a test that starts a process or sleeps inside this block, also in a thread or where it swallows errors.

    Threads from before the block count if they were started in an earlier one: in the setup of the test, or by another
    test that this holds to the rule.
    """
    found: list[str] = []
    if not _found:
        here = threading.current_thread()
        _others.update(thread for thread in threading.enumerate() if thread is not here and thread not in _ours)
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
        if not _found:
            _ours.update(thread for thread in threading.enumerate() if thread not in _others)
            _others.clear()
    if found:
        _fail(found[0])


def _refuse(fault: str) -> None:
    if threading.current_thread() in _others:
        return
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
