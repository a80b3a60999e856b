"""The order of rows: each once in an epoch, near each other in the shards, and the same whatever is around a domain."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.row_order import RowOrders
from dmagent_loader.mixture.shuffle import Shuffle, shared_shuffle

SHARDS = np.array([5, 0, 3, 8])
EPOCH = int(SHARDS.sum())
ROWS = sorted((shard, row) for shard, count in enumerate(SHARDS.tolist()) for row in range(count))


def rows_of(order: RowOrders, first: int, count: int, domain: int = 0) -> list[tuple[int, int]]:
    """(shard, row) of consecutive draws of a domain."""
    shard, row = order.locate(np.full(count, domain), np.arange(first, first + count))
    return list(zip(shard.tolist(), row.tolist(), strict=True))


def test_an_epoch_gives_each_row_once_and_the_next_in_another_order():
    order = RowOrders(0, ["source/web"], [SHARDS], Shuffle(window=4, shards=2))
    epochs = [rows_of(order, number * EPOCH, EPOCH) for number in range(3)]
    assert all(sorted(rows) == ROWS for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 3


def test_the_epochs_of_one_shard_differ_too():
    order = RowOrders(0, ["source/web"], [np.array([12])], Shuffle(window=12))
    assert sorted(rows_of(order, 0, 12)) == sorted(rows_of(order, 12, 12))
    assert rows_of(order, 0, 12) != rows_of(order, 12, 12)


def test_a_window_of_one_row_keeps_the_rows_of_each_shard_in_their_order():
    rows = rows_of(RowOrders(0, ["source/web"], [SHARDS], Shuffle(window=1)), 0, EPOCH)
    for shard, count in enumerate(SHARDS.tolist()):
        assert [row for at, row in rows if at == shard] == list(range(count))
    assert len(set(rows)) == EPOCH


def test_a_window_reads_from_few_shards_at_a_time():
    """Catches a shuffle over the whole domain, for which every row is a seek in another shard."""
    order = RowOrders(0, ["source/web"], [np.full(20, 10)], Shuffle(window=10, shards=1))
    rows = rows_of(order, 0, 200)
    for first in range(0, 200, 10):
        assert len({shard for shard, _ in rows[first : first + 10]}) == 1


def test_the_rows_of_a_window_come_from_as_many_shards_as_chosen():
    """Catches a shuffle that reads one shard after the other: a large shard would fill thousands of samples."""
    order = RowOrders(0, ["source/web"], [np.full(20, 1000)], Shuffle(window=100, shards=5))
    rows = rows_of(order, 0, 20_000)
    for first in range(0, 20_000, 100):
        window = rows[first : first + 100]
        assert 5 <= len({(shard, row // 40) for shard, row in window}) <= 15, "neighbouring rows, in five places"
        shards = Counter(shard for shard, _ in window)
        assert len(shards) >= 5
        assert max(shards.values()) == 20


def test_one_large_shard_is_read_in_several_places():
    rows = [row for _, row in rows_of(RowOrders(0, ["source/web"], [np.array([8000])], Shuffle(80, 8)), 0, 80)]
    assert {row // 1000 for row in rows} == set(range(8))


def test_small_shards_fill_a_window_together():
    order = RowOrders(0, ["source/web"], [np.full(100, 5)], Shuffle(window=200, shards=4))
    assert 40 <= len({shard for shard, _ in rows_of(order, 0, 200)}) <= 80


def test_every_lane_gives_one_row_in_each_turn_and_its_own_rows_in_every_pass():
    """Catches lanes that drift apart, and passes in which a node would have to fetch other shards."""
    order = RowOrders(0, ["source/web"], [np.full(10, 100)], Shuffle(window=50, shards=5))
    domain, draws = np.zeros(3000, dtype=np.int64), np.arange(3000)
    lane = order.lane(domain, draws)
    assert all(sorted(turn) == [0, 1, 2, 3, 4] for turn in lane.reshape(-1, 5).tolist())
    shard, _ = order.locate(domain, draws)
    assert {int(s): {int(x) for x in lane[shard == s]} for s in range(10)} == {
        int(s): {int(lane[shard == s][0])} for s in range(10)
    }
    for number in range(3):
        rows = np.bincount(lane[1000 * number :][:1000])
        assert rows.tolist() == [200] * 5


@pytest.mark.parametrize("total", [1, 2, 9, 10, 11, 39, 40, 41, 79, 80, 99, 100, 101, 119, 120, 121, 159, 163])
def test_ranges_windows_and_tiles_of_any_length_hold_each_row_once(total):
    """Catches a last range, a last window or a last tile that is a row too long or too short."""
    for window, shards in ((1, 1), (1, 5), (10, 1), (10, 3), (10, 10), (10, 50), (12, 5), (200, 3)):
        rows = np.array([total // 2, total - total // 2])
        order = RowOrders(0, ["source/web"], [rows], Shuffle(window, shards))
        assert sorted(rows_of(order, 0, total)) == [(s, r) for s, n in enumerate(rows.tolist()) for r in range(n)]


def test_a_domain_does_not_change_its_order_with_the_domains_around_it():
    """A run goes on with the same rows after a domain was added."""
    alone = RowOrders(3, ["source/web"], [SHARDS], Shuffle(window=4, shards=2))
    shards, shuffle = [np.array([7]), SHARDS, np.array([2, 2])], Shuffle(window=4, shards=2)
    among = RowOrders(3, ["source/books", "source/web", "target/math"], shards, shuffle)
    assert rows_of(among, 0, 3 * EPOCH, domain=1) == rows_of(alone, 0, 3 * EPOCH)


def test_domains_and_seeds_have_orders_of_their_own():
    names = ["source/web", "source/books"]
    order, other = (RowOrders(seed, names, [SHARDS, SHARDS], Shuffle(window=4, shards=2)) for seed in (0, 1))
    assert len({tuple(rows_of(its, 0, EPOCH, domain)) for its in (order, other) for domain in (0, 1)}) == 4


def test_draws_of_many_domains_and_epochs_come_in_one_call():
    """Catches a look-up in the shard order of another epoch: each domain is in an epoch of its own."""
    order = RowOrders(0, ["source/web", "target/math"], [SHARDS, np.array([2, 9])], Shuffle(window=4, shards=2))
    domain = np.array([0, 1, 0, 1, 0])
    draw = np.array([40, 3, 0, 25, 17])
    together = order.locate(domain, draw)
    alone = [
        RowOrders(0, ["source/web", "target/math"], [SHARDS, np.array([2, 9])], Shuffle(window=4, shards=2)).locate(
            domain[i : i + 1], draw[i : i + 1]
        )
        for i in range(5)
    ]
    assert together[0].tolist() == [shard[0] for shard, _ in alone]
    assert together[1].tolist() == [row[0] for _, row in alone]
    again = order.locate(domain, draw)
    assert (again[0] == together[0]).all()
    assert (again[1] == together[1]).all()


def test_a_window_without_rows_or_shards_is_refused():
    with pytest.raises(ConfigurationError, match="shuffle window is 0; it must be at least 1 row"):
        Shuffle(window=0)
    with pytest.raises(ConfigurationError, match="the shuffle has 0 shards; it must have at least 1"):
        Shuffle(shards=0)


def test_rows_are_counted_by_domain():
    assert RowOrders(0, ["source/web", "target/math"], [SHARDS, np.array([2])]).num_rows.tolist() == [EPOCH, 2]


@pytest.mark.parametrize(
    ("domains", "shards", "rows", "expected"),
    [
        (1, 100, 100_000, Shuffle(window=65_536, shards=64)),
        (1, 1000, 250, Shuffle(window=16_000, shards=1)),
        (2, 100, 10_000, Shuffle(window=32_768, shards=29)),
        (8, 64, 10_000, Shuffle(window=8192, shards=8)),
        (8, 1000, 250, Shuffle(window=8192, shards=1)),
        (1000, 10, 10_000, Shuffle(window=8192, shards=1)),
    ],
)
def test_domains_share_the_rows_and_shards_of_the_shuffle(domains, shards, rows, expected):
    """Catches a default with which many domains have more shards in use than a process can keep open."""
    shard_rows = [np.append(np.full(shards, rows), 0)] * domains
    assert shared_shuffle(shard_rows) == expected
    in_use, before = (its.shards + its.window / rows for its in (expected, Shuffle(window=8192, shards=1)))
    assert domains * in_use <= max(64, domains * before) + domains


def test_a_chosen_shuffle_is_not_shared_out():
    shard_rows = [np.full(10, 1000)] * 8
    assert shared_shuffle(shard_rows, window=5, shards=3) == Shuffle(window=5, shards=3)
    assert shared_shuffle(shard_rows, window=1024) == Shuffle(window=1024, shards=7)
    assert shared_shuffle(shard_rows, shards=64) == Shuffle(window=8192, shards=64)
