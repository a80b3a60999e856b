"""Tests that are held to start no process and not to sleep are not blamed for the threads of others."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
from alone import alone


class Sleeper:
    """A thread that sleeps when it is told to."""

    def __init__(self) -> None:
        self.may_sleep, self.has_slept = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.may_sleep.wait(30)
        with contextlib.suppress(BaseException):
            time.sleep(0.002)
        self.has_slept.set()

    def sleep(self) -> None:
        self.may_sleep.set()
        assert self.has_slept.wait(30)
        self.thread.join()


def test_a_thread_from_before_is_not_the_tests() -> None:
    other = Sleeper()
    with alone():
        other.sleep()


def test_a_thread_from_the_setup_is_the_tests() -> None:
    with alone():
        own = Sleeper()
    with pytest.raises(pytest.fail.Exception, match=r"sleeps for 0\.002 s"), alone():
        own.sleep()
