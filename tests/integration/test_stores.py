"""Shards in object stores: against moto's S3 server, and a server that answers with the errors that S3 documents."""

from __future__ import annotations

import http.server
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow
import pytest

from dmagent_loader.errors import ConfigurationError, ShardError, ShardNotFoundError
from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.inputs.finding import find_inputs
from dmagent_loader.shards.sources import remote
from dmagent_loader.shards.sources.patterns import expand_shards
from dmagent_loader.shards.writing.writer import shard_files
from tests.stores import BUCKET, S3Server, forget_filesystems, s3_server

pytest.importorskip("s3fs", reason="needs s3fs: pip install 'dmagent-loader[s3]'")
from benchmarks.reliability.remote_faults import TEXTS, tar_bytes

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture(autouse=True)
def _own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration of the user's, and no filesystem of an earlier test."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("DMAGENT_CACHE_DIR", str(tmp_path / "cache"))
    forget_filesystems()


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    pytest.importorskip("moto.server", reason="needs moto's server: pip install 'moto[s3]' flask flask-cors")
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(running: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    running.require_credentials(after=float("inf"))
    running.reset()
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    return running


def put(name: str, data: bytes) -> str:
    """Writes an object, and returns its URL."""
    url = f"s3://{BUCKET}/{name}"
    fsspec.filesystem("s3").pipe_file(url, data)
    return url


def texts_of(collection: ShardCollection, shard: int = 0) -> list[str]:
    rows = range(int(collection.shard_rows(0)[shard]))
    return [str(collection.read(0, shard, row).members["txt"], "utf-8") for row in rows]


def open_shards(shards: str | list[str]) -> ShardCollection:
    return ShardCollection.open({"source/a": shards}, progress=False)


def test_braces_globs_and_folders_name_the_shards_of_a_bucket(s3: S3Server) -> None:
    urls = [put(f"web/a-{number:03d}.tar", tar_bytes([f"{number}"])) for number in range(3)]
    put("web/readme.txt", b"")
    folder = f"s3://{BUCKET}/web"
    for pattern in (f"{folder}/a-{{000..002}}.tar", f"{folder}/*.tar", f"{folder}/a-00[0-2].tar", f"{folder}/"):
        assert expand_shards("d", pattern) == urls
        assert expand_shards("d", f"simplecache::{pattern}") == [f"simplecache::{url}" for url in urls]
    collection = open_shards(f"{folder}/*.tar")
    assert [texts_of(collection, shard) for shard in range(3)] == [["0"], ["1"], ["2"]]
    with pytest.raises(ShardNotFoundError, match=r"no shard matches 's3://corpus/web/b-\*\.tar'"):
        open_shards(f"{folder}/b-*.tar")
    with pytest.raises(ShardNotFoundError, match=r"s3://corpus/web/b\.tar does not exist"):
        open_shards(f"{folder}/b.tar")


@pytest.mark.parametrize("cache", ["simplecache", "filecache", "blockcache"])
def test_chained_urls_are_read_through_the_cache_and_known_without_it(
    cache: str, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fsspec.config.conf, cache, {"cache_storage": str(tmp_path / "files")})
    url = put("a.tar", tar_bytes(TEXTS))
    plain = open_shards(url)
    collection = open_shards(f"{cache}::{url}")
    assert texts_of(collection) == TEXTS
    assert collection.fingerprint == plain.fingerprint
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 1, "it was indexed again"
    fsspec.filesystem("s3").rm(url)
    if cache != "blockcache":
        assert texts_of(collection) == TEXTS, "the rows did not come from the cache"
    with pytest.raises(ConfigurationError, match=r"lists shard simplecache::s3://corpus/a\.tar twice"):
        open_shards([url, f"simplecache::{url}"])


def test_a_copy_in_s3_is_not_indexed_again(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its etag is the md5 of its bytes."""
    first = open_shards(put("a.tar", tar_bytes(TEXTS)))
    copy = put("moved/a.tar", tar_bytes(TEXTS))
    monkeypatch.setattr("dmagent_loader.shards.index.cache.build_index", lambda *_, **__: pytest.fail("indexed again"))
    assert open_shards(copy).fingerprint == first.fingerprint


def test_inputs_are_found_by_globs(s3: S3Server, tmp_path: Path) -> None:
    put("raw/b.jsonl", b'{"text": "b"}\n')
    put("raw/a.jsonl", b'{"text": "a"}\n')
    for path in (f"s3://{BUCKET}/raw/*.jsonl", f"s3://{BUCKET}/raw", f"simplecache::s3://{BUCKET}/raw/*.jsonl"):
        found = find_inputs("source/a", [path])
        assert [item.name for item in found] == ["a.jsonl", "b.jsonl"]
    compressed = pyarrow.Codec("zstd").compress(b'{"text": "c"}\n', asbytes=True)
    put("raw/c.jsonl.zst", compressed)
    records = shard_files({"source/a": [f"s3://{BUCKET}/raw/*.jsonl*"]}, tmp_path / "out", progress=False)
    assert records["source/a"].rows == 3


def test_inputs_that_may_not_be_read_are_named(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [put("raw/a.jsonl", b'{"text": "a"}\n'), f"s3://{BUCKET}/raw/*.jsonl"]
    for name in KEYS:
        monkeypatch.delenv(name)
    forget_filesystems()
    for url in urls:
        with pytest.raises(ShardError, match=r"may not be (read|listed): Unable to locate credentials"):
            shard_files({"source/a": [url]}, tmp_path / "out", progress=False)


def test_a_profile_names_the_server_and_the_keys(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put("a.tar", tar_bytes(TEXTS))
    for name in (*KEYS, "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    forget_filesystems()
    (tmp_path / "aws-config").write_text(f"[profile team]\nendpoint_url = {s3.endpoint}\nregion = us-east-1\n")
    (tmp_path / "aws-credentials").write_text("[team]\naws_access_key_id = testing\naws_secret_access_key = testing\n")
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert texts_of(open_shards(url)) == TEXTS
    forget_filesystems()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ShardError, match=r"a\.tar may not be read.*\(nobody\).*set AWS_PROFILE"):
        open_shards(url)


def test_missing_credentials_are_named_at_once(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url = put("a.tar", tar_bytes(TEXTS))
    for name in KEYS:
        monkeypatch.delenv(name)
    forget_filesystems()
    with pytest.raises(ShardError, match=r"a\.tar may not be read: Unable to locate credentials; set AWS_PROFILE"):
        open_shards(url)
    assert not caplog.records
    with monkeypatch.context() as keys:
        for name in KEYS:
            keys.setenv(name, "testing")
        fsspec.filesystem("s3", skip_instance_cache=True).chmod(url, acl="public-read")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})
    assert texts_of(open_shards(url)) == TEXTS, "the bucket is public"


def test_keys_that_the_server_does_not_know_are_named(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """With authentication on, as S3 answers: HEAD has no body, so the reason comes from a second request."""
    url = put("a.tar", tar_bytes(TEXTS))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAUNKNOWN")
    forget_filesystems()
    s3.require_credentials()
    with pytest.raises(ShardError, match=r"a\.tar may not be read: InvalidAccessKeyId: .*set AWS_PROFILE"):
        open_shards(url)


class Store(http.server.ThreadingHTTPServer):
    """Answers every request with one error of S3, or serves one object."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StoreHandler)
        self.data = tar_bytes(TEXTS)
        self.error = (0, "")
        self.errors_left = 10**9
        self.requests = 0
        self.headers: dict[str, str] = {}


class StoreHandler(http.server.BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def _answer(self) -> None:
        self.server.requests += 1
        status, code = self.server.error
        if status and self.server.errors_left > 0:
            self.server.errors_left -= 1
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self._send(status, body, self.server.headers)
            return
        data, wanted = self.server.data, self.headers.get("Range")
        if wanted is None:
            self._send(200, data, {"ETag": '"1"'})
            return
        first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        last = min(last, len(data) - 1)
        headers = {"ETag": '"1"', "Content-Range": f"bytes {first}-{last}/{len(data)}"}
        self._send(206, data[first : last + 1], headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "Content-Type": "application/xml"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    server = Store()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    for name in KEYS:
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


URL = f"s3://{BUCKET}/a.tar"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "ExpiredToken"),
        (400, "InvalidToken"),
        (400, "AuthorizationHeaderMalformed"),
        (403, "AccessDenied"),
        (403, "InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch"),
        (403, "RequestTimeTooSkewed"),
    ],
)
@pytest.mark.parametrize("stage", ["open", "read"])
def test_refusals_of_s3_are_named_at_once(
    status: int, code: str, stage: str, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    collection = open_shards(URL) if stage == "read" else None
    caplog.clear()  # this store has the shard in place of the table of indexes, too, which is said
    store.error, store.requests = (status, code), 0
    with pytest.raises(ShardError, match=rf"a\.tar may not be read: {code}.*set AWS_PROFILE"):
        open_shards(URL) if collection is None else collection.read(0, 0, 0)
    assert store.requests <= 3, "HEAD, botocore's look for another region, and GET for the reason"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_bucket_of_another_region_is_not_asked_again(store: Store) -> None:
    collection = open_shards(URL)
    store.error, store.requests, store.headers = (301, "PermanentRedirect"), 0, {"x-amz-bucket-region": "eu-west-1"}
    with pytest.raises(ShardError, match=r"a\.tar cannot be read.*PermanentRedirect"):
        collection.read(0, 0, 0)
    assert store.requests <= 2


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (400, "RequestTimeout")])
def test_slow_down_is_heeded_once_and_not_by_each_layer(
    status: int, code: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3fs and botocore would repeat each attempt 25 times, without a look at ``Retry-After``."""
    monkeypatch.setattr(remote, "REMOTE_BACKOFF_SECONDS", 0.01)
    collection = open_shards(URL)
    store.error, store.errors_left, store.requests, store.headers = (status, code), 2, 0, {"Retry-After": "1"}
    begin = time.perf_counter()
    assert collection.read(0, 0, 0).members["txt"] == TEXTS[0].encode()
    assert time.perf_counter() - begin >= 2
    assert store.requests == 3
    store.errors_left, store.requests, store.headers = 10**9, 0, {}
    with pytest.raises(ShardError, match=rf"a\.tar could not be read in 6 attempts.*{code}"):
        collection.read(0, 0, 0)
    assert store.requests == remote.REMOTE_ATTEMPTS
