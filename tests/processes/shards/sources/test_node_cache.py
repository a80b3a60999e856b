"""Needs and locks in the folder of blocks end with the process that holds them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from node_blocks import SIZE, fetch, name

from dmagent_loader.shards.sources.node_cache import NodeCache


def test_the_needs_of_a_process_end_with_it(tmp_path: Path) -> None:
    first = NodeCache(tmp_path, SIZE)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        other = NodeCache(tmp_path, SIZE)
        other.need(name(1))
        os.write(writer, b"x")
        threading.Event().wait()
    os.read(reader, 1)
    assert fetch(first, 1)
    assert not fetch(first, 2)
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert fetch(first, 2)
    assert len(list(tmp_path.glob("*.needs"))) == 1, "the file of the dead process is still there"


def test_a_forked_child_does_not_keep_the_locks_of_its_parent(tmp_path: Path) -> None:
    """Otherwise blocks that a killed parent was fetching would stay locked while its data workers live."""
    cache = NodeCache(tmp_path, 10 * SIZE)
    assert cache.claim(name(1), SIZE) is not None
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"x")
        threading.Event().wait()
    os.read(reader, 1)
    cache.reset_after_fork()  # as the system does when the parent is killed
    try:
        assert fetch(NodeCache(tmp_path, 10 * SIZE), 1)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_child_forked_while_the_folder_is_opened_keeps_no_lock_of_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when data workers start while a thread opens the folder. The needs of a dead parent would stay for ever."""
    survey, held_by_child = NodeCache._survey, []

    def survey_and_fork(self: NodeCache) -> object:
        if not held_by_child:
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
                held = [link for link in links if os.path.islink(link) and os.readlink(link).endswith(".needs")]
                os.write(writing, str(len(held)).encode())
                os._exit(0)
            os.waitpid(child, 0)
            held_by_child.append(os.read(reading, 10).decode())
            os.close(reading)
            os.close(writing)
        return survey(self)

    monkeypatch.setattr(NodeCache, "_survey", survey_and_fork)
    NodeCache(tmp_path, 10 * SIZE)
    assert held_by_child == ["0"]
