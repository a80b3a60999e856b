"""Which thread looks at shards: the one that opens them, as long as nothing there makes it wait."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace

import pytest

from dmagent_loader.shards.index import threads
from dmagent_loader.shards.index.threads import in_threads_if_slow
from dmagent_loader.shards.sources.calls import Stopped, go_on


@pytest.mark.parametrize(
    ("task_seconds", "worked_seconds", "here"),
    [
        (0.001, 0.001, 100),  # nothing waits
        (0.02, 0.005, 100),  # four processes for a core
        (0.006, 0.0001, 85),  # a mount that is slow: 0.5 s have been waited
        (60.0, 0.1, 1),
    ],
)
def test_only_work_that_waits_goes_on_in_threads(
    monkeypatch: pytest.MonkeyPatch, task_seconds: float, worked_seconds: float, here: int
) -> None:
    clock = {
        "perf_counter": itertools.count(0.0, task_seconds).__next__,
        "thread_time": itertools.count(0.0, worked_seconds).__next__,
    }
    monkeypatch.setattr(threads, "time", SimpleNamespace(**clock))
    found = list(in_threads_if_slow(lambda _: threading.get_ident(), range(100), threading.Event()))
    assert sorted(number for number, _ in found) == list(range(100))
    in_this_thread = [number for number, thread in found if thread == threading.get_ident()]
    assert in_this_thread == list(range(here))


def test_an_error_ends_the_work_of_others() -> None:
    def fail(_: int) -> None:
        raise KeyboardInterrupt

    stop = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        list(in_threads_if_slow(fail, range(3), stop))
    assert stop.is_set()


def test_work_ends_when_it_is_given_up() -> None:
    done = []

    def work(number: int) -> None:
        done.append(number)
        go_on()

    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        list(in_threads_if_slow(work, range(3), stop))
    assert done == [0]
