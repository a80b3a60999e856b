"""A real HTTP server on loopback that misbehaves in one way at a time.

    python -m benchmarks.reliability.remote_faults

Each fault comes for a while (then the server is well again: all rows must be read, as they are) or for good (then the
error must name the shard, and come in bounded time).
"""

from __future__ import annotations

import contextlib
import email.utils
import io
import logging
import os
import struct
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.far_server import Handler, Server
from dmagent_loader.errors import ShardError
from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.sources import calls, remote

TEXTS = [f"row {number} " * 40 for number in range(30)]
STALL_SECONDS = 30.0
TIMEOUT_SECONDS = 0.3
"""Of a request to a server that stalls. Other faults have `STALL_SECONDS`: a busy machine must not add one."""


def tar_bytes(texts: list[str]) -> bytes:
    """A shard with a row for each text."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number, text in enumerate(texts):
            info = tarfile.TarInfo(f"{number:03d}.txt")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return stream.getvalue()


class FaultyServer(Server):
    """Serves one shard by byte ranges; `fault` is what it does wrong the next `faults_left` times."""

    def __init__(self, data: bytes) -> None:
        super().__init__(FaultyHandler)
        self.data = data
        self.fault = ""
        self.faults_left = 0
        self.requests = 0
        self.well_again = threading.Event()

    @property
    def shard_url(self) -> str:
        """URL of the shard."""
        return self.url("shard-000.tar?token=secret")

    def begin(self, fault: str, times: int) -> None:
        """Does something wrong the next so many times."""
        self.fault, self.faults_left, self.requests = fault, times, 0

    def take_fault(self) -> str:
        """What to do wrong now; empty: nothing."""
        with self.lock:
            self.requests += 1
            if not self.fault or self.faults_left <= 0:
                return ""
            self.faults_left -= 1
            return self.fault


class FaultyHandler(Handler):
    """Answers one request, well or badly."""

    server: FaultyServer

    def answer(self, *, body: bool) -> None:
        """Answers one request."""
        fault = self.server.take_fault()
        if fault == "reset":
            return self._reset()
        if fault == "stall":
            return self._stall()
        if fault.isdigit():
            return self._refuse(int(fault), {})
        if fault == "429 with Retry-After in seconds":
            return self._refuse(429, {"Retry-After": "1"})
        if fault == "503 with Retry-After as a date":
            return self._refuse(503, {"Retry-After": email.utils.formatdate(time.time() + 2, usegmt=True)})
        return self._send(fault, body)

    def _send(self, fault: str, body: bool) -> None:
        data = self.server.data
        wanted = self.wanted_range(len(data)) if body else None
        status, headers = 200, {"Accept-Ranges": "bytes", "ETag": '"1"'}
        if wanted and fault != "ignores ranges":
            first, end = wanted
            if first >= len(data):
                return self._refuse(416, {})
            if fault == "other range":
                first, end = max(0, first - 512), max(0, first - 512) + end - first
            if fault == "short range":
                end = max(first + 1, (first + end + 1) // 2)
            status = 206
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
            data = data[first:end]
            if fault == "flipped bit":
                data = bytes([data[0] ^ 1]) + data[1:]
        self.head(status, len(data), headers)
        if not body:
            return None
        if fault in ("reset in the body", "stall in the body", "ends in the body"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall in the body":
                return self._stall()
            self.close_connection = True
            if fault == "reset in the body":
                return self._reset()
            return None
        with contextlib.suppress(OSError):
            self.wfile.write(data)
        return None

    def _refuse(self, status: int, headers: dict[str, str]) -> None:
        self.head(status, 0, headers)

    def _stall(self) -> None:
        self.close_connection = True
        self.server.well_again.wait(STALL_SECONDS)

    def _reset(self) -> None:
        """Ends the connection with RST instead of FIN."""
        self.close_connection = True
        self.connection.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SOL_SOCKET, SO_LINGER
        self.connection.close()


RETRIED = (
    "reset",
    "reset in the body",
    "ends in the body",
    "stall",
    "stall in the body",
    "short range",
    "other range",
    "429 with Retry-After in seconds",
    "503 with Retry-After as a date",
    "500",
    "503",
)
"""Faults that pass: the request is repeated."""

REFUSED = ("ignores ranges", "401", "403", "404")
"""Faults that do not: an error at once."""


@contextlib.contextmanager
def serving(texts: list[str] | None = None) -> Iterator[FaultyServer]:
    """A server that is well, for a while."""
    server = FaultyServer(tar_bytes(texts or TEXTS))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.well_again.set()
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a fault.

    Attributes:
        fault, stage: Which, and while opening or reading.
        times: How many requests it met; -1: all.
        rows_right: Rows that were read and are as written.
        error: The message; empty: none.
        seconds: Until the rows or the error.
        requests: That the server saw.
        warnings: Lines logged.
    """

    fault: str
    stage: str
    times: int
    rows_right: int
    error: str
    seconds: float
    requests: int
    warnings: int


