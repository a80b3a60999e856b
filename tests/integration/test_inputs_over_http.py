"""Inputs behind a web server, as a user would name them."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from shard_fixtures import write_jsonl

from dmagent_loader.errors import ShardError, ShardNotFoundError
from dmagent_loader.shards import ShardingConfig, load_manifest, shard_files
from dmagent_loader.shards.inputs.documents import DocumentReader
from dmagent_loader.shards.inputs.finding import find_inputs

pytest.importorskip("aiohttp")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """Serves the folder ``site`` of the test on the loopback."""
    (tmp_path / "site").mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Quiet, directory=str(tmp_path / "site"))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_url_is_sharded_as_a_file_is(site: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "site/a.jsonl.gz", [{"text": f"text {number}"} for number in range(50)])
    shard_files({"source/a": [f"{site}/a.jsonl.gz?token=secret"]}, tmp_path / "remote", progress=False)
    shard_files({"source/a": [tmp_path / "site/a.jsonl.gz"]}, tmp_path / "local", progress=False)
    remote, local = (Path(load_manifest(tmp_path / name)["source/a"][0]) for name in ("remote", "local"))
    assert remote.read_bytes() == local.read_bytes()


def test_a_fault_behind_a_url_is_named_without_its_secret(site: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "site/a.jsonl", [{"text": "a"}, {"body": "b"}])
    with pytest.raises(ShardError, match=r"/a\.jsonl\?\.\.\., line 2 has no text") as error:
        shard_files({"source/a": [f"{site}/a.jsonl?token=secret"]}, tmp_path / "out", progress=False)
    assert "secret" not in str(error.value)
    with pytest.raises(ShardNotFoundError, match=r"nothing\.jsonl"):
        find_inputs("source/a", [f"{site}/nothing.jsonl"])


def test_parquet_is_read_by_ranges(site: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"text": ["one", "two"]}), tmp_path / "site/a.parquet")
    documents = DocumentReader(find_inputs("source/a", [f"{site}/a.parquet"]))
    assert [document.text for document in documents] == ["one", "two"]
    config = ShardingConfig(text_key="body")
    with pytest.raises(ShardError, match=r"a\.parquet has no text in column 'body'"):
        shard_files({"source/a": [f"{site}/a.parquet"]}, tmp_path / "out", config, progress=False)
