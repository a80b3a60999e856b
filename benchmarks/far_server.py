"""An HTTP server on loopback that is as far away as an object store: it answers late, and sends at a limited rate.

    python benchmarks/far_server.py FOLDER [--latency 0.03] [--rate 100e6]

It prints its address, serves the files of the folder with byte ranges, and answers ``/-/counts`` with the numbers of
files and bytes that it has sent. `Server` and `Handler` are also the base of servers that do something else.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

LATENCY_SECONDS = 0.03
BYTES_PER_SECOND = 100e6
"""Of one connection."""

_COUNTS = "/-/counts"
_SENT_AT_A_TIME = 1 << 20
_PIECES_PER_SECOND = 20
"""Least number of pieces that are sent in a second."""

Counts = dict[str, dict[str, int]]
"""``"requests"`` and ``"bytes"`` -> method and ending of the file, such as ``"GET .tar"`` -> number."""


class Server(http.server.ThreadingHTTPServer):
    """A server on loopback, with a thread for each connection.

    Args:
        handler: Class that answers the requests.
    """

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, handler: type[Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.lock = threading.Lock()

    def url(self, name: str) -> str:
        """URL of a file, or of a pattern of files."""
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up or are killed are part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler, ABC):
    """Answers the requests of one connection, with byte ranges."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        """Size and version."""
        self.answer(body=False)

    def do_GET(self) -> None:
        """Bytes."""
        self.answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    @abstractmethod
    def answer(self, *, body: bool) -> None:
        """Answers one request."""

    def wanted_range(self, size: int) -> tuple[int, int] | None:
        """First byte of the requested range, and the one after its last; None if the whole file is requested."""
        wanted = self.headers.get("Range")
        if not wanted:
            return None
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        return int(first), min(int(last) + 1, size) if last else size

    def head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        """Sends the status line and the headers."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


class FarServer(Server):
    """Serves a folder.

    Args:
        folder: Its files are served.
        latency: Seconds before each answer.
        rate: Bytes per second of each connection; 0: no limit.
    """

    def __init__(self, folder: Path, latency: float = LATENCY_SECONDS, rate: float = BYTES_PER_SECOND) -> None:
        super().__init__(_FileHandler)
        self.folder, self.latency, self.rate = folder, latency, rate or float("inf")
        self._requests: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    def count(self, kind: str, *, requests: int = 0, sent: int = 0) -> None:
        """Counts answers, and bytes sent."""
        with self.lock:
            self._requests[kind] += requests
            self._bytes[kind] += sent

    def counts(self, *, reset: bool = False) -> Counts:
        """Answers with a file, and bytes sent.

        Args:
            reset: Count from 0 again.
        """
        with self.lock:
            counts = {"requests": dict(self._requests), "bytes": dict(self._bytes)}
            if reset:
                self._requests.clear()
                self._bytes.clear()
            return counts


class _FileHandler(Handler):
    server: FarServer

    def answer(self, *, body: bool) -> None:
        parts = urlsplit(self.path)
        if parts.path == _COUNTS:
            data = json.dumps(self.server.counts(reset=parts.query == "reset")).encode()
            self.head(200, len(data), {})
            self.wfile.write(data)
            return
        time.sleep(self.server.latency)
        path = self.server.folder / unquote(parts.path).lstrip("/")
        kind = f"{self.command} {path.suffix}"
        try:
            file = path.open("rb")
        except OSError:
            self.head(404, 0, {})
            return
        with file:
            status = os.fstat(file.fileno())
            headers = {"ETag": f'"{status.st_size:x}-{status.st_mtime_ns:x}"', "Accept-Ranges": "bytes"}
            wanted = self.wanted_range(status.st_size)
            first, end = wanted or (0, status.st_size)
            if first > end:
                self.head(416, 0, {})
                return
            if wanted:
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{status.st_size}"
            self.server.count(kind, requests=1)
            self.head(206 if wanted else 200, end - first, headers)
            if body:
                self._send(file.fileno(), first, end, kind)

    def _send(self, file: int, first: int, end: int, kind: str) -> None:
        """Sends bytes of a file, no faster than the rate."""
        rate = self.server.rate
        piece = int(max(1, min(_SENT_AT_A_TIME, rate / _PIECES_PER_SECOND)))
        started, sent = time.monotonic(), 0
        try:
            while sent < end - first:
                now = os.sendfile(self.connection.fileno(), file, first + sent, min(piece, end - first - sent))
                if not now:
                    return
                sent += now
                self.server.count(kind, sent=now)
                time.sleep(max(0.0, started + sent / rate - time.monotonic()))
        except OSError:
            self.close_connection = True


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


def counts(address: str, *, reset: bool = False) -> Counts:
    """`FarServer.counts` of the server with this address."""
    with urllib.request.urlopen(f"{address}{_COUNTS}{'?reset' if reset else ''}") as answer:
        found: Counts = json.loads(answer.read())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=LATENCY_SECONDS, help="seconds (default: %(default)s)")
    parser.add_argument(
        "--rate", type=float, default=BYTES_PER_SECOND, help="bytes/s; 0: no limit (default: %(default)s)"
    )
    args = parser.parse_args()
    server = FarServer(args.folder, args.latency, args.rate)
    print(server.url("").rstrip("/"), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