def run_fault(fault: str, stage: str, times: int, cache: Path) -> Outcome:
    """Meets a fault while a shard is opened (``"open"``) or its rows are read (``"read"``).

    Args:
        fault: One of `RETRIED` or `REFUSED`.
        stage: When.
        times: Requests that go wrong; -1: all.
        cache: Folder for the index.
    """
    counter = _Counter()
    logger = logging.getLogger("dmagent_loader.shards.sources.remote")
    logger.addHandler(counter)
    logger.propagate = False
    error, rows_right = "", 0
    with serving() as server:

        def opened() -> ShardCollection:
            return ShardCollection.open({"source/a": server.shard_url}, progress=False, cache_dir=cache)

        def rows(collection: ShardCollection) -> int:
            samples = (collection.read(0, 0, row) for row in range(len(TEXTS)))
            return sum(str(sample.members["txt"], "utf-8") == TEXTS[row] for row, sample in enumerate(samples))

        collection = opened() if stage == "read" else None
        if "stall" not in fault:
            os.environ[calls.TIMEOUT_VARIABLE] = str(STALL_SECONDS)
        server.begin(fault, times if times >= 0 else 1 << 30)
        begin = time.perf_counter()
        try:
            rows_right = rows(collection or opened())
        except ShardError as fault_error:
            error = str(fault_error)
        seconds, requests = time.perf_counter() - begin, server.requests
    logger.removeHandler(counter)
    logger.propagate = True
    os.environ[calls.TIMEOUT_VARIABLE] = str(TIMEOUT_SECONDS)
    return Outcome(
        fault=fault,
        stage=stage,
        times=times,
        rows_right=rows_right,
        error=error,
        seconds=seconds,
        requests=requests,
        warnings=counter.count,
    )


class _Counter(logging.Handler):
    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Counts."""
        self.count += 1


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Short limits and pauses, so that a campaign takes seconds."""
    before = remote.REMOTE_BACKOFF_SECONDS, os.environ.get(calls.TIMEOUT_VARIABLE)
    remote.REMOTE_BACKOFF_SECONDS = 0.01
    os.environ[calls.TIMEOUT_VARIABLE] = str(TIMEOUT_SECONDS)
    try:
        yield
    finally:
        remote.REMOTE_BACKOFF_SECONDS = before[0]
        if before[1] is None:
            del os.environ[calls.TIMEOUT_VARIABLE]
        else:
            os.environ[calls.TIMEOUT_VARIABLE] = before[1]


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a line for each fault."""
    lines = [
        "| fault | while | requests that fail | rows right | lost silently | error names the shard | repeats | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        named = "" if not outcome.error else "yes" if "shard-000.tar" in outcome.error else "NO"
        lost = 0 if outcome.error else len(TEXTS) - outcome.rows_right
        times = "all" if outcome.times < 0 else str(outcome.times)
        right = "" if outcome.error else f"{outcome.rows_right} of {len(TEXTS)}"
        lines.append(
            f"| {outcome.fault} | {outcome.stage} | {times} | {right} | {lost} | {named} | {outcome.warnings} | "
            f"{outcome.seconds:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table of all faults, for a while and for good, while opening and while reading."""
    run: Callable[..., Outcome] = run_fault
    outcomes = []
    with impatient(), tempfile.TemporaryDirectory() as folder:
        for stage in ("open", "read"):
            for fault in RETRIED:
                outcomes.append(run(fault, stage, 2, Path(folder)))
                outcomes.append(run(fault, stage, -1, Path(folder)))
            outcomes += [run(fault, stage, -1, Path(folder)) for fault in REFUSED]
    print(table(outcomes))
    recovered = sum(not outcome.error and outcome.rows_right == len(TEXTS) for outcome in outcomes)
    named = sum("shard-000.tar" in outcome.error for outcome in outcomes)
    print(f"\n{len(outcomes)} faults: {recovered} repeated until all rows were right, {named} refused by name")
    sys.exit(recovered + named != len(outcomes))


if __name__ == "__main__":
    main()
