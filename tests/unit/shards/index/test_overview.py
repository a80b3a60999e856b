"""What an overview knows of many shards at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dmagent_loader.shards.index.overview import KnownShard, Overview
from dmagent_loader.shards.sources.local import ShardVersion

SHARDS = 6
VERSIONS = [ShardVersion(size=10 + number, tag=f"t{number}", changed=f"c{number}") for number in range(SHARDS)]
START, END = 1, 5


def overview(unknown: int | None = None) -> Overview:
    """An overview of all shards but one."""
    made = Overview(SHARDS)
    for number, version in enumerate(VERSIONS):
        if number != unknown:
            made.add(
                number,
                KnownShard(
                    version=version,
                    rows=number,
                    inventory='[["txt"]]' if number % 2 else '[["npy"]]',
                    checksum=bytes([number]) * 32,
                    sha256=None,
                ),
            )
    return made


def test_consecutive_shards_are_those_that_are_found_one_by_one() -> None:
    known = overview()
    found = known.find_all(START, [version.facts for version in VERSIONS[START:END]])
    assert found is not None
    for place, number in enumerate(range(START, END)):
        one = known.find(number, VERSIONS[number])
        assert one is not None
        assert (found.rows[place], found.inventories[place]) == (one.rows, one.inventory)
        assert found.checksums[place].tobytes() == one.checksum
    assert len(found.rows) == END - START


@pytest.mark.parametrize("number", range(START, END))
@pytest.mark.parametrize("change", [{"size": 99}, {"tag": "other"}, {"changed": "other"}, {"is_sure": False}])
def test_one_shard_that_may_have_changed_is_not_taken_with_the_others(number: int, change: dict[str, object]) -> None:
    """Each fact of a version decides, as for a single shard."""
    versions = list(VERSIONS)
    versions[number] = replace(versions[number], **change)  # type: ignore[arg-type]
    known = overview()
    assert known.find(number, versions[number]) is None
    assert known.find_all(START, [version.facts for version in versions[START:END]]) is None


def test_an_unknown_shard_is_not_taken_with_the_others() -> None:
    versions = [replace(version, size=0, tag="", changed="") for version in VERSIONS]
    for number in range(START, END):
        facts = [version.facts for version in VERSIONS]
        facts[number] = versions[number].facts  # as the empty entry of the overview
        assert overview(unknown=number).find_all(START, facts[START:END]) is None
    assert np.all(overview(unknown=0).find_all(START, [v.facts for v in VERSIONS[START:END]]).rows == range(1, 5))  # type: ignore[union-attr]
