"""An error or Ctrl-C ends a start at once, whatever the other threads wait for."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.far_server import FarServer, Handler, Server, _FileHandler
from dmagent_loader.cli import main
from dmagent_loader.errors import ShardNotFoundError
from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.index.threads import in_threads
from dmagent_loader.shards.sources import calls
from dmagent_loader.shards.sources.remote import RemoteSource
from dmagent_loader.shards.writing.tar_writer import TarWriter

PATIENCE_SECONDS = 60.0
"""Time limit of a request, which is repeated five times."""
AT_ONCE_SECONDS = 5.0


class Stalling(Handler):
    """Answers nothing but that ``missing.tar`` is not there."""

    server: StallingServer

    def answer(self, *, body: bool) -> None:
        if self.path.endswith("missing.tar"):
            self.server.stalled.wait(PATIENCE_SECONDS)
            self.head(404, 0, {})
        else:
            self.server.stalled.set()
            self.server.ended.wait(PATIENCE_SECONDS)
            self.close_connection = True


class StallingServer(Server):
    def __init__(self) -> None:
        super().__init__(Stalling)
        self.stalled, self.ended = threading.Event(), threading.Event()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StallingServer]:
    monkeypatch.setenv(calls.TIMEOUT_VARIABLE, str(PATIENCE_SECONDS))
    server = StallingServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < AT_ONCE_SECONDS


def test_a_missing_shard_is_named_while_others_stall(server: StallingServer, tmp_path: Path) -> None:
    urls = [server.url(f"{name}.tar") for name in ("a", "b", "missing", "c")]
    with at_once(), pytest.raises(ShardNotFoundError, match=r"missing\.tar does not exist"):
        ShardCollection.open({"source/a": urls}, cache_dir=tmp_path, progress=False)


def test_ctrl_c_ends_a_start_whose_shards_stall(server: StallingServer, tmp_path: Path) -> None:
    urls = [server.url(f"{name}.tar") for name in "abc"]

    def interrupt() -> None:
        server.stalled.wait(PATIENCE_SECONDS)
        time.sleep(0.5)  # Python may overlook a signal that comes just as it begins to wait
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with at_once(), pytest.raises(KeyboardInterrupt):
        ShardCollection.open({"source/a": urls}, cache_dir=tmp_path, progress=False)


def test_no_thread_goes_on_reading_after_an_error(server: StallingServer) -> None:
    """As while shards are indexed: the threads of a process are waited for at its end."""
    ended: list[str] = []

    def read(name: str) -> bytearray:
        try:
            return RemoteSource(server.url(name)).read(0, 1)
        finally:
            ended.append(name)

    names = ["a.tar", "missing.tar", "b.tar"]
    with at_once(), pytest.raises(ShardNotFoundError):
        list(in_threads(read, names, threading.Event()))
    assert sorted(ended) == sorted(names)


def test_a_method_that_blocks_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a filesystem without coroutines, which cannot be cancelled."""
    blocked, stop = threading.Event(), threading.Event()

    class Blocking:
        def info(self, path: str) -> None:
            stop.set()
            blocked.wait(PATIENCE_SECONDS)

    with at_once(), calls.ended_by(stop), pytest.raises(calls.Stopped):
        calls.call(Blocking(), "info", "a", limit=PATIENCE_SECONDS)
    with at_once(), pytest.raises(TimeoutError):
        calls.call(Blocking(), "info", "a", limit=0.05)
    blocked.set()


LEAVES_EARLY = """
import contextlib
import sys
import threading
from dmagent_loader import AgentWeightedSampler, ReadingConfig

reading = ReadingConfig(progress=False, cache_dir=sys.argv[2], block_cache_dir=sys.argv[3])
sampler = AgentWeightedSampler({"source/a": sys.argv[1]}, samples_per_reweight=100, reading=reading)


def read():
    with contextlib.suppress(Exception):  # the reader itself may fail at the end
        next(iter(sampler))


threading.Thread(target=read, daemon=True).start()
sys.stdin.readline()
"""


class StallingForBytes(_FileHandler):
    """Answers what a start needs where indexes lie in the store, and no more."""

    def answer(self, *, body: bool) -> None:
        if body and self.path.endswith(".tar"):
            self.server.count("stalled", requests=1)
            time.sleep(PATIENCE_SECONDS)
            self.close_connection = True
        else:
            super().answer(body=body)


def test_a_process_that_ends_while_blocks_are_fetched_says_nothing(tmp_path: Path) -> None:
    """fsspec closes its sessions under the requests, whose repeats would be warned of."""
    writer = TarWriter(tmp_path / "a.tar")
    for row in range(4):
        writer.add(f"{row}", {"txt": b"text"})
    writer.close()
    assert main(["index", str(tmp_path / "a.tar"), "--beside", "--no-progress"]) == 0
    server = FarServer(tmp_path, latency=0.0)
    server.RequestHandlerClass = StallingForBytes
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [
        sys.executable,
        "-c",
        LEAVES_EARLY,
        server.url("a.tar"),
        str(tmp_path / "cache"),
        str(tmp_path / "blocks"),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while "stalled" not in server.counts()["requests"]:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        with at_once():
            _, errors = process.communicate("\n", timeout=PATIENCE_SECONDS)
    server.shutdown()
    server.server_close()
    assert (process.returncode, errors) == (0, "")
