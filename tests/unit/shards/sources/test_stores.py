"""URLs of stores: chains, missing packages, and what can be written to."""

from __future__ import annotations

import importlib
import sys

import fsspec
import pytest

from dmagent_loader.errors import ShardError
from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.sources.local import version_of
from dmagent_loader.shards.sources.patterns import expand_shards
from dmagent_loader.shards.sources.remote import filesystem_of
from dmagent_loader.shards.sources.urls import base_name, display_url, is_local, protocol, without_signature
from dmagent_loader.shards.sources.writing import write_url

CHAINED = "simplecache::https://user:password@host/p/a.tar?X-Amz-Signature=f"


def test_the_parts_of_a_chained_url() -> None:
    assert not is_local(CHAINED)
    assert protocol(CHAINED) == "https"
    assert base_name(CHAINED) == "a.tar"
    assert without_signature("filecache::s3://bucket/a.tar") == "s3://bucket/a.tar"
    assert display_url(CHAINED) == "simplecache::https://host/p/a.tar?..."


def test_colons_chain_filesystems_and_join_patterns() -> None:
    pattern = "simplecache::s3://b/a-{0..1}.tar::s3://b/c.tar::blockcache::gs://b/d.tar"
    assert expand_shards("d", pattern) == [
        "simplecache::s3://b/a-0.tar",
        "simplecache::s3://b/a-1.tar",
        "s3://b/c.tar",
        "blockcache::gs://b/d.tar",
    ]


@pytest.mark.parametrize(("url", "package"), [("s3://b/a.tar", "s3fs"), ("filecache::gs://b/a.tar", "gcsfs")])
def test_a_missing_package_is_named_by_its_extra(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = protocol(url)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, name, raising=False)
    with pytest.raises(ShardError, match=rf"no access to '{name}' URLs.*pip install 'dmagent-loader\[{name}\]'"):
        filesystem_of(url)


def test_the_protocol_of_a_url_may_be_in_upper_case() -> None:
    """fsspec does not know ``HTTPS``, and the remedy was to install what is there."""
    assert filesystem_of("MEMORY://bucket/A.tar") == filesystem_of("memory://bucket/A.tar")
    assert filesystem_of("HTTPS://Host/A.tar")[1] == "https://Host/A.tar"


def test_files_are_written_whole_to_paths_and_stores(tmp_path) -> None:
    for url in (str(tmp_path / "folder" / "a.txt"), "memory://of-test-stores/a.txt"):
        for data in (b"one", b"two"):
            write_url(url, data)
            with fsspec.open(url, "rb") as file:
                assert file.read() == data


def test_a_folder_in_a_store_without_its_slash_is_no_damaged_shard() -> None:
    fsspec.filesystem("memory").pipe("/of-test-stores/web/a.tar", b"")
    with pytest.raises(ShardError, match=r"^memory://of-test-stores/web is a folder, not a shard: end it with '/'"):
        ShardCollection.open({"source/a": "memory://of-test-stores/web"}, progress=False)


@pytest.mark.parametrize(
    "changed",
    [
        {"ETag": '"1"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"},
        {"modificationTime": 1704067200000},  # WebHDFS
        {"modify": "20240101000000"},  # FTP
    ],
)
def test_what_a_store_says_of_its_files_tells_versions_apart(changed: dict[str, object]) -> None:
    """What has neither an etag nor a time is fetched anew by each run, and checked only by its rows."""
    before, after = (version_of("x://host/a.tar", {"size": 9, **info}) for info in ({**changed, "time": 1}, changed))
    assert before.tag == after.tag != "", "the time of the last access is none of the content"
    assert before.is_sure == ("ETag" in changed)
