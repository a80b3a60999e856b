"""Processes that share an index cache."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path

from shard_fixtures import WriteTar

from dmagent_loader.shards.index.cache import IndexCache, build_and_cache
from dmagent_loader.shards.sources.local import shard_version


def _index_and_count(path: str, cache: str, start: threading.Event, counts: multiprocessing.Queue[bool]) -> None:
    built = []
    original = IndexCache.save

    def save(self: IndexCache, *arguments: object) -> None:
        built.append(True)
        original(self, *arguments)  # type: ignore[arg-type]

    IndexCache.save = save  # type: ignore[method-assign, assignment]
    start.wait()
    build_and_cache(
        path, shard_version(path), IndexCache(Path(cache)), None, advance=lambda n: None, stop=threading.Event()
    )
    counts.put(bool(built))


def test_processes_that_start_together_read_the_shard_once(write_tar: WriteTar, tmp_path: Path) -> None:
    """Catches eight ranks of a machine that all read a terabyte through."""
    path = write_tar("some.tar", [(f"{i}.txt", b"x" * 100) for i in range(2000)])
    context = multiprocessing.get_context("fork")
    start, counts = context.Event(), context.Queue()
    arguments = (str(path), str(tmp_path / "shared"), start, counts)
    workers = [context.Process(target=_index_and_count, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    built = [counts.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(built) == 1
