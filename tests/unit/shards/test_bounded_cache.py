"""The cache of open resources: bounded, and a resource in use stays."""

from __future__ import annotations

import os
import time

import pytest

from dmagent_loader.shards.bounded_cache import BoundedCache


def test_what_is_used_stays_and_the_number_is_bounded() -> None:
    opened: list[int] = []

    def open_one(key: int) -> int:
        opened.append(key)
        return -key

    cache = BoundedCache(open_one, 3)
    for key in range(20):
        assert cache.get(key) == -key
        assert cache.get(0) == 0, "asked for all the time"
    assert opened == list(range(20)), "0 was dropped although it was in use"
    cache.clear()
    cache.get(0)
    assert opened[-1] == 0


def test_the_weight_is_bounded_and_one_resource_is_always_kept() -> None:
    opened: list[int] = []

    def open_one(key: int) -> int:
        opened.append(key)
        return key

    cache = BoundedCache(open_one, 10, weigh=lambda value: value)
    for key in (4, 5, 4, 5):
        cache.get(key)
    assert opened == [4, 5]
    for key in (20, 20):
        assert cache.get(key) == 20
    assert opened == [4, 5, 20]
    cache.get(4)
    assert opened == [4, 5, 20, 4], "the heavy one should have made room"


def test_a_forked_child_starts_empty_and_does_not_wait_for_a_thread_of_its_parent() -> None:
    cache: BoundedCache[int, int] = BoundedCache(lambda key: os.getpid(), 3)
    cache.get(0)
    with cache._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if cache.get(0) == os.getpid() else 1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            return
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")
