"""Servers that fail: asked again and no row lost, or refused by name and in time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dmagent_loader.errors import ConfigurationError, DamagedShardError, ShardError
from dmagent_loader.shards import ShardCollection
from dmagent_loader.shards.sources import calls, remote

pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for http")

from benchmarks.reliability.remote_faults import (
    REFUSED,
    RETRIED,
    TEXTS,
    TIMEOUT_SECONDS,
    impatient,
    run_fault,
    serving,
    tar_bytes,
)


@pytest.fixture(autouse=True)
def _impatient() -> Iterator[None]:
    with impatient():
        yield


@pytest.mark.parametrize("stage", ["open", "read"])
@pytest.mark.parametrize("fault", RETRIED)
def test_a_fault_that_passes_costs_no_row(fault: str, stage: str, tmp_path: Path) -> None:
    outcome = run_fault(fault, stage, 2, tmp_path)
    assert outcome.error == ""
    assert outcome.rows_right == len(TEXTS)
    assert outcome.requests > 2


@pytest.mark.parametrize("fault", [fault for fault in RETRIED if "Retry-After" not in fault])
def test_a_fault_that_stays_is_an_error_that_names_the_shard_and_not_the_token(fault: str, tmp_path: Path) -> None:
    outcome = run_fault(fault, "read", -1, tmp_path)
    assert "shard-000.tar" in outcome.error
    assert "secret" not in outcome.error
    assert outcome.warnings == remote.REMOTE_ATTEMPTS - 1
    assert outcome.seconds < 3 * remote.REMOTE_ATTEMPTS * TIMEOUT_SECONDS  # aiohttp's own limit is five minutes
    assert ("no answer within" in outcome.error) == fault.startswith("stall")


@pytest.mark.parametrize("stage", ["open", "read"])
@pytest.mark.parametrize("fault", REFUSED)
def test_a_fault_that_does_not_pass_is_an_error_at_once(fault: str, stage: str, tmp_path: Path) -> None:
    outcome = run_fault(fault, stage, -1, tmp_path)
    assert "shard-000.tar" in outcome.error
    assert outcome.warnings == 0


def test_retry_after_is_heeded(tmp_path: Path) -> None:
    outcome = run_fault("429 with Retry-After in seconds", "read", 1, tmp_path)
    assert outcome.rows_right == len(TEXTS)
    assert outcome.seconds >= 1


def test_a_server_that_is_busy_when_the_shards_are_opened_is_not_taken_for_one_without_the_shard(
    tmp_path: Path,
) -> None:
    """fsspec raises FileNotFoundError for every answer to its request for the size."""
    outcome = run_fault("503", "open", -1, tmp_path)
    assert "could not be read in 6 attempts" in outcome.error
    assert "503" in outcome.error


def test_bytes_that_change_on_the_way_are_found(tmp_path: Path) -> None:
    outcome = run_fault("flipped bit", "read", -1, tmp_path)
    assert "changed since it was indexed" in outcome.error


def test_a_row_that_changed_on_the_way_is_read_again(tmp_path: Path) -> None:
    outcome = run_fault("flipped bit", "read", 1, tmp_path)
    assert outcome.rows_right == len(TEXTS)


def test_a_server_that_ignores_ranges_does_not_send_the_whole_shard(tmp_path: Path) -> None:
    """`cat_file` would take a shard of any size into memory before its length is looked at."""
    texts = ["x" * (1 << 20)] * 64
    with serving(texts) as server:
        collection = ShardCollection.open({"source/a": server.shard_url}, progress=False, cache_dir=tmp_path)
        server.begin("ignores ranges", 1 << 30)
        begin = time.perf_counter()
        with pytest.raises(ShardError, match="ignores byte ranges"):
            collection.read(0, 0, 63)
        assert time.perf_counter() - begin < 10


class _Stuck(MemoryFileSystem):  # type: ignore[misc]
    """A filesystem whose calls block, as those without async code do."""

    protocol = "stuck"
    store: dict[str, object] = {}  # noqa: RUF012
    free = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("stuck://").lstrip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **settings: object) -> bytes:
        self.free.wait(20)
        return bytes(super().cat_file(path, start, end))


def test_a_filesystem_that_blocks_is_left_after_the_limit_too(tmp_path: Path) -> None:
    fsspec.register_implementation("stuck", _Stuck, clobber=True)
    fsspec.filesystem("stuck").pipe("/shard-000.tar", tar_bytes(TEXTS))
    try:
        with pytest.raises(ShardError, match=r"shard-000\.tar could not be read.*no answer within"):
            ShardCollection.open({"source/a": "stuck://shard-000.tar"}, progress=False, cache_dir=tmp_path)
        _Stuck.free.set()
        collection = ShardCollection.open({"source/a": "stuck://shard-000.tar"}, progress=False, cache_dir=tmp_path)
        assert str(collection.read(0, 0, 3).members["txt"], "utf-8") == TEXTS[3]
    finally:
        _Stuck.free.set()


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf", "nan"])
def test_a_limit_that_is_none_is_refused(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(calls.TIMEOUT_VARIABLE, value)
    with pytest.raises(ConfigurationError, match="positive number of seconds"):
        ShardCollection.open({"source/a": "memory://a.tar"}, progress=False, cache_dir=tmp_path)


def test_a_shard_that_shrinks_behind_the_url_is_damaged_not_unreachable(tmp_path: Path) -> None:
    with serving() as server:
        collection = ShardCollection.open({"source/a": server.shard_url}, progress=False, cache_dir=tmp_path)
        server.data = server.data[:4000]
        with pytest.raises(DamagedShardError, match=r"shard-000\.tar.*changed since it was indexed"):
            collection.read(0, 0, 29)


def test_a_shard_that_is_replaced_while_it_is_indexed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index would hold rows of both."""
    with serving(["x" * (3 << 20)] * 4) as server:
        whole, take_fault = server.data, server.take_fault

        def replace_in_the_middle() -> str:
            fault = take_fault()
            if server.requests == 4:  # after two for size and version, and one for the first bytes
                server.data = whole[:-10240]
            return fault

        monkeypatch.setattr(server, "take_fault", replace_in_the_middle)
        with pytest.raises(DamagedShardError, match=r"shard-000\.tar.*changed"):
            ShardCollection.open({"source/a": server.shard_url}, progress=False, cache_dir=tmp_path)
        assert server.requests > 4
