"""Refusals of Google's, Azure's and the Hub's storage, as their packages report them: named at once.

The server on loopback answers as the services document. gcsfs and adlfs are not among the packages of the tests:
pip install gcsfs adlfs.
"""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator

import fsspec
import pytest

from dmagent_loader.errors import ShardError, ShardNotFoundError
from dmagent_loader.shards.sources.local import open_source, shard_version

PACKAGES = {"gs": "gcsfs", "az": "adlfs", "hf": "huggingface_hub"}
URLS = {"gs": "gs://bucket/a.tar", "az": "az://container/a.tar", "hf": "hf://datasets/user/name/a.tar"}


class Service(http.server.ThreadingHTTPServer):
    """Answers every request alike."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ServiceHandler)
        self.status, self.body, self.reply_headers = 200, b"", {"Content-Type": "application/json"}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class ServiceHandler(http.server.BaseHTTPRequestHandler):
    server: Service
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def _answer(self) -> None:
        self.send_response(self.server.status)
        for name, value in {**self.server.reply_headers, "Content-Length": str(len(self.server.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.server.body)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    server = Service()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    account = f"DefaultEndpointsProtocol=http;AccountName=dev;AccountKey=Zm9v;BlobEndpoint={server.url}/dev;"
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon", "endpoint_url": server.url})
    monkeypatch.setitem(fsspec.config.conf, "az", {"connection_string": account})
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


CASES = [
    ("gs", 401, "Anonymous caller does not have storage.objects.get access", {}),
    ("gs", 403, "dev does not have storage.objects.get access", {}),
    ("gs", 404, "No such object", {}),
    ("az", 403, "AuthenticationFailed", {"x-ms-error-code": "AuthenticationFailed"}),
    ("az", 404, "BlobNotFound", {"x-ms-error-code": "BlobNotFound"}),
    ("hf", 401, "Invalid user token", {}),
    ("hf", 404, "Repository not found", {"X-Error-Code": "RepoNotFound"}),
]


@pytest.mark.parametrize(("name", "status", "reason", "headers"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_refusals_are_named_at_once(
    name: str,
    status: int,
    reason: str,
    headers: dict[str, str],
    service: Service,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip(PACKAGES[name], reason=f"needs {PACKAGES[name]}")
    error: object = {"code": status, "message": reason} if name == "gs" else reason
    service.status, service.body = status, json.dumps({"error": error}).encode()
    if name == "az":
        service.body = f"<?xml version='1.0'?><Error><Code>{reason}</Code><Message>no</Message></Error>".encode()
        headers = {**headers, "Content-Type": "application/xml"}
    service.reply_headers = {"Content-Type": "application/json", **headers}
    for read in (lambda: shard_version(URLS[name]), lambda: open_source(URLS[name]).read(0, 10)):
        begin = time.perf_counter()
        with pytest.raises(ShardError) as found:
            read()
        assert time.perf_counter() - begin < 20, "it was repeated"
        if status == 404:
            assert isinstance(found.value, ShardNotFoundError)
        else:
            assert f"{URLS[name]} may not be read" in str(found.value)
            assert reason in str(found.value)
    assert not [record for record in caplog.records if record.name.startswith("dmagent_loader")]
