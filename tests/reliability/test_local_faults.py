"""Files that cannot be read or written as they should be: named, refused, and nothing lost in silence."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import logging
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from reading import quiet
from shard_fixtures import published

from benchmarks.reliability.remote_faults import TEXTS, tar_bytes
from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader.errors import ConfigurationError, DamagedShardError, ShardError, ShardNotFoundError, StateError
from dmagent_loader.shards import ShardCollection, ShardingConfig, load_manifest, shard_files
from dmagent_loader.shards.index.cache import IndexCache
from dmagent_loader.shards.sources.block_store import default_block_folder
from dmagent_loader.shards.sources.local import shard_version
from dmagent_loader.shards.sources.node_cache import NodeCache

NOBODY = 65534


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard-000.tar"
    path.write_bytes(tar_bytes(TEXTS))
    return path


def opened(*paths: Path, cache: Path, **settings: object) -> ShardCollection:
    return ShardCollection.open(
        {"source/a": [str(path) for path in paths]},
        progress=False,
        cache_dir=cache,
        **settings,  # type: ignore[arg-type]
    )


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything; for users other than root, nothing changes."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users may enter: pytest's own are closed to them."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def test_a_folder_of_blocks_that_cannot_be_written_to_is_named_as_that(public_folder: Path) -> None:
    public_folder.chmod(0o555)
    with as_nobody(), pytest.raises(PermissionError, match="Permission denied"):
        NodeCache(public_folder, None)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("is_link", [False, True])
def test_the_default_folder_of_blocks_is_refused_if_another_user_made_it(
    public_folder: Path, monkeypatch: pytest.MonkeyPatch, is_link: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(public_folder))
    theirs = public_folder / f"dmagent_loader-{os.getuid()}"
    with as_nobody():
        theirs.symlink_to(public_folder) if is_link else theirs.mkdir()
    with pytest.raises(PermissionError, match="belongs to another user"):
        default_block_folder()


def test_a_shard_that_may_not_be_read_is_named(public_folder: Path) -> None:
    path = public_folder / "shard-000.tar"
    path.write_bytes(tar_bytes(TEXTS))
    path.chmod(0)
    with as_nobody(), pytest.raises(ShardError, match=r"shard-000\.tar cannot be opened.*Permission denied"):
        opened(path, cache=public_folder / "cache")


def test_a_folder_that_may_not_be_entered_is_named(public_folder: Path) -> None:
    (public_folder / "closed").mkdir()
    path = public_folder / "closed" / "shard-000.tar"
    path.write_bytes(tar_bytes(TEXTS))
    path.parent.chmod(0)
    with as_nobody(), pytest.raises(ShardError, match=r"closed/shard-000\.tar"):
        opened(path, cache=public_folder / "cache")
    path.parent.chmod(0o755)


def test_a_right_that_is_taken_away_while_training_is_named(public_folder: Path) -> None:
    paths = [public_folder / f"shard-{number:03d}.tar" for number in range(2)]
    for path in paths:
        path.write_bytes(tar_bytes(TEXTS))
    with as_nobody():
        collection = opened(*paths, cache=public_folder / "cache", max_open_files=1)
        collection.read(0, 0, 0)
        collection.read(0, 1, 0)
    paths[0].chmod(0)
    with as_nobody(), pytest.raises(ShardError, match=r"shard-000\.tar cannot be opened"):
        collection.read(0, 0, 1)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["named pipe", "socket", "folder", "character device"])
def test_what_is_no_file_is_refused_and_not_waited_for(kind: str, tmp_path: Path) -> None:
    """Opening a named pipe waits for a writer for ever; /dev/zero has no end."""
    path = tmp_path / "shard-000.tar"
    if kind == "named pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ShardError, match=rf"shard-000\.tar is a {kind}"):
        opened(tmp_path / "shard-*.tar", cache=tmp_path / "cache")


def test_links_to_nowhere_and_to_themselves_are_named(tmp_path: Path) -> None:
    path = tmp_path / "shard-000.tar"
    path.symlink_to("gone.tar")
    with pytest.raises(ShardNotFoundError, match=r"shard-000\.tar"):
        opened(path, cache=tmp_path / "cache")
    path.unlink()
    path.symlink_to("shard-000.tar")
    with pytest.raises(ShardError, match=r"shard-000\.tar"):
        opened(path, cache=tmp_path / "cache")


def test_a_name_that_is_not_utf8_works(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/shard-\xff.tar")
    Path(path).write_bytes(tar_bytes(TEXTS))
    for _ in range(2):
        collection = opened(Path(path), cache=tmp_path / "cache")
        assert str(collection.read(0, 0, 3).members["txt"], "utf-8") == TEXTS[3]
    Path(path).write_bytes(tar_bytes(TEXTS)[:5000])
    with pytest.raises(DamagedShardError, match="cut"):
        opened(Path(path), cache=tmp_path / "cache")


@pytest.mark.parametrize("kept", [0, 1, 511, 512])
def test_an_empty_or_nearly_empty_file_is_damaged(kept: int, shard: Path, tmp_path: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(DamagedShardError, match=r"shard-000\.tar"):
        opened(shard, cache=tmp_path / "cache")


def test_a_shard_that_is_replaced_while_training_is_never_read_as_the_old_one(shard: Path, tmp_path: Path) -> None:
    """By rename, as `rsync` does, with rows of the same size: only checksums tell them apart."""
    second = tmp_path / "shard-001.tar"
    second.write_bytes(tar_bytes(TEXTS))
    collection = opened(shard, second, cache=tmp_path / "cache", max_open_files=1)
    assert str(collection.read(0, 0, 5).members["txt"], "utf-8") == TEXTS[5]
    other = tmp_path / "new"
    other.write_bytes(tar_bytes([text.upper() for text in TEXTS]))
    os.replace(other, shard)
    assert str(collection.read(0, 0, 6).members["txt"], "utf-8") == TEXTS[6]  # still open: the old file
    collection.read(0, 1, 0)  # closes the first
    with pytest.raises(DamagedShardError, match=r"row 7 .*shard-000\.tar changed since it was indexed"):
        collection.read(0, 0, 7)


def test_a_shard_that_is_written_while_it_is_indexed_is_refused(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process appends after the size was looked at."""
    from dmagent_loader.shards.index import cache as module

    original = module.build_index

    def build_while_written(*arguments: object, **settings: object) -> object:
        with open(shard, "ab") as file:
            file.write(bytes(10240))
        return original(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "build_index", build_while_written)
    with pytest.raises(DamagedShardError, match=r"shard-000\.tar changed while it was indexed"):
        opened(shard, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 48 KiB, really full when it is full."""
    folder = Path(tempfile.mkdtemp())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        folder.rmdir()
        pytest.skip(f"only root can mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


def test_a_full_disk_costs_the_cache_and_nothing_else(
    small_disk: Path, shard: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filling = small_disk / "filling"
    with pytest.raises(OSError, match="No space left") as full:
        filling.write_bytes(bytes(1 << 20))
    assert full.value.errno == errno.ENOSPC
    cache = small_disk / "cache"
    with caplog.at_level(logging.WARNING):
        collection = opened(shard, cache=cache)
    assert "cannot be written" in caplog.text
    assert "No space left" in caplog.text
    assert [str(collection.read(0, 0, row).members["txt"], "utf-8") for row in range(len(TEXTS))] == TEXTS
    assert [path.name for path in cache.rglob("*") if path.is_file()] == []
    filling.unlink()
    opened(shard, cache=cache)
    assert IndexCache(cache).load(str(shard), shard_version(str(shard)), None) is not None


@pytest.mark.parametrize("words", [12_000, 2_400])
def test_a_full_disk_while_shards_are_written_adds_nothing(small_disk: Path, tmp_path: Path, words: int) -> None:
    """The larger text finds no room for its chunk, the smaller one for its shard."""
    out = small_disk / "out"
    (tmp_path / "a.jsonl").write_text('{"text": "alpha"}')
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "beta " * words}))
    shard_files({"source/a": [tmp_path / "a.jsonl"]}, out, progress=False)
    before = {name: (out / name).read_bytes() for name in published(out)}
    with pytest.raises(
        ConfigurationError, match=r"no room for the shards in .*No space left.* run the same command again"
    ):
        shard_files({"source/b": [tmp_path / "b.jsonl"]}, out, progress=False)
    assert {name: (out / name).read_bytes() for name in published(out)} == before
    assert (out / ".partial").exists() == (words < 12_000), "what is done is kept for the next call"
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert shard_files({"source/b": [tmp_path / "b.jsonl"]}, out, progress=False)["source/b"].documents == 1


def _domains(folder: Path, texts: list[str]) -> Path:
    for name in ("a", "b"):
        for number in range(3):
            (folder / f"{name}{number}.jsonl").write_text("".join(f'{{"text": "{name} {text}"}}\n' for text in texts))
    sources = {f"source/{name}": [folder / f"{name}{number}.jsonl" for number in range(3)] for name in ("a", "b")}
    shard_files(sources, folder / "out", ShardingConfig(rows_per_shard=len(texts), shuffle_seed=None), progress=False)
    return folder / "out"


def sampler(out: Path, reading: ReadingConfig | None = None) -> AgentWeightedSampler:
    return AgentWeightedSampler(out, samples_per_reweight=10, reading=quiet(out.parent / "cache", reading))


def test_skip_accounts_for_the_rows_lost_and_for_their_effect_on_the_mix(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten of thirty rows of one domain are gone: the natural mix is 2 to 3, and the log says how many and why."""
    out = _domains(tmp_path, [f"text {n}" for n in range(10)])
    state = sampler(out).state_dict(0)
    shard = Path(load_manifest(out)["source/a"][1])
    shard.write_bytes(shard.read_bytes()[: 3 * 1024])
    with pytest.raises(DamagedShardError, match=r"a-000001\.tar.*cut at a record boundary.*7 rows lost"):
        sampler(out)
    shard.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        left = sampler(out, reading=ReadingConfig(on_damage="skip"))
    assert "10 rows lost, by the manifest" in caplog.text
    assert "domain 'source/a': 20 rows are left, about 10 are lost (33.3% of the domain)" in caplog.text
    assert left.mix == pytest.approx({"source/a": 0.4, "source/b": 0.6})
    stream = iter(left)
    delivered = [next(stream) for _ in range(50)]
    assert left.achieved() == {"source/a": 20, "source/b": 30}
    assert len({(sample["__domain__"], sample["__key__"]) for sample in delivered}) == 50
    with pytest.raises(StateError, match="another shard set"):
        left.load_state_dict(state)


def test_zeros_at_the_end_that_look_like_padding_are_found_by_the_manifest(tmp_path: Path) -> None:
    """The known limit of a tar: the same file without its manifest is taken for whole."""
    out = _domains(tmp_path, [f"text {n}" for n in range(12)])
    shard = Path(load_manifest(out)["source/b"][2])
    data = shard.read_bytes()
    shard.write_bytes(data[: 11 * 1024] + bytes(len(data) - 11 * 1024))
    with pytest.raises(DamagedShardError, match=r"b-000002\.tar.*fewer rows than were written.*1 rows lost, by the"):
        sampler(out)
    (out / "manifest.json").unlink()
    alone = opened(shard, cache=tmp_path / "cache")
    assert alone.num_rows.tolist() == [11]


def _pairs_with_manifest(tmp_path: Path) -> tuple[Path, bytes]:
    """Twelve rows of two members, 2,048 bytes each, below a manifest."""
    shard = tmp_path / "out" / "source" / "a" / "a-000000.tar"
    shard.parent.mkdir(parents=True)
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for n, extension in itertools.product(range(12), ("cls", "txt")):
            info = tarfile.TarInfo(f"{n:02d}.{extension}")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    data = shard.read_bytes()
    _write_manifest(tmp_path, rows=12, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return shard, data


def _write_manifest(tmp_path: Path, **record: object) -> None:
    shards = [{"path": "source/a/a-000000.tar", **record}]
    manifest = {"schema": 1, "domains": {"source/a": {"shards": shards}}}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))


