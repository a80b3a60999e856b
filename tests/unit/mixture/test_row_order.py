"""The order of rows: each once in an epoch, near each other in the shards, and the same whatever is around a domain."""

from __future__ import annotations

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.row_order import RowOrders

SHARDS = np.array([5, 0, 3, 8])
EPOCH = int(SHARDS.sum())
ROWS = sorted((shard, row) for shard, count in enumerate(SHARDS.tolist()) for row in range(count))


def rows_of(order: RowOrders, first: int, count: int, domain: int = 0) -> list[tuple[int, int]]:
    """(shard, row) of consecutive draws of a domain."""
    shard, row = order.locate(np.full(count, domain), np.arange(first, first + count))
    return list(zip(shard.tolist(), row.tolist(), strict=True))


def test_an_epoch_gives_each_row_once_and_the_next_in_another_order():
    order = RowOrders(0, ["source/web"], [SHARDS], window=4)
    epochs = [rows_of(order, number * EPOCH, EPOCH) for number in range(3)]
    assert all(sorted(rows) == ROWS for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 3


def test_the_epochs_of_one_shard_differ_too():
    order = RowOrders(0, ["source/web"], [np.array([12])], window=12)
    assert sorted(rows_of(order, 0, 12)) == sorted(rows_of(order, 12, 12))
    assert rows_of(order, 0, 12) != rows_of(order, 12, 12)


def test_a_window_of_one_row_keeps_the_rows_of_each_shard_in_their_order():
    rows = rows_of(RowOrders(0, ["source/web"], [SHARDS], window=1), 0, EPOCH)
    for shard, count in enumerate(SHARDS.tolist()):
        assert [row for at, row in rows if at == shard] == list(range(count))
    assert len(set(rows)) == EPOCH


def test_a_window_reads_from_few_shards_at_a_time():
    """Catches a shuffle over the whole domain, for which every row is a seek in another shard."""
    order = RowOrders(0, ["source/web"], [np.full(20, 10)], window=10)
    rows = rows_of(order, 0, 200)
    for first in range(0, 200, 10):
        assert len({shard for shard, _ in rows[first : first + 10]}) == 1


def test_a_domain_does_not_change_its_order_with_the_domains_around_it():
    """A run goes on with the same rows after a domain was added."""
    alone = RowOrders(3, ["source/web"], [SHARDS], window=4)
    among = RowOrders(3, ["source/books", "source/web", "target/math"], [np.array([7]), SHARDS, np.array([2, 2])], 4)
    assert rows_of(among, 0, 3 * EPOCH, domain=1) == rows_of(alone, 0, 3 * EPOCH)


def test_domains_and_seeds_have_orders_of_their_own():
    names = ["source/web", "source/books"]
    order, other = (RowOrders(seed, names, [SHARDS, SHARDS], window=4) for seed in (0, 1))
    assert len({tuple(rows_of(its, 0, EPOCH, domain)) for its in (order, other) for domain in (0, 1)}) == 4


def test_draws_of_many_domains_and_epochs_come_in_one_call():
    """Catches a look-up in the shard order of another epoch: each domain is in an epoch of its own."""
    order = RowOrders(0, ["source/web", "target/math"], [SHARDS, np.array([2, 9])], window=4)
    domain = np.array([0, 1, 0, 1, 0])
    draw = np.array([40, 3, 0, 25, 17])
    together = order.locate(domain, draw)
    alone = [
        RowOrders(0, ["source/web", "target/math"], [SHARDS, np.array([2, 9])], window=4).locate(
            domain[i : i + 1], draw[i : i + 1]
        )
        for i in range(5)
    ]
    assert together[0].tolist() == [shard[0] for shard, _ in alone]
    assert together[1].tolist() == [row[0] for _, row in alone]
    again = order.locate(domain, draw)
    assert (again[0] == together[0]).all()
    assert (again[1] == together[1]).all()


def test_a_window_without_rows_is_refused():
    with pytest.raises(ConfigurationError, match="shuffle window is 0; it must be at least 1 row"):
        RowOrders(0, ["source/web"], [SHARDS], window=0)


def test_rows_are_counted_by_domain():
    assert RowOrders(0, ["source/web", "target/math"], [SHARDS, np.array([2])]).num_rows.tolist() == [EPOCH, 2]
