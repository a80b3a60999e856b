"""The manifest that a shard is compared with."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import fsspec
import pytest
from shard_fixtures import rows_of, write_manifest

from dmagent_loader.errors import ConfigurationError, DamagedShardError, ShardError, ShardNotFoundError
from dmagent_loader.shards import Manifest, ShardCollection, load_manifest, shard_files
from dmagent_loader.shards.manifest import Manifests, names_manifest, parse_manifest


def test_what_is_above_two_dots_depends_on_links(tmp_path: Path) -> None:
    write_manifest(tmp_path / "near", rows=1)
    write_manifest(tmp_path / "far", rows=2)
    (tmp_path / "near" / "source" / "a").mkdir(parents=True)
    (tmp_path / "far" / "source" / "a").mkdir(parents=True)
    (tmp_path / "far" / "folder").mkdir()
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far" / "folder")
    assert rows_of(tmp_path / "near" / "source" / "a" / "s.tar") == 1
    assert rows_of(tmp_path / "near" / "source" / "a" / ".." / "a" / "s.tar") == 1
    assert rows_of(tmp_path / "near" / "link" / ".." / "source" / "a" / "s.tar") == 2


def test_a_shard_just_below_the_root_does_not_ask_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "manifest.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert rows_of("/source/a/s.tar") is None
        assert rows_of("/s.tar") is None
    assert caplog.text == ""


def test_a_manifest_that_has_changed_is_read_again(tmp_path: Path) -> None:
    shard, manifests = tmp_path / "source" / "a" / "s.tar", Manifests()
    assert rows_of(shard, manifests) is None
    write_manifest(tmp_path, rows=3)
    assert rows_of(shard, manifests) == 3
    write_manifest(tmp_path, rows=40)
    assert rows_of(shard, manifests) == 40
    manifests.release()
    assert rows_of(shard, manifests) == 40
    (tmp_path / "manifest.json").unlink()
    assert rows_of(shard, manifests) is None


def test_a_manifest_that_was_loaded_for_the_shards_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(tmp_path / "corpus", rows=3)
    monkeypatch.chdir(tmp_path)
    loaded = [load_manifest("corpus"), load_manifest(tmp_path / "corpus" / "manifest.json")]
    for manifest in loaded:
        with monkeypatch.context() as patch:
            patch.setattr("dmagent_loader.shards.manifest.parse_manifest", lambda *_: pytest.fail("read again"))
            assert rows_of(tmp_path / "corpus" / "source" / "a" / "s.tar", Manifests([manifest])) == 3
            assert rows_of(Path("corpus/source/a/s.tar"), Manifests([manifest])) == 3
    write_manifest(tmp_path / "corpus", rows=40)
    assert rows_of(tmp_path / "corpus" / "source" / "a" / "s.tar", Manifests(loaded)) == 40


@pytest.mark.parametrize("name", ["./source/a/s.tar", "source//a/s.tar", "source/./a/s.tar"])
def test_a_path_in_a_manifest_may_be_written_in_several_ways(tmp_path: Path, name: str) -> None:
    record = {"path": name, "rows": 3, "bytes": 10240, "sha256": "0" * 64}
    text = json.dumps({"schema": 1, "domains": {"source/a": {"shards": [record]}}})
    (tmp_path / "manifest.json").write_text(text)
    assert load_manifest(tmp_path) == {"source/a": [str(tmp_path / "source" / "a" / "s.tar")]}
    assert rows_of(tmp_path / "source" / "a" / "s.tar") == 3
    remote = parse_manifest("memory://corpus/manifest.json", text.encode())
    (shard,) = remote["source/a"]
    assert rows_of(shard, Manifests([remote])) == 3


def remote_manifest(rows: int) -> Manifest:
    shards = [{"path": "source/a/s.tar", "rows": rows, "bytes": 10240, "sha256": "0" * 64}]
    text = json.dumps({"schema": 1, "domains": {"source/a": {"shards": shards}}})
    return parse_manifest("memory://corpus/manifest.json", text.encode())


def test_a_remote_shard_is_compared_with_the_manifests_that_were_passed_in_and_no_others() -> None:
    """Catches a register of the whole process: whether a manifest was ever read would change what is refused."""
    manifest = remote_manifest(rows=5)
    assert manifest == {"source/a": ["memory://corpus/source/a/s.tar"]}
    (shard,) = manifest["source/a"]
    assert rows_of(shard) is None
    assert rows_of(shard, Manifests([manifest])) == 5
    assert rows_of("memory://corpus/source/a/other.tar", Manifests([manifest])) is None


def test_a_copy_for_a_spawned_worker_is_small_and_reads_the_manifests_above_local_shards(tmp_path: Path) -> None:
    write_manifest(tmp_path, rows=3)
    manifest = remote_manifest(rows=5)
    manifests = Manifests([manifest])
    assert rows_of(tmp_path / "source" / "a" / "s.tar", manifests) == 3
    data = pickle.dumps(manifests)
    assert len(data) < 200
    assert rows_of(tmp_path / "source" / "a" / "s.tar", pickle.loads(data)) == 3
    assert pickle.loads(pickle.dumps(manifest)).record("source/a/s.tar").rows == 5


def test_remote_shards_of_several_manifests_are_compared_with_all_of_them(tmp_path: Path) -> None:
    memory, shards, manifests = fsspec.filesystem("memory"), {}, []
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
        shard_files({f"source/{name}": [tmp_path / f"{name}.jsonl"]}, tmp_path / name, progress=False)
        memory.put(str(tmp_path / name), f"/several/{name}", recursive=True)
        manifests.append(load_manifest(f"memory://several/{name}"))
        shards |= manifests[-1]
    assert type(shards) is dict
    ShardCollection.open(shards, manifests=manifests, progress=False)
    other = (tmp_path / "two/source/two/two-000000.tar").read_bytes()
    memory.pipe("/several/one/source/one/one-000000.tar", other)
    with pytest.raises(DamagedShardError, match=r"one-000000\.tar is not the file that was written"):
        ShardCollection.open(shards, manifests=manifests, progress=False)


@pytest.mark.parametrize(
    ("folder", "path"),
    [
        ("https://host", "source/c%23/a%231.tar"),
        ("s3://bucket", "source/c#/a#1.tar"),
        ("/data", "source/c#/a#1.tar"),
    ],
)
def test_a_number_sign_in_the_path_of_a_shard_reaches_the_server(folder: str, path: str) -> None:
    entry = {"path": "source/c#/a#1.tar", "rows": 5, "bytes": 9, "sha256": "0"}
    text = json.dumps({"schema": 1, "domains": {"source/c#": {"shards": [entry]}}})
    manifest = parse_manifest(f"{folder}/manifest.json", text.encode())
    assert manifest == {"source/c#": [f"{folder}/{path}"]}
    assert manifest.record(path).rows == 5
    if folder != "/data":
        assert rows_of(f"{folder}/{path}", Manifests([manifest])) == 5
    assert len(manifest.digest("source/c#")) == 64


def test_shards_are_compared_with_a_manifest_that_was_read_through_a_cache() -> None:
    """A shard is known by its URL without the chain: catches a manifest that is known by its own."""
    entry = {"path": "source/a/s.tar", "rows": 5, "bytes": 9, "sha256": "0"}
    text = json.dumps({"schema": 1, "domains": {"source/a": {"shards": [entry]}}})
    manifest = parse_manifest("simplecache::memory://corpus/manifest.json", text.encode())
    assert rows_of(manifest["source/a"][0], Manifests([manifest])) == 5


@pytest.mark.parametrize(
    ("url", "file", "folder"),
    [
        ("h/manifest.json", "h/manifest.json", "h"),
        ("h/manifest.json?X-Amz-Signature=ab/cd", "h/manifest.json?X-Amz-Signature=ab/cd", "h"),
        ("h/corpus.json?sig=a.json", "h/corpus.json?sig=a.json", "h"),
        ("h/c/?sig=ab/cd", "h/c/manifest.json?sig=ab/cd", "h/c"),
        ("h/get?file=c/manifest.json", "h/get?file=c/manifest.json", "h/get?file=c"),
    ],
)
def test_a_manifest_and_its_shards_are_found_behind_a_signature(url: str, file: str, folder: str) -> None:
    """Signatures have slashes and dots in them: catches a search for name and folder behind the question mark."""
    entry = {"path": "source/a/s.tar", "rows": 5, "bytes": 9, "sha256": "0"}
    text = json.dumps({"schema": 1, "domains": {"source/a": {"shards": [entry]}}})
    fsspec.filesystem("memory").pipe(f"/signed-manifests/{file}", text.encode())
    manifest = load_manifest(f"memory://signed-manifests/{url}")
    assert manifest == {"source/a": [f"memory://signed-manifests/{folder}/source/a/s.tar"]}
    assert rows_of(manifest["source/a"][0], Manifests([manifest])) == 5


def test_a_manifest_may_lie_on_a_host_with_an_ipv6_address() -> None:
    host = "[0000:0000:0000:0000:0000:0000:0000:0001]:80"
    fsspec.filesystem("memory").pipe(f"/{host}/manifest.json", b'{"schema": 1, "domains": {}}')
    assert load_manifest("memory://[::1]:80").url == f"memory://{host}/manifest.json"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://host/manifest.json?X-Amz-Signature=ab/cd", True),
        ("simplecache::https://host/corpus.json?sig=a.tar", True),
        ("https://host/corpus?X-Amz-Signature=ab", True),
        ("http://[::1]:9000/corpus", True),
        ("https://host/get?file=manifest.json", True),
        ("https://host/a.tar?X-Amz-Signature=ab.json", False),
        ("https://host/get?file=a.tar", False),
        ("s3://bucket/a-{0..9}.tar", False),
        ("https://host/get?shard=1", None),
        ("s3://bucket/corpus/*", None),
        ("source/a=https://host/a", None),
    ],
)
def test_manifests_are_told_from_shards_by_their_urls(url: str, expected: bool | None) -> None:
    assert names_manifest(url) is expected


def test_a_signed_shard_is_no_manifest() -> None:
    with pytest.raises(ConfigurationError, match=r"^https://h/a\.tar\?\.\.\. is a shard"):
        load_manifest("https://h/a.tar?X-Amz-Signature=ab/cd")


def test_a_name_that_comes_twice_is_refused() -> None:
    """What stands under the first would be lost in silence."""
    text = b'{"schema": 1, "domains": {"source/a": {"shards": []}, "source/a": {"shards": []}}}'
    with pytest.raises(ShardError, match="'source/a' comes twice"):
        parse_manifest("manifest.json", text)


def test_a_folder_without_a_manifest_is_refused_with_the_way_to_name_its_shards(tmp_path: Path) -> None:
    """`dmagent index FOLDER/` takes a folder for that of a manifest."""
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    with pytest.raises(ShardNotFoundError, match=r"there is no manifest .*: .*name shards without one by a pattern"):
        load_manifest(f"{tmp_path}/")
