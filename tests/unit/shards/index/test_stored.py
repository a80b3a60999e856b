"""Where the indexes of shards lie in a store."""

from __future__ import annotations

import json
from itertools import combinations

import fsspec
import pytest

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
