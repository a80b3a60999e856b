"""Members that are parsed together are those that are parsed one by one, in whole files and in damaged ones."""

from __future__ import annotations

import io
import random
import tarfile
from time import thread_time
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmagent_loader.errors import DamagedShardError, ShardLayoutError
from dmagent_loader.shards.tar import plain_runs, scan, scanner
from dmagent_loader.shards.tar.members import BAD_HEADER, MemberTable
from dmagent_loader.shards.tar.scanner import KeyEnd

PARTS = ["a", "b.c", "7", "x" * 90, "ü", "__m", "__m__", ".h", "", "a\nb", "A", "..", "long" * 40]
EXTENSIONS = ["txt", "TXT", "json", "seg.png", "txt.gz", "", "ü", "__key__"]
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
COLUMNS = ("offset", "size", "extension", "row_first", "row_crc", "key_end", "key_hash")


class Memory:
    """A file in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, offset: int, length: int) -> bytearray:
        if offset + length > len(self._data):
            raise DamagedShardError("too short")
        return bytearray(self._data[offset : offset + length])


def tar_of(draws: random.Random, *, is_usual: bool) -> bytearray:
    """A tar of many small members; `is_usual`: of samples only, with short names."""
    file, format = io.BytesIO(), draws.choice(FORMATS)
    has_times = draws.random() < 0.5
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for row in range(draws.randrange(5, 50)):
            for extension in draws.sample(EXTENSIONS[:5], draws.randrange(1, 4)):
                name = f"{draws.choice(['', 'd/', './e.f/'])}{row:04d}.{extension}"
                kind = tarfile.REGTYPE
                if not is_usual and draws.random() < 0.2:
                    name = ".".join([draws.choice(PARTS), draws.choice(EXTENSIONS)])
                    kind = draws.choice([tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.AREGTYPE])
                info = tarfile.TarInfo(name)
                info.type, info.size = kind, draws.choice([0, 1, 511, 512, 513, 1500]) if kind == tarfile.REGTYPE else 0
                info.mtime = draws.random() * 1e9 if has_times else 0
                try:
                    tar.addfile(info, io.BytesIO(draws.randbytes(info.size)))
                except ValueError:  # this format has no such name
                    continue
    return bytearray(file.getvalue())


def damaged(tar: bytearray, draws: random.Random) -> bytearray:
    for _ in range(draws.randrange(0, 3)):
        begin = draws.randrange(len(tar)) // draws.choice([1, 512]) * draws.choice([1, 512]) % len(tar)
        count = draws.choice([1, 8, 512, 2048])
        action = draws.randrange(4)
        if action == 0:
            tar[begin : begin + count] = bytes(count)
        elif action == 1:
            tar[begin : begin + count] = draws.randbytes(count)
        elif action == 2:
            del tar[begin : begin + count]
        else:
            tar[begin] = (tar[begin] + 1) % 256
    return tar


def outcome(tar: bytes, key_ends_at: KeyEnd) -> Any:
    """Members and gaps of a tar, or the error."""
    try:
        members, gaps = scan("a.tar", Memory(tar), len(tar), key_ends_at=key_ends_at)
    except ShardLayoutError as error:
        return str(error)
    columns = {name: getattr(members, name).tolist() for name in COLUMNS}
    return columns, members.extensions, bytes(members.keys), members.hidden, gaps


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    is_usual=st.booleans(),
    is_whole=st.booleans(),
    key_ends_at=st.sampled_from(["first-dot", "last-dot"]),
    fewest=st.sampled_from([1, 3, 64]),
    chunk=st.sampled_from([1 << 12, 1 << 14, 4 << 20]),
)
def test_runs_hold_what_is_found_member_by_member(
    seed: int, is_usual: bool, is_whole: bool, key_ends_at: KeyEnd, fewest: int, chunk: int
) -> None:
    draws = random.Random(seed)
    tar = tar_of(draws, is_usual=is_usual)
    content = bytes(tar if is_whole else damaged(tar, draws))
    with mock.patch.object(scanner, "_CHUNK_BYTES", chunk):
        with mock.patch.object(plain_runs.PlainRuns, "find", return_value=None):
            expected = outcome(content, key_ends_at)
        with mock.patch.object(plain_runs, "_FEWEST_MEMBERS", fewest):
            assert outcome(content, key_ends_at) == expected


def test_usual_members_come_in_runs() -> None:
    """Of the formats of all usual writers, with and without times in fractions of a second."""
    for format in FORMATS:
        for time in (0, 0.5):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w", format=format) as tar:
                for row in range(100):
                    for extension in ("txt", "json"):
                        info = tarfile.TarInfo(f"d/{row:06d}.{extension}")
                        info.size, info.mtime = 700, time
                        tar.addfile(info, io.BytesIO(bytes(700)))
            data = file.getvalue()
            runs, keys, end = plain_runs.PlainRuns(scanner.SPLIT_NAME["first-dot"]), [], 0
            while len(keys) < 200:
                run = runs.find(memoryview(data), end)
                assert run is not None
                keys, end = keys + run.keys, run.end
                assert run.extensions == [b"txt", b"json"] * (len(run.keys) // 2)
            assert keys == [b"d/%06d" % (number // 2) for number in range(200)]
            assert not any(data[end : end + 1024])


def test_members_that_never_make_a_run_are_soon_left_alone() -> None:
    """Else each would be looked at twice."""
    runs = plain_runs.PlainRuns(scanner.SPLIT_NAME["first-dot"])
    with mock.patch.object(runs, "_run", return_value=None) as looked:
        for _ in range(10_000):
            runs.find(memoryview(b""), 0)
    assert looked.call_count < 25


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


TIMES = member("pax", b"30 mtime=1700000000.123456789\n", tarfile.XHDTYPE)
LONG_LINK = member("././@LongLink", b"short\0", tarfile.GNUTYPE_LONGLINK)
ROWS = b"".join(member(f"{row:03d}.txt") for row in range(100)) + bytes(1024)


@pytest.mark.parametrize("before", range(12))
@pytest.mark.parametrize("between", [b"", LONG_LINK], ids=["nothing", "long link"])
def test_a_member_lost_between_two_pax_headers_is_noticed(before: int, between: bytes) -> None:
    """Wherever the first header lies: a run is looked for at some of the headers only."""
    tar = b"".join(member(f"README{number}") for number in range(before)) + TIMES + between + TIMES + ROWS
    _, gaps = scan("a.tar", Memory(tar), len(tar))
    assert [gap.kind for gap in gaps] == [BAD_HEADER]


@pytest.mark.parametrize(("first", "second"), [("009.txt", "b.__index__"), ("b.__index__", "a.txt")])
def test_of_two_errors_in_a_run_the_first_is_reported(first: str, second: str) -> None:
    rows = [member(f"{row:03d}.txt") for row in range(100)]
    tar = b"".join([*rows[:10], member(first), *rows[10:50], member("a.txt"), member(second), *rows[50:]])
    with pytest.raises(ShardLayoutError, match="has the extension 'txt' twice" if first == "009.txt" else "reserved"):
        scan("a.tar", Memory(tar), len(tar))


def test_a_row_of_many_members_takes_no_longer_toward_its_end() -> None:
    members, seconds = MemberTable("a.tar"), []
    extensions = [b"%d" % number for number in range(1 << 16)]
    zeros = np.zeros(64, np.int64)
    for part in range(4):
        began = thread_time()
        for first in range(part << 14, (part + 1) << 14, 64):
            members.add_all([b"a"] * 64, extensions[first : first + 64], zeros, zeros, [memoryview(b"")] * 64)
        seconds.append(thread_time() - began)
    assert len(members.row_first) == 1
    assert seconds[3] < 3 * seconds[0] + 0.1