def test_a_row_that_lacks_its_last_member_is_not_delivered_where_the_manifest_shows_the_damage(tmp_path: Path) -> None:
    """Zeros that look like the end begin between two members of the last row; every way to its index leaves it out."""
    shard, data = _pairs_with_manifest(tmp_path)
    shard.write_bytes(data[: 23 * 1024] + bytes(len(data) - 23 * 1024))
    with pytest.raises(DamagedShardError, match=r"fewer rows than were written.*1 rows lost, by the manifest"):
        opened(shard, cache=tmp_path / "cache")
    cached, again = (opened(shard, cache=tmp_path / "cache", on_damage="skip") for _ in range(2))
    shutil.rmtree(tmp_path / "cache")
    for collection in (cached, again, opened(shard, cache=tmp_path / "other", on_damage="skip")):
        assert collection.num_rows.tolist() == [11]
        assert sum(damage.rows_lost for damage in collection.damage) == 1
        assert list(collection.read(0, 0, 10).members) == ["cls", "txt"]
        assert collection.fingerprint == cached.fingerprint
    (tmp_path / "out" / "manifest.json").unlink()
    assert opened(shard, cache=tmp_path / "other").num_rows.tolist() == [12]


def test_rows_that_were_left_out_stay_so_when_the_manifest_goes_in_the_middle_of_a_run(tmp_path: Path) -> None:
    """Spawned workers, too, know nothing of a remote manifest that was read in the main process."""
    shard, data = _pairs_with_manifest(tmp_path)
    shard.write_bytes(data[: 23 * 1024] + bytes(len(data) - 23 * 1024))
    collection = opened(shard, cache=tmp_path / "cache", on_damage="skip")
    (tmp_path / "out" / "manifest.json").unlink()
    assert [collection.read(0, 0, row).key for row in range(11)] == [f"{n:02d}" for n in range(11)]


