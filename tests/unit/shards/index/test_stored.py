"""Where the indexes of shards lie in a store."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import fsspec
import pytest

from dmagent_loader.errors import DamagedShardError
from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.index.entry_file import FORMAT
from dmagent_loader.shards.index.stored import StoredIndexes


@pytest.mark.parametrize("root", ["s3://indexes/run#1", "indexes", "http://[::1]:9000/indexes"])
def test_folders_of_different_shards_have_different_indexes(root: str) -> None:
    """Otherwise the indexes of one domain are written over those of another."""
    stored = StoredIndexes("first-dot", root)
    urls = [
        "s3://bucket/web#1/a.tar",
        "s3://bucket/web#2/a.tar",
        "s3://bucket/web/a.tar",
        "abfs://one@account.dfs.core.windows.net/web/a.tar",
        "abfs://two@account.dfs.core.windows.net/web/a.tar",
        "/bucket/web#3/a.tar",
    ]
    folders = [stored.folder(url) for url in urls]
    assert all(first != second for first, second in combinations(folders, 2))
    assert folders[0].endswith(f"{root}/bucket/web#1")
    assert stored.folder("https://user:password@host/web/a.tar") == stored.folder("https://host/web/a.tar?sig=ab/cd")


def test_indexes_are_read_from_a_host_with_an_ipv6_address() -> None:
    table = json.dumps({"format": FORMAT, "shards": {}}).encode()
    fsspec.filesystem("memory").pipe("/[0000:0000:0000:0000:0000:0000:0000:0001]:9/i/bucket/shards.index", table)
    assert StoredIndexes("first-dot", "memory://[::1]:9/i").read_table("memory://[::1]:9/i/bucket") == table


@pytest.mark.parametrize("change", ["keys", "end of a row", "row in the padding"])
def test_a_local_shard_that_was_replaced_since_its_index_was_stored_is_found(
    write_tar: Callable[..., Path], tmp_path: Path, change: str
) -> None:
    """Its size is that of the table, and each row begins with the bytes that were indexed, at the same place."""
    rows = [(f"{row}.txt", b"x" * (100 + row)) for row in range(6)]
    new = {
        "keys": [(f"other-{name}", data) for name, data in rows],
        "end of a row": [(name, data + b"\n") for name, data in rows],
        "row in the padding": [*rows, ("more.txt", b"more")],
    }
    path, folder = write_tar("a.tar", rows), tmp_path / "indexes"
    size = path.stat().st_size

    def read(cache: str) -> list[tuple[str, bytes]]:
        collection = ShardCollection.open(
            {"source/a": str(path)}, indexes=folder, cache_dir=tmp_path / cache, progress=False
        )
        samples = [collection.read(0, 0, row) for row in range(int(collection.num_rows[0]))]
        return [(f"{sample.key}.txt", bytes(sample.members["txt"])) for sample in samples]

    ShardCollection.open({"source/a": str(path)}, cache_dir=tmp_path / "first", progress=False).write_indexes(folder)
    assert read("second") == rows
    write_tar("a.tar", new[change])
    assert path.stat().st_size == size
    with pytest.raises(DamagedShardError, match="open the shards again to index the new version"):
        read("third")
    assert read("third") == new[change]
