"""Rows read in the background are the rows of the shards, and an error comes with the row that has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dmagent_loader import ReadingConfig
from dmagent_loader._loading.readahead import Readahead
from dmagent_loader.errors import DamagedShardError
from dmagent_loader.mixture.segment import Located
from dmagent_loader.shards import ShardCollection
from dmagent_loader.testing import write_toy_shards

ROWS = {"source/web": 40, "target/math": 24}
NUM_ROWS = 8


@pytest.fixture
def collection(tmp_path: Path) -> ShardCollection:
    shards = write_toy_shards(tmp_path / "shards", ROWS)
    return ShardCollection.open(shards, cache_dir=tmp_path / "cache", progress=False)


@pytest.fixture
def ahead(collection: ShardCollection) -> Iterator[Readahead]:
    reader = Readahead(collection, num_threads=2, num_rows=NUM_ROWS)
    yield reader
    reader.close()


def located(*rows: tuple[int, int, int, int]) -> Located:
    """(domain, draw, shard, row) of each sample."""
    return Located(*np.array(rows, dtype=np.int64).T)


def test_rows_are_those_of_the_shards_in_whatever_order_they_are_taken(collection, ahead):
    """Catches rows of a task that are handed out by their place in the request rather than in the task."""
    rows = [(n % 2, n, n % 2, n % 7) for n in range(4 * NUM_ROWS)]
    ahead.request(located(*rows))
    for domain, draw, shard, row in reversed(rows):
        assert ahead.take(domain, draw, shard, row) == collection.read(domain, shard, row)


def test_a_row_that_was_not_requested_is_read_now(collection, ahead):
    assert ahead.take(1, 0, 1, 3) == collection.read(1, 1, 3)


def test_rows_of_a_dropped_plan_are_kept_and_not_read_again(collection, ahead, monkeypatch):
    """A domain's rows come in the same order under any mix: those read under the old one are used under the new."""
    reads: list[tuple[int, int, int]] = []
    read = collection.read
    monkeypatch.setattr(collection, "read", lambda *row: reads.append(row) or read(*row))
    ahead.request(located((0, 0, 0, 0), (0, 1, 0, 1)))
    ahead.request(located((0, 1, 0, 1), (1, 0, 0, 0)))
    taken = [ahead.take(*row) for row in ((0, 0, 0, 0), (0, 1, 0, 1), (1, 0, 0, 0))]
    assert taken == [read(*row) for row in ((0, 0, 0), (0, 0, 1), (1, 0, 0))]
    assert sorted(reads) == [(0, 0, 0), (0, 0, 1), (1, 0, 0)]


def test_rows_that_nobody_takes_do_not_pile_up(ahead):
    for draw in range(40 * NUM_ROWS):
        ahead.request(located((0, draw, 0, draw % 16)))
        assert len(ahead._pending) <= 4 * NUM_ROWS + 1


def test_an_error_in_the_background_comes_where_its_row_is_taken(collection, ahead):
    path = Path(collection.display(0, 1))
    path.write_bytes(path.read_bytes()[:512])
    rows = [(0, 0, 0, 0), (0, 1, 1, 5), (1, 0, 0, 0)]
    ahead.request(located(*rows))
    assert ahead.take(*rows[0]) == collection.read(0, 0, 0)
    with pytest.raises(DamagedShardError, match=path.name):
        ahead.take(*rows[1])
    assert ahead.take(*rows[2]) == collection.read(1, 0, 0)


@pytest.mark.parametrize(("threads", "is_used"), [(0, False), (3, True)])
def test_rows_are_read_by_threads_only_if_these_are_asked_for(collection, threads, is_used):
    found = Readahead.configured(collection, ReadingConfig(num_threads=threads, num_rows=5))
    assert (found is not None) == is_used
    if found is not None:
        assert found.num_rows == 5
        found.close()