def test_a_row_whose_member_is_missing_as_if_it_had_never_been_there_is_left_out_by_the_manifest(
    tmp_path: Path,
) -> None:
    shard, data = _pairs_with_manifest(tmp_path)
    shard.write_bytes(data[: 9 * 1024] + data[10 * 1024 :] + bytes(1024))
    left = opened(shard, cache=tmp_path / "cache", on_damage="skip")
    assert [left.read(0, 0, row).key for row in range(11)] == [f"{n:02d}" for n in range(12) if n != 4]
    assert sum(damage.rows_lost for damage in left.damage) == 1


def test_a_manifest_that_comes_after_the_index_is_asked_about_the_bytes(tmp_path: Path) -> None:
    """Copied after the shards, or first opened through a link: the index was made without the file's sha256."""
    shard, data = _pairs_with_manifest(tmp_path)
    manifest = (tmp_path / "out" / "manifest.json").read_text()
    shard.write_bytes(data[:512] + b"y" + data[513:])
    (tmp_path / "out" / "manifest.json").unlink()
    assert opened(shard, cache=tmp_path / "cache").num_rows.tolist() == [12]
    (tmp_path / "out" / "manifest.json").write_text(manifest)
    with pytest.raises(DamagedShardError, match="is not the file that was written"):
        opened(shard, cache=tmp_path / "cache")


