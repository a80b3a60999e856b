"""Ranks that open shards together: whoever knows what, each unknown shard is read once, and all see the same."""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_peers import ThreadPeers

from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.index import cache
from dmagent_loader.shards.index.sharing import owners, slices

SHARDS = 7


def write(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(SHARDS):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for row in range(1 + number):
                info = tarfile.TarInfo(f"{row}.txt")
                info.size = 9
                tar.addfile(info, io.BytesIO(f"{number:04d} {row:04d}".encode()))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_each_unknown_shard_is_read_once_and_all_ranks_see_the_same(data: st.DataObject) -> None:
    """Catches shards that no rank or two ranks index, and indexes that do not reach a rank."""
    size = data.draw(st.integers(1, 4), "ranks")
    cache_of = data.draw(st.lists(st.integers(0, size - 1), min_size=size, max_size=size), "cache of each rank")
    has_disk = data.draw(st.booleans(), "a disk for each cache")
    known = {number: data.draw(st.sets(st.integers(0, SHARDS - 1)), f"cache {number}") for number in {*cache_of}}
    folder = Path(tempfile.mkdtemp())
    try:
        disks = {number: folder / (f"disk{number}" if has_disk else "disk") for number in known}
        for disk in {*disks.values()}:
            write(disk)
        for number, shards in known.items():
            for shard in sorted(shards):
                ShardCollection.open(
                    {"a": str(disks[number] / f"{shard}.tar")}, cache_dir=folder / f"cache{number}", progress=False
                )
        read: Counter[str] = Counter()
        original = cache.build_index

        def build(url: str, *arguments: Any, **more: Any) -> Any:
            read[Path(url).name] += 1
            return original(url, *arguments, **more)

        values: list[Any] = [None] * size
        barrier = threading.Barrier(size)

        def opened(rank: int) -> ShardCollection:
            return ShardCollection.open(
                {"a": [str(disks[cache_of[rank]] / f"{shard}.tar") for shard in range(SHARDS)]},
                cache_dir=folder / f"cache{cache_of[rank]}",
                progress=False,
                peers=ThreadPeers(rank, size, values, barrier),
            )

        with mock.patch.object(cache, "build_index", build), ThreadPoolExecutor(size) as ranks:
            collections = list(ranks.map(opened, range(size)))
        unknown = {f"{shard}.tar" for shard in range(SHARDS)} - {f"{s}.tar" for found in known.values() for s in found}
        assert read == Counter(dict.fromkeys(unknown, 1))
        assert len({collection.fingerprint for collection in collections}) == 1
        for collection in collections:
            assert collection.shard_rows(0).tolist() == [1 + number for number in range(SHARDS)]
            assert bytes(collection.read(0, 6, 5).members["txt"]) == b"0006 0005"
    finally:
        shutil.rmtree(folder)


@given(
    st.integers(1, 8).flatmap(
        lambda ranks: st.lists(
            st.tuples(st.lists(st.booleans(), min_size=ranks, max_size=ranks), st.integers(0, 1 << 40)), max_size=40
        )
    )
)
def test_whoever_has_an_index_provides_it_and_the_rest_is_dealt_by_bytes(
    shards: list[tuple[list[bool], int]],
) -> None:
    if not shards:
        return
    lacking = np.array([lacks for lacks, _ in shards]).T
    sizes = np.array([size for _, size in shards], np.int64)
    owner = owners(lacking, sizes)
    ranks = len(lacking)
    for number in range(len(shards)):
        if not lacking[:, number].any():
            assert owner[number] == -1
        elif lacking[:, number].all():
            assert 0 <= owner[number] < ranks
        else:
            assert not lacking[owner[number], number]
    unknown = lacking.all(axis=0)
    loads = np.bincount(owner[unknown], weights=np.maximum(sizes[unknown], 1), minlength=ranks)
    if unknown.any():
        fair = np.maximum(sizes[unknown], 1).sum() / ranks
        assert loads.max() <= fair + sizes[unknown].max() + 1


@given(st.lists(st.integers(0, 100), max_size=50), st.integers(1, 150))
def test_slices_cover_a_list_in_order_and_within_their_limit(weights: list[int], limit: int) -> None:
    parts = [weights[part] for part in slices(weights, limit)]
    assert [weight for part in parts for weight in part] == weights
    assert all(sum(part) <= limit or len([w for w in part if w]) == 1 for part in parts)
