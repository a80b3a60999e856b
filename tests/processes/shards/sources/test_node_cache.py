"""Needs and locks in the folder of blocks end with the process that holds them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

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
        cache.close_after_fork()
        os.write(writer, b"x")
        threading.Event().wait()
    os.read(reader, 1)
    cache.close_after_fork()  # as the system does when the parent is killed
    try:
        assert fetch(NodeCache(tmp_path, 10 * SIZE), 1)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
