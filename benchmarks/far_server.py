"""An HTTP server on loopback that is as far away as an object store: it answers late, and sends at a limited rate.

    python benchmarks/far_server.py FOLDER [--latency 0.03] [--rate 100e6]

It prints its address, serves the files of the folder with byte ranges, and answers ``/-/counts`` with the numbers of
requests for content and of bytes sent since the last such question.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

LATENCY_SECONDS = 0.03
BYTES_PER_SECOND = 100e6
"""Of one connection."""

_SENT_AT_A_TIME = 1 << 20


class FarServer(http.server.ThreadingHTTPServer):
    """Serves a folder.

    Args:
        folder: Its files are served.
        latency: Seconds before each answer.
        rate: Bytes per second of each connection.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path, latency: float = LATENCY_SECONDS, rate: float = BYTES_PER_SECOND) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.latency, self.rate = folder, latency, rate
        self.lock = threading.Lock()
        self.requests = self.bytes_sent = 0

    def url(self, name: str) -> str:
        """URL of a file, or of a pattern of files."""
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def take_counts(self) -> dict[str, int]:
        """Requests for content, and bytes sent, since the last call."""
        with self.lock:
            counts = {"requests": self.requests, "bytes": self.bytes_sent}
            self.requests = self.bytes_sent = 0
            return counts

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed are part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FarServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def _answer(self, body: bool) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        if name == "-/counts":
            self._head(200, {}, counts := json.dumps(self.server.take_counts()).encode())
            self.wfile.write(counts)
            return
        time.sleep(self.server.latency)
        try:
            file = (self.server.folder / name).open("rb")
        except OSError:
            self._head(404, {}, b"")
            return
        with file:
            status = os.fstat(file.fileno())
            first, end, headers = 0, status.st_size, {"ETag": f'"{status.st_size:x}-{status.st_mtime_ns:x}"'}
            code, wanted = 200, self.headers.get("Range")
            if wanted:
                bounds = wanted.removeprefix("bytes=").split("-")
                first, end = int(bounds[0]), min(int(bounds[1]) + 1, end) if bounds[1] else end
                code, headers["Content-Range"] = 206, f"bytes {first}-{end - 1}/{status.st_size}"
            self._head(code, {**headers, "Accept-Ranges": "bytes"}, range(first, end))
            if body:
                self._send(file.fileno(), first, end)

    def _head(self, code: int, headers: dict[str, str], content: bytes | range) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()

    def _send(self, file: int, first: int, end: int) -> None:
        """Sends bytes of a file, no faster than the rate."""
        with self.server.lock:
            self.server.requests += 1
        started, sent = time.monotonic(), 0
        try:
            while sent < end - first:
                now = os.sendfile(
                    self.connection.fileno(), file, first + sent, min(_SENT_AT_A_TIME, end - first - sent)
                )
                if not now:
                    return
                sent += now
                time.sleep(max(0.0, started + sent / self.server.rate - time.monotonic()))
        except OSError:
            self.close_connection = True
        finally:
            with self.server.lock:
                self.server.bytes_sent += sent


@contextlib.contextmanager
def serving(folder: Path, latency: float = LATENCY_SECONDS, rate: float = BYTES_PER_SECOND) -> Iterator[str]:
    """Serves a folder from a process of its own; yields the address, without a slash at its end."""
    command = [sys.executable, __file__, str(folder), "--latency", str(latency), "--rate", str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.kill()


def take_counts(address: str) -> dict[str, int]:
    """Requests for content, and bytes sent, since the last call."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    connection.request("GET", "/-/counts")
    counts: dict[str, int] = json.loads(connection.getresponse().read())
    connection.close()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=LATENCY_SECONDS, help="seconds (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=BYTES_PER_SECOND, help="bytes/s (default: %(default)s)")
    args = parser.parse_args()
    server = FarServer(args.folder, args.latency, args.rate)
    print(server.url("").rstrip("/"), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
