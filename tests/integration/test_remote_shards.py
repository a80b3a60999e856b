"""Shards behind URLs: a real HTTP server on loopback, and fsspec's memory filesystem."""

from __future__ import annotations

import gc
import hashlib
import http.server
import io
import json
import multiprocessing
import pickle
import re
import socket
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest
from thread_peers import ThreadPeers

from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader.cli import main
from dmagent_loader.errors import ConfigurationError, DamagedShardError, ShardError, ShardNotFoundError
from dmagent_loader.shards import ShardCollection, load_manifest, shard_files
from dmagent_loader.shards.manifest import parse_manifest

pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for http")


def tar_bytes(texts: list[str]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number, text in enumerate(texts):
            info = tarfile.TarInfo(f"{number:03d}.txt")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return stream.getvalue()


TEXTS = [f"row {n} " * 40 for n in range(30)]


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` with byte ranges; counts what it sent; can be told to misbehave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.bytes_sent = 0
        self.ranges: list[str] = []
        self.failures_left = 0
        self.ignore_ranges = False
        self.sends_times = True
        self.signature: str | None = None

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        name, _, query = self.path.lstrip("/").partition("?")
        data = self.server.files.get(name)
        if self.server.signature is not None and f"X-Amz-Signature={self.server.signature}" not in query.split("&"):
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if data is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if body and self.server.failures_left > 0:
            self.server.failures_left -= 1
            self.close_connection = True
            self.connection.close()
            return
        wanted = self.headers.get("Range")
        if wanted and not self.server.ignore_ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            data = data[start:end]
            self.server.ranges.append(wanted)
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        if self.server.etags.get(name) != "":
            self.send_header("ETag", self.server.etags.get(name, '"1"'))
        if self.server.sends_times:
            self.send_header("Last-Modified", formatdate(0, usegmt=True))
        self.end_headers()
        if body:
            self.wfile.write(data)
            self.server.bytes_sent += len(data)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMAGENT_CACHE_DIR", str(tmp_path / "cache"))


def texts_of(collection: ShardCollection, domain: int = 0, shard: int = 0) -> list[str]:
    rows = range(int(collection.shard_rows(domain)[shard]))
    return [str(collection.read(domain, shard, row).members["txt"], "utf-8") for row in rows]


def test_rows_are_read_by_ranges_and_the_index_only_once(server: Server) -> None:
    for number in range(3):
        server.files[f"s-{number:03d}.tar"] = tar_bytes(TEXTS)
    shards = {"source/a": server.url("s-{000..002}.tar")}
    first = ShardCollection.open(shards, progress=False)
    assert first.num_rows.tolist() == [90]
    assert texts_of(first, shard=2) == TEXTS
    server.bytes_sent, server.ranges = 0, []
    again = ShardCollection.open(shards, progress=False)
    assert server.bytes_sent == 0
    assert bytes(again.read(0, 1, 7).members["txt"]).decode() == TEXTS[7]
    assert server.bytes_sent == len(TEXTS[7])
    assert len(server.ranges) == 1


def test_a_remote_shard_with_another_etag_is_indexed_again(server: Server) -> None:
    server.files["a.tar"] = tar_bytes(["old1", "old2"])
    shards = {"source/a": server.url("a.tar")}
    assert texts_of(ShardCollection.open(shards, progress=False)) == ["old1", "old2"]
    server.files["a.tar"], server.etags["a.tar"] = tar_bytes(["new1", "new2"]), '"2"'
    assert texts_of(ShardCollection.open(shards, progress=False)) == ["new1", "new2"]


def test_shards_whose_server_makes_one_etag_of_their_equal_sizes_and_times_are_not_taken_for_each_other(
    server: Server,
) -> None:
    """Starlette's etag is the md5 of time and size: it looks like a checksum, and shards unpacked together share it."""
    for number in range(2):
        server.files[f"s-{number}.tar"] = tar_bytes([f"{number} {text}" for text in TEXTS])
    (size,) = {len(data) for data in server.files.values()}
    etag = hashlib.md5(f"1700000000.0-{size}".encode()).hexdigest()
    server.etags = dict.fromkeys(server.files, f'"{etag}"')
    for number in range(2):
        collection = ShardCollection.open({"source/a": server.url(f"s-{number}.tar")}, progress=False)
        assert texts_of(collection) == [f"{number} {text}" for text in TEXTS]


@pytest.mark.parametrize("sends_times", [True, False])
def test_without_etags_rows_that_took_the_place_of_padding_are_found(server: Server, sends_times: bool) -> None:
    """The size stays, and so does the time within one second."""
    server.sends_times, server.etags["a.tar"] = sends_times, ""
    server.files["a.tar"] = tar_bytes(["one", "two"])
    shards = {"source/a": server.url("a.tar")}
    assert ShardCollection.open(shards, progress=False).num_rows.tolist() == [2]
    server.bytes_sent = 0
    assert ShardCollection.open(shards, progress=False).num_rows.tolist() == [2]
    assert server.bytes_sent < len(server.files["a.tar"]), "the shard was read through again"
    server.files["a.tar"] = tar_bytes(["one", "two", "three"])
    assert texts_of(ShardCollection.open(shards, progress=False)) == ["one", "two", "three"]


def test_the_remedy_for_other_rows_under_the_same_etag_works(server: Server) -> None:
    server.files["a.tar"] = tar_bytes(["old1", "old2"])
    shards = {"source/a": server.url("a.tar")}
    ShardCollection.open(shards, progress=False)
    server.files["a.tar"] = tar_bytes(["new1", "new2"])
    with pytest.raises(DamagedShardError, match="remove its cached index") as error:
        ShardCollection.open(shards, progress=False).read(0, 0, 0)
    found = re.search(r"cached index (\S+)", str(error.value))
    assert found is not None
    Path(found[1]).unlink()
    assert texts_of(ShardCollection.open(shards, progress=False)) == ["new1", "new2"]


def test_a_damaged_shard_that_was_restored_with_its_etag_is_whole_again(server: Server) -> None:
    """nginx makes etags of size and time, which `rsync -t` restores."""
    whole = tar_bytes(TEXTS)
    server.files["a.tar"] = whole[:2048] + bytes(512) + whole[2560:]
    shards = {"source/a": server.url("a.tar")}
    for _ in range(2):
        with pytest.raises(DamagedShardError, match="header zeroed"):
            ShardCollection.open(shards, progress=False)
    server.files["a.tar"] = whole
    assert texts_of(ShardCollection.open(shards, progress=False)) == TEXTS


def test_a_remote_shard_that_changes_while_it_is_used_is_found(server: Server) -> None:
    server.files["a.tar"] = tar_bytes(["old1", "old2"])
    collection = ShardCollection.open({"source/a": server.url("a.tar")}, progress=False)
    server.files["a.tar"] = tar_bytes(["new1", "new2"])
    with pytest.raises(DamagedShardError, match="changed since it was indexed"):
        collection.read(0, 0, 0)


def test_blocks_of_an_earlier_content_are_not_taken_where_the_store_names_no_version(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The index of it is still in the cache, so by all checksums its blocks would be right."""
    shards = {"source/a": server.url("a.tar")}
    reading = ReadingConfig(progress=False, block_cache_dir=tmp_path / "blocks")

    def texts() -> list[str]:
        return sorted(sample["txt"] for sample in islice(AgentWeightedSampler(shards, reading=reading), 9))

    server.etags["a.tar"], server.sends_times = "", False
    old, new = ([f"{version} {row}" for row in range(9)] for version in ("old", "new"))
    server.files["a.tar"] = tar_bytes(old)
    assert texts() == old
    server.files["a.tar"] = tar_bytes(new)
    with pytest.raises(DamagedShardError, match="changed since it was indexed"):
        texts()
    warnings = [record.getMessage() for record in caplog.records if "neither an etag" in record.getMessage()]
    assert len(warnings) == 2, "one at each start"
    assert f"1 remote shard(s), of which the first is {shards['source/a']}" in warnings[0]


def test_the_processes_of_a_run_share_blocks_where_the_store_names_no_version(server: Server) -> None:
    server.etags["a.tar"], server.sends_times = "", False
    server.files["a.tar"] = tar_bytes(TEXTS)
    shards = {"source/a": server.url("a.tar")}

    def run() -> set[str]:
        """The names of the first block in two ranks, and in a data worker of one."""
        values: list[Any] = [None] * 2
        barrier = threading.Barrier(2)

        def opened(rank: int) -> ShardCollection:
            return ShardCollection.open(shards, progress=False, peers=ThreadPeers(rank, 2, values, barrier))

        with ThreadPoolExecutor(2) as ranks:
            collections = list(ranks.map(opened, range(2)))
        collections.append(pickle.loads(pickle.dumps(collections[0])))
        return {collection._tables.get(0).blocks[0].name for collection in collections}

    one, other = run(), run()
    assert len(one) == len(other) == 1
    assert one != other


def signed(server: Server, name: str, signature: str) -> str:
    return f"{server.url(name)}?X-Amz-Expires=60&X-Amz-Signature={signature}"


def test_a_new_signature_does_not_index_again(server: Server, tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        server.files[name], server.etags[name] = tar_bytes([f"{name} {text}" for text in TEXTS]), f'"{name}"'
    opened = []
    for server.signature in ("monday", "tuesday", "wednesday"):
        shards = {"source/a": [signed(server, name, server.signature) for name in ("a.tar", "b.tar")]}
        opened.append(ShardCollection.open(shards, progress=False))
        sent, server.bytes_sent = server.bytes_sent, 0
        assert sent == 0 or server.signature == "monday", "the shards were read through again"
        assert texts_of(opened[-1], shard=1)[0] == f"b.tar {TEXTS[0]}"
        server.bytes_sent = 0
    assert len({collection.fingerprint for collection in opened}) == 1
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 2
    server.files["a.tar"], server.etags["a.tar"] = tar_bytes(["new"]), '"2"'
    shards = {"source/a": [signed(server, "a.tar", "wednesday")]}
    assert texts_of(ShardCollection.open(shards, progress=False)) == ["new"]


def test_a_run_resumes_with_new_signatures(server: Server) -> None:
    server.files["a.tar"] = tar_bytes(TEXTS)
    samplers = []
    for server.signature in ("monday", "tuesday"):
        shards = {"source/a": signed(server, "a.tar", server.signature)}
        samplers.append(AgentWeightedSampler(shards, samples_per_reweight=10, reading=ReadingConfig(progress=False)))
    first, second = samplers
    server.signature = "monday"
    keys = [sample["__key__"] for sample in islice(first, 20)]
    server.signature = "tuesday"
    second.load_state_dict(first.state_dict(consumed=8))
    assert [sample["__key__"] for sample in islice(second, 12)] == keys[8:]


def test_a_manifest_knows_shards_by_their_urls_without_signatures(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "alpha"}')
    shard_files({"source/a": [tmp_path / "a.jsonl"]}, tmp_path / "out", progress=False)
    manifest = parse_manifest(server.url("manifest.json"), (tmp_path / "out" / "manifest.json").read_bytes())
    name = "source/a/a-000000.tar"
    server.files[name], server.signature = tar_bytes(["beta!"]), "monday"
    with pytest.raises(DamagedShardError, match="is not the file that was written"):
        ShardCollection.open({"source/a": signed(server, name, "monday")}, progress=False, manifests=[manifest])


def test_two_signatures_of_one_shard_are_the_same_shard(server: Server) -> None:
    urls = [signed(server, "a.tar", signature) for signature in ("monday", "tuesday")]
    with pytest.raises(ConfigurationError, match="twice"):
        ShardCollection.open({"source/a": urls}, progress=False)


def test_new_signed_urls_reach_a_running_job(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signature expires while rows are read; a file takes the newer URLs, whenever it is written."""
    server.files["a.tar"], server.signature = tar_bytes(TEXTS), "monday"
    shards = {"source/a": signed(server, "a.tar", "monday")}
    collection = ShardCollection.open(shards, progress=False)
    server.signature = "tuesday"
    with pytest.raises(ShardError, match=r"may not be read.*signature has expired.*DMAGENT_SIGNED_URLS"):
        collection.read(0, 0, 0)
    renewed = tmp_path / "urls.txt"
    monkeypatch.setenv("DMAGENT_SIGNED_URLS", str(renewed))
    with pytest.raises(ShardError, match="may not be read"):
        collection.read(0, 0, 0)
    for server.signature in ("tuesday", "wednesday"):
        lines = [signed(server, name, server.signature) for name in ("other.tar", "a.tar")]
        renewed.write_text("\n".join(lines) + "\n", encoding="utf-8")
        with ThreadPoolExecutor(4) as threads:
            rows = list(threads.map(lambda row: bytes(collection.read(0, 0, row).members["txt"]), range(len(TEXTS))))
        assert [row.decode() for row in rows] == TEXTS
    assert texts_of(ShardCollection.open(shards, progress=False)) == TEXTS, "the listed URL has long expired"
    monkeypatch.setenv("DMAGENT_SIGNED_URLS", str(tmp_path))
    with pytest.raises(ConfigurationError, match="which cannot be read"):
        ShardCollection.open({"source/a": signed(server, "a.tar", "monday")}, progress=False)


def read_first_row(collection: ShardCollection, results: multiprocessing.Queue[str]) -> None:
    results.put(bytes(collection.read(0, 0, 0).members["txt"]).decode())


def test_new_signed_urls_reach_data_workers(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["a.tar"], server.signature = tar_bytes(TEXTS), "monday"
    collection = ShardCollection.open({"source/a": signed(server, "a.tar", "monday")}, progress=False)
    monkeypatch.setenv("DMAGENT_SIGNED_URLS", str(tmp_path / "urls.txt"))
    server.signature = "tuesday"
    (tmp_path / "urls.txt").write_text(signed(server, "a.tar", "tuesday"), encoding="utf-8")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    worker = context.Process(target=read_first_row, args=(collection, results))
    worker.start()
    assert results.get(timeout=60) == TEXTS[0]
    worker.join()


def test_dropped_connections_are_tried_again(server: Server) -> None:
    server.files["a.tar"] = tar_bytes(TEXTS)
    collection = ShardCollection.open({"source/a": server.url("a.tar")}, progress=False)
    server.failures_left = 2
    assert str(collection.read(0, 0, 3).members["txt"], "utf-8") == TEXTS[3]
    assert server.failures_left == 0


def test_a_server_that_stays_away_is_an_error_that_names_the_shard(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmagent_loader.shards.sources.remote.REMOTE_BACKOFF_SECONDS", 0.01)
    server.files["a.tar"] = tar_bytes(TEXTS)
    collection = ShardCollection.open({"source/a": server.url("a.tar?token=secret")}, progress=False)
    server.failures_left = 100
    with pytest.raises(ShardError, match=r"a\.tar.*could not be read in 6 attempts") as error:
        collection.read(0, 0, 3)
    assert "secret" not in str(error.value)
    assert "start again when its server answers" in str(error.value)


def test_a_server_that_cannot_be_reached_at_the_start_is_not_said_to_lack_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """fsspec hides the fault behind a FileNotFoundError, which would send the reader to look for the file."""
    monkeypatch.setattr("dmagent_loader.shards.sources.remote.REMOTE_BACKOFF_SECONDS", 0.01)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # nobody listens there
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.tar?token=secret"
        with pytest.raises(ShardError, match=r"a\.tar\?\.\.\. could not be read in 6.*Cannot connect to host") as error:
            ShardCollection.open({"source/a": url}, progress=False)
    assert "FileNotFoundError" not in str(error.value)
    assert "secret" not in str(error.value)


def test_a_shard_that_is_gone_when_a_row_is_read_is_an_error_with_a_remedy(server: Server) -> None:
    server.files["a.tar"] = tar_bytes(TEXTS)
    collection = ShardCollection.open({"source/a": server.url("a.tar")}, progress=False)
    del server.files["a.tar"]
    with pytest.raises(ShardNotFoundError, match=r"a\.tar does not exist: restore it, or leave it out$"):
        collection.read(0, 0, 3)


def test_a_server_without_ranges_is_named_as_such(server: Server) -> None:
    """fsspec hands over the whole file instead: rows would be the first bytes of the shard."""
    server.files["a.tar"] = tar_bytes(TEXTS)
    collection = ShardCollection.open({"source/a": server.url("a.tar")}, progress=False)
    server.ignore_ranges = True
    with pytest.raises(ShardError, match="ignores byte ranges"):
        collection.read(0, 0, 3)


def test_a_missing_remote_shard_is_named(server: Server) -> None:
    with pytest.raises(ShardNotFoundError, match=r"nowhere\.tar"):
        ShardCollection.open({"source/a": server.url("nowhere.tar")}, progress=False)


def test_a_remote_cut_is_found(server: Server) -> None:
    server.files["a.tar"] = tar_bytes(TEXTS)[: 1024 * 6]
    with pytest.raises(DamagedShardError, match=r"a\.tar.*cut at a record boundary"):
        ShardCollection.open({"source/a": server.url("a.tar")}, progress=False)


def _child(collection: ShardCollection, results: multiprocessing.Queue[list[str]]) -> None:
    results.put(texts_of(collection))
    gc.collect()  # a copy of the parent's connections that is finalised here would stop the parent's event loop


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_forked_and_spawned_processes_read_over_http(server: Server, method: str) -> None:
    """The parent's event loop and connections do not work in a forked child."""
    server.files["a.tar"] = tar_bytes(TEXTS)
    collection = ShardCollection.open({"source/a": server.url("a.tar")}, progress=False)
    collection.read(0, 0, 0)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    worker = context.Process(target=_child, args=(collection, results))
    worker.start()
    assert results.get(timeout=60) == TEXTS
    worker.join()
    assert texts_of(collection) == TEXTS


def test_many_threads_read_over_http(server: Server) -> None:
    server.files["a.tar"] = tar_bytes(TEXTS)
    collection = ShardCollection.open({"source/a": server.url("a.tar")}, progress=False)
    with ThreadPoolExecutor(8) as pool:
        rows = list(range(30)) * 4
        read = pool.map(lambda row: str(collection.read(0, 0, row).members["txt"], "utf-8"), rows)
        assert list(read) == [TEXTS[row] for row in rows]


def test_simulate_predicts_the_requests_of_a_run(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counted by the server: what the reader does and what is said about it cannot part."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    shard_files({"source/a": [tmp_path / "a.jsonl"]}, tmp_path / "out", progress=False)
    for name in ("manifest.json", "source/a/a-000000.tar"):
        server.files[name] = (tmp_path / "out" / name).read_bytes()
    command = ["simulate", "--shards", server.url("manifest.json"), "--mix", "source=1", "--steps", "3"]
    command += ["--exhausted", "stop"]
    assert main([*command, "--samples-per-reweight", "10", "--storage", "--latency", "0.1"]) == 0
    found = re.search(
        r"reading: (\d+) requests of up to 16 MiB, .*\nrate: at most (\d+) rows/s", capsys.readouterr().out
    )
    assert found is not None
    shards = load_manifest(server.url("manifest.json"))
    reading = ReadingConfig(progress=False, block_cache_dir=tmp_path / "blocks")
    sampler = AgentWeightedSampler(shards, samples_per_reweight=10, exhausted="stop", reading=reading)
    server.ranges = []
    assert len(list(sampler)) == 30
    assert len(server.ranges) == int(found[1])
    assert int(found[1]) == 1
    assert int(found[2]) in (299, 300), "30 rows in one request of 0.1 s"


def test_memory_filesystem_and_manifest(tmp_path: Path) -> None:
    """A folder of shards can be copied anywhere that fsspec reaches, and its manifest goes with it."""
    (tmp_path / "a.jsonl").write_text('{"text": "alpha"}')
    shard_files({"source/a": [tmp_path / "a.jsonl"]}, tmp_path / "out", progress=False)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "out"), "/corpus-of-test", recursive=True)
    shards = load_manifest("memory://corpus-of-test/manifest.json")
    assert shards == {"source/a": ["memory://corpus-of-test/source/a/a-000000.tar"]}
    collection = ShardCollection.open(shards, progress=False)
    assert texts_of(collection) == ["alpha"]
    memory.pipe("/corpus-of-test/source/a/a-000000.tar", tar_bytes(["beta!"]))
    with pytest.raises(DamagedShardError, match=r"a-000000\.tar is not the file that was written"):
        ShardCollection.open(shards, progress=False)
    assert texts_of(ShardCollection.open(shards, on_damage="skip", progress=False)) == ["beta!"]


def test_unknown_protocols_and_wildcards_are_refused() -> None:
    with pytest.raises(ShardError, match="no access to 'nope' URLs"):
        ShardCollection.open({"source/a": "nope://a.tar"}, progress=False)
    with pytest.raises(ConfigurationError, match="wildcard"):
        ShardCollection.open({"source/a": "https://example.invalid/*.tar"}, progress=False)
