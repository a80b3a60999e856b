"""Processes that read one collection, and threads that wait for an index."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from shard_fixtures import read_and_check

from dmagent_loader.shards import ShardCollection


def _child(collection: ShardCollection, seed: int, results: multiprocessing.Queue[int]) -> None:
    results.put(read_and_check(collection, seed))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_what_their_parent_opened(hundred: dict[str, list[str]], method: str) -> None:
    """A lock that another thread holds at the fork would hang the child: it is held here on purpose."""
    collection = ShardCollection.open(hundred, progress=False)
    read_and_check(collection, 0)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    with collection._sources._lock:
        workers = [context.Process(target=_child, args=(collection, seed, results)) for seed in range(2)]
        for worker in workers:
            worker.start()
    counts = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert counts == [500, 500]
    read_and_check(collection, 1)


def test_one_shard_may_serve_two_domains(twenty: Path) -> None:
    collection = ShardCollection.open({"source/a": twenty, "target/a": twenty}, progress=False)
    assert collection.num_rows.tolist() == [20, 20]
