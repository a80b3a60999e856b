"""A file is there whole or not at all, whatever kills its writer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dmagent_loader._files import locked, write_atomically

KILLED_IN_A_WRITE = """
import os, signal, sys
from dmagent_loader._files import remove_leftovers, write_atomically
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(sys.argv[1], b"new" * 1000)
"""


def test_a_killed_writer_leaves_the_old_file_and_its_leftovers_do_not_pile_up(tmp_path: Path) -> None:
    """Catches temporary files with a new name at each attempt, which nobody ever removes."""
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    for _ in range(3):
        killed = subprocess.run([sys.executable, "-c", KILLED_IN_A_WRITE, path], check=False)
        assert killed.returncode == -9
        assert path.read_bytes() == b"old"
        assert len(list(tmp_path.iterdir())) == 2
    write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


def test_a_lock_file_has_one_holder_and_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "folder" / ".lock"
    with locked(path):
        with pytest.raises(TimeoutError), locked(path, timeout_seconds=0.1):
            pytest.fail("held twice")
        with pytest.raises(TimeoutError), locked(path, timeout_seconds=60, is_cancelled=lambda: True):
            pytest.fail("held twice")
    assert list(path.parent.iterdir()) == []
    with pytest.raises(ZeroDivisionError), locked(path):
        raise ZeroDivisionError
    with locked(path):
        pass
