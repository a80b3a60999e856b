"""Damage that only a manifest or an earlier index shows. That it is found in files: tests/reliability."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmagent_loader.shards.index.overview import KnownShard, Overview
from dmagent_loader.shards.index.shard_index import ShardIndex, build_index
from dmagent_loader.shards.index.verify import (
    CHANGED,
    FEWER_ROWS,
    OTHER_BYTES,
    are_verified,
    is_verified,
    verified,
    with_content,
    without_new_rows,
)
from dmagent_loader.shards.manifest import ShardRecord
from dmagent_loader.shards.sources.local import ShardVersion, open_source

WriteTar = Callable[[str, Iterable[tuple[str, bytes]]], Path]


def index_of(path: Path) -> ShardIndex:
    return build_index(str(path), open_source(str(path)), os.path.getsize(path), with_sha256=True)


def record_of(index: ShardIndex, **changes: int | str) -> ShardRecord:
    facts = {"rows": index.num_rows, "bytes": index.file_size, "sha256": index.sha256, **changes}
    return ShardRecord(path="source/a/s.tar", **facts)  # type: ignore[arg-type]


def test_a_shard_that_is_as_it_was_written_has_no_damage(pairs: Path) -> None:
    index = index_of(pairs)
    assert verified("s.tar", index, record_of(index)) == index
    assert verified("s.tar", index, None) is index


def test_rows_that_the_tar_does_not_miss_are_counted_by_the_manifest(pairs: Path) -> None:
    index = index_of(pairs)
    (damage,) = verified("s.tar", index, record_of(index, rows=23)).damage
    assert (damage.kind, damage.rows_lost, damage.is_exact) == (FEWER_ROWS, 3, True)
    assert damage.offset == index.end_of_members
    assert "3 rows lost, by the manifest above it" in str(damage)


@pytest.mark.parametrize("change", [{"rows": 19}, {"sha256": "0" * 64}, {"bytes": 1024}])
def test_another_file_than_the_one_written_is_named_as_such(pairs: Path, change: dict[str, int | str]) -> None:
    index = index_of(pairs)
    (damage,) = verified("s.tar", index, record_of(index, **change)).damage
    assert (damage.kind, damage.rows_lost) == (CHANGED, 0)
    assert "s.tar is not the file that was written" in str(damage)


def test_estimates_of_lost_rows_become_counts(twenty: Path) -> None:
    """Two damaged places: the first keeps its estimate, the last takes the rest."""
    data = bytearray(twenty.read_bytes())
    for row in (3, 9):
        data[row * 1536 : row * 1536 + 512] = bytes(512)
    twenty.write_bytes(data)
    index = index_of(twenty)
    found = verified("s.tar", index, record_of(index, rows=25)).damage
    assert [damage.rows_lost for damage in index.damage] == [1, 1]
    assert [(damage.rows_lost, damage.is_exact, damage.at_least) for damage in found] == [
        (1, True, False),
        (6, True, False),
    ]


def test_a_row_that_lacks_a_member_is_left_out_only_where_the_manifest_shows_damage(write_tar: WriteTar) -> None:
    members = [(f"{n}.{end}", b"x") for n in range(9) for end in ("cls", "txt")][:-1]
    index = index_of(write_tar("s.tar", members))
    assert verified("s.tar", index, record_of(index)).num_rows == 9
    left = verified("s.tar", index, record_of(index, sha256="0" * 64))
    assert left.num_rows == 8
    assert with_content(index, left.checksum) is not None, "the manifest may be gone when the index is built again"
    assert with_content(index, index.checksum) == index
    assert with_content(index, "0" * 64) is None


def test_a_known_shard_has_to_be_compared_with_a_manifest_that_came_later(pairs: Path) -> None:
    index = index_of(pairs)
    version = ShardVersion(size=index.file_size, tag="1")
    known, compared = (
        KnownShard(version=version, rows=index.num_rows, inventory='[["txt"]]', checksum=bytes(32), sha256=sha256)
        for sha256 in (None, index.sha256)
    )
    assert is_verified(known, None)
    assert not is_verified(known, record_of(index))
    assert is_verified(compared, record_of(index))
    assert not is_verified(compared, record_of(index, rows=1))


def test_rows_of_an_earlier_index_are_told_from_rows_made_of_two(write_tar: WriteTar) -> None:
    """Bytes from the middle of one row to the middle of the next are gone: what is left is a tar with a new row."""
    path = write_tar("s.tar", [(f"{n}.txt", b"%d" % n * 600) for n in range(5)])
    before, data = index_of(path), path.read_bytes()
    path.write_bytes(data[:2200] + data[2200 + 1536 :])
    index = index_of(path)
    assert (index.num_rows, index.damage) == (4, ())
    left = without_new_rows("s.tar", index, before, Path("cached"))
    assert left is not None
    (damage,) = left.damage
    assert [left.key(row) for row in range(left.num_rows)] == ["0", "3", "4"]
    assert (damage.kind, damage.bytes_lost, damage.rows_lost) == (OTHER_BYTES, 1536, 2)
    assert "has lost 1536 bytes since it was indexed" in str(damage)
    assert "remove its cached index cached and open the shards again" in str(damage)


def test_rows_that_are_added_over_the_padding_are_no_damage(write_tar: WriteTar) -> None:
    before = index_of(write_tar("s.tar", [(f"{n}.txt", b"x") for n in range(3)]))
    more = index_of(write_tar("s.tar", [(f"{n}.txt", b"x") for n in range(5)]))
    others = index_of(write_tar("s.tar", [(f"{n}.txt", b"y") for n in range(5)]))
    assert without_new_rows("s.tar", more, before, Path("cached")) is None
    left = without_new_rows("s.tar", others, before, Path("cached"))
    assert left is not None
    assert (left.num_rows, left.damage[0].rows_lost, left.damage[0].bytes_lost) == (0, 3, 0)
    assert "lacks rows that it had since it was indexed" in str(left.damage[0])


@pytest.mark.parametrize("change", [{}, {"rows": 9}, {"bytes": 9}, {"sha256": "0" * 64}])
@pytest.mark.parametrize("has_sha256", [True, False])
def test_consecutive_shards_are_verified_if_each_one_is(change: dict[str, Any], has_sha256: bool) -> None:
    digests = [f"{number:064x}" for number in range(3)]
    overview, shards = Overview(3), []
    for number, sha256 in enumerate(digests):
        version = ShardVersion(size=100 + number, tag="1", changed="1")
        known = has_sha256 or number != 1
        shards.append(
            KnownShard(
                version=version,
                rows=number,
                inventory="[[]]",
                checksum=bytes(32),
                sha256=sha256 if known else None,
            )
        )
        overview.add(number, shards[-1])
    found = overview.find_all(0, [shard.version.facts for shard in shards])
    assert found is not None
    records: list[ShardRecord | None] = [
        ShardRecord(path="a.tar", rows=number, bytes=100 + number, sha256=sha256)
        for number, sha256 in enumerate(digests)
    ]
    records[0] = None
    assert records[1] is not None
    records[1] = replace(records[1], **change)
    expected = all(is_verified(shard, record) for shard, record in zip(shards, records, strict=True))
    assert are_verified(found, records) is expected
    assert expected is (has_sha256 and not change)
    assert are_verified(found, [None] * 3)
