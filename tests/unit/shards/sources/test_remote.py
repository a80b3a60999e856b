"""The bytes of one attempt to read a range, and the URL that it goes to."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from dmagent_loader.shards.sources.remote import SinkError, _describe, _IgnoresRanges, _ShortRead, _Sink
from dmagent_loader.shards.sources.signed_urls import newest_url
from dmagent_loader.shards.sources.urls import with_long_host


def test_a_late_part_is_not_written() -> None:
    """A request that has timed out may still be running, and its file may be another one by then."""
    parts: list[tuple[int, bytes]] = []
    sink = _Sink(lambda position, part: parts.append((position, part)), 5)
    sink.take(b"ab")
    sink.take(b"cd")
    sink.close()
    with pytest.raises(TimeoutError):
        sink.take(b"e")
    assert parts == [(0, b"ab"), (2, b"cd")]


def test_no_more_is_written_than_was_requested() -> None:
    """A block has room for its own bytes only."""
    parts: list[bytes] = []
    sink = _Sink(lambda position, part: parts.append(part), 5)
    sink.take(b"abc")
    with pytest.raises(_IgnoresRanges):
        sink.take(b"def")
    assert (parts, sink.taken) == ([b"abc"], 3)


def test_an_error_of_the_disk_is_none_of_the_network() -> None:
    """An OSError of the network is repeated."""

    def write(position: int, part: bytes) -> None:
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(SinkError) as error:
        _Sink(write, 5).take(b"abc")
    assert error.value.reason.errno == errno.ENOSPC


def test_an_answer_that_is_too_short_is_told_without_a_name_of_the_code() -> None:
    text = _describe(_ShortRead(512, 100, 40), 60.0)
    assert text == "100 bytes were expected at byte 512, but it ends after 40 of them"


def test_a_newer_url_may_have_an_ipv6_address_as_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """URLs of shards have it written out."""
    (tmp_path / "urls").write_text("http://[::1]:9000/a.tar?X-Amz-Signature=new\n")
    monkeypatch.setenv("DMAGENT_SIGNED_URLS", str(tmp_path / "urls"))
    old, new = (with_long_host(f"http://[::1]:9000/a.tar?X-Amz-Signature={name}") for name in ("old", "new"))
    assert newest_url(old) == new
