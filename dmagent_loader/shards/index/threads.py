"""Work on many shards in threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from typing import TypeVar

from dmagent_loader.shards.sources.calls import ended_by

# Threads, not processes: reads and checksums of large rows release the interpreter lock, two processes were not faster
# on two cores, and spawned processes would run a script without a main guard again. Small rows keep one core busy.
INDEX_THREADS = 8
_TASKS_AT_A_TIME = 64
"""Tasks submitted together: a pending task takes a kilobyte and keeps its overview in memory."""
_PATIENCE_SECONDS, _MOSTLY_WAITING = 0.5, 8
"""A disk counts as slow once waiting has taken this many seconds, and this many times the CPU time. On a busy machine,
the wait for a core takes a few times as long at most."""

_T = TypeVar("_T")
_R = TypeVar("_R")


def in_threads(
    work: Callable[[_T], _R], tasks: Iterable[_T], stop: threading.Event, threads: int = INDEX_THREADS
) -> Iterator[tuple[_T, _R]]:
    """Yields every task with its result. An error or Ctrl-C stops running tasks and drops pending ones."""

    def until_stopped(task: _T) -> _R:
        with ended_by(stop):
            return work(task)

    tasks = iter(tasks)
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="dmagent-index") as pool:
        try:
            while batch := list(islice(tasks, _TASKS_AT_A_TIME)):
                futures = {pool.submit(until_stopped, task): task for task in batch}
                for future in as_completed(futures):
                    yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # first, so that stopped threads take no more tasks
            stop.set()
            raise


def in_threads_if_slow(work: Callable[[_T], _R], tasks: Iterable[_T], stop: threading.Event) -> Iterator[tuple[_T, _R]]:
    """Yields every task with its result, and turns to `in_threads` where most of the time is spent waiting.

    Threads gain nothing where no call blocks: a million calls of two microseconds each would release the interpreter
    lock, and then contend for it.
    """
    tasks = iter(tasks)
    began, worked_before = time.perf_counter(), time.thread_time()
    for task in tasks:
        try:
            with ended_by(stop):
                result = work(task)
        except BaseException:
            stop.set()
            raise
        yield task, result
        worked = time.thread_time() - worked_before
        waited = time.perf_counter() - began - worked
        if waited > max(_PATIENCE_SECONDS, _MOSTLY_WAITING * worked):
            break
    yield from in_threads(work, tasks, stop)
