"""The rule of tests/unit holds: what starts a process or sleeps fails there, whatever the test catches."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest
from alone import alone

SPAWNING = multiprocessing.get_context("spawn")
BREAKS = {
    "subprocess": lambda: subprocess.run([sys.executable, "--version"], check=True),
    "shell": lambda: os.system("true"),
    "fork": lambda: os._exit(0) if os.fork() == 0 else None,
    "spawn": lambda: SPAWNING.Process(target=print).start(),
    "sleep": lambda: time.sleep(0.002),
}


@pytest.mark.parametrize("name", BREAKS)
def test_processes_and_sleeps_are_refused(name):
    with pytest.raises(pytest.fail.Exception, match=r"belong to tests/processes"), alone():
        BREAKS[name]()


@pytest.mark.parametrize("name", BREAKS)
def test_a_refusal_that_is_swallowed_fails_the_test_all_the_same(name):
    with pytest.raises(pytest.fail.Exception), alone(), contextlib.suppress(BaseException):
        BREAKS[name]()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_threads_are_held_to_it_too():
    def in_a_thread():
        thread = threading.Thread(target=BREAKS["sleep"])
        thread.start()
        thread.join()

    with pytest.raises(pytest.fail.Exception), alone():
        in_a_thread()


def test_what_keeps_the_rule_goes_on():
    with alone():
        time.sleep(0.0001)
        assert multiprocessing.current_process().name == "MainProcess"
    assert time.sleep.__module__ == "alone", "the test itself is watched"
