"""A child that is forked while another thread of its parent holds a lock does not wait for it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from shard_fixtures import rows_of, write_manifest

from dmagent_loader.shards.bounded_cache import BoundedCache
from dmagent_loader.shards.manifest import Manifests


def fork(check: Callable[[], bool]) -> int:
    """A child that tells by its exit status whether `check` holds there."""
    child = os.fork()
    if child == 0:
        holds = False
        try:
            holds = check()
        finally:
            os._exit(0 if holds else 1)
    return child


def succeeds(child: int) -> bool:
    """Whether `check` held in the child; fails the test if it does not end within 20 s."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


def test_a_bounded_cache_is_empty_in_a_forked_child() -> None:
    cache: BoundedCache[int, int] = BoundedCache(lambda key: os.getpid(), 3)
    cache.get(0)
    with cache._lock:
        child = fork(lambda: cache.get(0) == os.getpid())
    assert succeeds(child)


def test_a_manifest_is_read_in_a_child_that_is_forked_while_it_is_read(tmp_path: Path) -> None:
    """The thread that reads it is not in the child."""
    write_manifest(tmp_path, rows=3)
    manifests = Manifests()
    with manifests._lock:
        child = fork(lambda: rows_of(tmp_path / "source" / "a" / "s.tar", manifests) == 3)
    assert succeeds(child)
