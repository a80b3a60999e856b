"""Locks between processes: no wait is endless, whatever became of the holder."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from shard_fixtures import seconds_until_ours

from dmagent_loader.shards.index import lock as lock_module
from dmagent_loader.shards.index.lock import exclusive

pytestmark = pytest.mark.timeout(60)


HOLDS = """
import sys, threading, time
from pathlib import Path
from dmagent_loader.shards.index.lock import exclusive
with exclusive(Path(sys.argv[1]), "indexing", 60.0, threading.Event()):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(lock: Path, seconds: float) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", HOLDS, lock, str(seconds)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_one_after_the_other_and_nothing_is_left(lock: Path) -> None:
    with holder(lock, 1.0):
        assert 0.5 < seconds_until_ours(lock) < 10
    assert not lock.exists()


def test_the_lock_of_a_killed_process_is_free(lock: Path) -> None:
    with holder(lock, 60.0) as process:
        process.kill()
        process.wait()
        assert seconds_until_ours(lock) < 10


def test_a_process_that_stopped_is_not_waited_for_without_end(
    lock: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-Z, a debugger, a frozen container: the system keeps its locks."""
    monkeypatch.setattr(lock_module, "_ANNOUNCED_AFTER_SECONDS", 0.2)
    with holder(lock, 60.0) as process:
        process.send_signal(signal.SIGSTOP)
        with caplog.at_level(logging.INFO):
            assert 1.0 < seconds_until_ours(lock, patience=1.0) < 10
        process.kill()
    assert "waiting for another process that is indexing a.tar" in caplog.text
    assert "may have stopped" in caplog.text


def test_threads_of_one_process_wait_for_each_other(lock: Path) -> None:
    """A shard may belong to two domains, and is then indexed by two threads."""
    running, most = [0], [0]

    def work(_: int) -> None:
        with exclusive(lock, "indexing", 60.0, threading.Event()):
            running[0] += 1
            most[0] = max(most[0], running[0])
            time.sleep(0.01)
            running[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert most == [1]
    assert not lock.exists()


def test_a_wait_ends_when_it_is_told_to(lock: Path) -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with holder(lock, 60.0) as process:
        with exclusive(lock, "indexing", 60.0, stop):
            pass
        process.kill()


def fork_while_held(lock: Path, then: Callable[[], None]) -> int:
    """Holds the lock, forks a child that lives on, as a data worker does, and ends; returns the child."""
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        with exclusive(lock, "indexing", 60.0, threading.Event()):
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            os.write(writer, child.to_bytes(8, "little"))
            then()
        os._exit(0)
    child = int.from_bytes(os.read(reader, 8), "little")
    os.waitpid(parent, 0)
    os.close(reader)
    os.close(writer)
    return child


@pytest.mark.parametrize("killed", [False, True])
def test_a_forked_child_does_not_keep_the_lock(lock: Path, killed: bool) -> None:
    """It shares the descriptor, and so what is locked with it."""
    child = fork_while_held(lock, lambda: os.kill(os.getpid(), signal.SIGKILL) if killed else None)
    try:
        assert seconds_until_ours(lock) < 10
    finally:
        os.kill(child, signal.SIGKILL)


def _count(lock: str, counter: str) -> None:
    for _ in range(20):
        with exclusive(Path(lock), "counting", 60.0, threading.Event()):
            value = int(Path(counter).read_text())
            time.sleep(0.001)
            Path(counter).write_text(str(value + 1))


def test_only_one_holds_it_at_a_time(lock: Path, tmp_path: Path) -> None:
    """Catches a lock of a file that its last holder has unlinked."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count, args=(str(lock), str(counter))) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert counter.read_text() == "80"
