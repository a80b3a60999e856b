"""An object store as far away as real ones: a folder behind HTTP, with latency and a limited rate per connection."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_COUNTS = "/counts.json"
_PIECE_BYTES = 1 << 20


class SlowStore(http.server.ThreadingHTTPServer):
    """Serves the files of a folder by byte ranges.

    Args:
        folder: Folder that is served.
        latency: Seconds before each answer.
        rate: Bytes per second of each connection; 0: no limit.
    """

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, folder: Path, latency: float, rate: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.latency, self.rate = folder, latency, rate
        self.requests: dict[str, int] = {}
        self.bytes_sent: dict[str, int] = {}
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that close their connections are no fault."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: SlowStore
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        if self.path == _COUNTS:
            counts = {"requests": self.server.requests, "bytes": self.server.bytes_sent}
            return self._head(200, len(data := json.dumps(counts).encode()), {}) or self._send(data)
        time.sleep(self.server.latency)
        name = self.path.partition("?")[0].lstrip("/")
        with self.server.lock:
            kind = f"{self.command} {Path(name).suffix}"
            self.server.requests[kind] = self.server.requests.get(kind, 0) + 1
        path = self.server.folder / name
        if not path.is_file():
            return self._head(404, 0, {})
        status = path.stat()
        etag = hashlib.md5(f"{status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        first, last = 0, status.st_size - 1
        wanted = self.headers.get("Range") if body else None
        if wanted:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            last = min(last, status.st_size - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{status.st_size}"
        self._head(206 if wanted else 200, last - first + 1, headers)
        return self._send_file(path, first, last + 1, kind) if body else None

    def _send_file(self, path: Path, start: int, end: int, kind: str) -> None:
        began, sent = time.monotonic(), 0
        piece = max(1, min(_PIECE_BYTES, int(self.server.rate / 20) or _PIECE_BYTES))
        with path.open("rb") as file:
            while start + sent < end:
                self.wfile.flush()
                sent += os.sendfile(
                    self.connection.fileno(), file.fileno(), start + sent, min(piece, end - start - sent)
                )
                if self.server.rate:
                    time.sleep(max(0.0, began + sent / self.server.rate - time.monotonic()))
        with self.server.lock:
            self.server.bytes_sent[kind] = self.server.bytes_sent.get(kind, 0) + sent

    def _send(self, data: bytes) -> None:
        self.wfile.write(data)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return


@contextlib.contextmanager
def slow_store(folder: Path, latency: float = 0.03, rate: float = 100e6) -> Iterator[str]:
    """Serves a folder from a process of its own, whose interpreter the reader does not share; yields its URL."""
    command = [sys.executable, __file__, str(folder), str(latency), str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def counts(url: str) -> dict[str, Any]:
    """What the store at a URL has answered: requests and bytes, by method and ending of the file."""
    with urllib.request.urlopen(f"{url}{_COUNTS}") as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found


if __name__ == "__main__":
    store = SlowStore(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
    print(store.server_address[1], flush=True)
    store.serve_forever()
