"""Locks between processes: no wait is endless, whatever became of the holder."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest
from shard_fixtures import seconds_until_ours

pytestmark = pytest.mark.timeout(60)


def test_without_lock_support_the_work_is_done_all_the_same(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a fallback to marker files, which outlive a killed holder."""

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for _ in range(2):
        assert seconds_until_ours(lock) < 0.5


def test_where_nothing_can_be_written_the_work_is_done_all_the_same(lock: Path) -> None:
    lock.parent.write_text("a file in place of the folder")
    assert seconds_until_ours(lock) < 0.5