def test_a_manifest_that_does_not_say_enough_of_a_shard_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard, data = _pairs_with_manifest(tmp_path)
    _write_manifest(tmp_path, rows="12", bytes=len(data), sha256="0" * 64)
    with caplog.at_level(logging.WARNING):
        assert opened(shard, cache=tmp_path / "cache").num_rows.tolist() == [12]
    assert "manifest.json does not say how many rows" in caplog.text


@pytest.mark.parametrize("with_manifest", [False, True])
def test_a_damaged_shard_that_is_restored_with_its_times_is_whole_again(tmp_path: Path, with_manifest: bool) -> None:
    """As `cp -p` and `rsync -t` restore it: only the time of the change of the file itself tells the two apart."""
    out = _domains(tmp_path, [f"text {n}" for n in range(10)])
    shard = Path(load_manifest(out)["source/b"][0])
    if not with_manifest:
        (out / "manifest.json").unlink()
    shards = {"source/b": str(shard)}
    status, data = shard.stat(), shard.read_bytes()
    place = 600 + 1024 * 4 if with_manifest else 1024 * 4 + 20  # in a payload, in a header
    shard.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(DamagedShardError, match=r"b-000000\.tar"):
            ShardCollection.open(shards, cache_dir=tmp_path / "cache", progress=False)
    shard.write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    restored = ShardCollection.open(shards, cache_dir=tmp_path / "cache", progress=False)
    assert restored.num_rows.tolist() == [10]
    assert bytes(restored.read(0, 0, 4).members["txt"]) == b"b text 4"


def test_a_pipe_in_place_of_an_open_shard_is_not_waited_for(shard: Path, tmp_path: Path) -> None:
    collection = opened(shard, cache=tmp_path / "cache")
    collection.read(0, 0, 0)
    collection.close()
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(ShardError, match=r"shard-000\.tar cannot be read"):
        collection.read(0, 0, 0)


def test_a_bit_that_fell_before_the_first_index_is_found_by_the_manifest(tmp_path: Path) -> None:
    out = _domains(tmp_path, [f"text {n}" for n in range(10)])
    shard = Path(load_manifest(out)["source/b"][0])
    data = bytearray(shard.read_bytes())
    data[600 + 1024 * 4] ^= 4
    shard.write_bytes(data)
    with pytest.raises(DamagedShardError, match=r"b-000000\.tar is not the file that was written"):
        sampler(out)


def test_a_manifest_that_is_corrected_counts_at_once(tmp_path: Path) -> None:
    """The verdict is not cached with the index."""
    out = _domains(tmp_path, [f"text {n}" for n in range(10)])
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace('"rows": 10', '"rows": 11'))
    for _ in range(2):
        with pytest.raises(DamagedShardError, match="1 rows lost, by the manifest"):
            sampler(out)
    (out / "manifest.json").write_text(text)
    sampler(out)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1, "domains": {"a": {"shards": [{"path": "../x"}]}}}'])
def test_a_foreign_manifest_above_the_shards_is_left_aside_with_a_warning(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "one" / "two" / "shard-000.tar"
    path.parent.mkdir(parents=True)
    path.write_bytes(tar_bytes(TEXTS))
    (tmp_path / "manifest.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert opened(path, cache=tmp_path / "cache").num_rows.tolist() == [len(TEXTS)]
    assert "manifest.json is not used" in caplog.text
