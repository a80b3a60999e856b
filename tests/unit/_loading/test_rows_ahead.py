"""Rows that are looked up ahead are those that the plan names, whatever mixes and ranks read them."""

from __future__ import annotations

import numpy as np
import pytest

from dmagent_loader._loading import rows_ahead
from dmagent_loader._loading.rows_ahead import RowsAhead
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.ledger import LedgerEntry
from dmagent_loader.mixture.plan import Plan

DOMAINS = 7


class CountingPlan(Plan):
    """A plan that counts how often it is asked for rows."""

    asked = 0

    def rows(self, domain, draw):
        self.asked += 1
        return super().rows(domain, draw)


def changing_plan(changes: int, apart: int) -> CountingPlan:
    """A plan with another mix every few samples."""
    space = DomainSpace.from_names([f"source/{number}" for number in range(DOMAINS)])
    plan = CountingPlan(space, [np.array([90, 11 + number]) for number in range(DOMAINS)], seed=4)
    generator = np.random.default_rng(0)
    for number in range(changes):
        mix = generator.dirichlet(np.full(DOMAINS, 0.5))
        mix[number % DOMAINS] = 0
        start = number * apart
        plan.append(LedgerEntry(start=start, mix=tuple(mix / mix.sum()), decided_by="test", decided_at=start))
    return plan


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_rows_are_those_of_the_plan_under_any_mix(world_size):
    """With eight ranks, most rows between two own ones belong to others, and are not looked up."""
    plan = changing_plan(60, 50)
    ahead = RowsAhead(plan, None)
    for first in range(0, 3000, 50):
        indices = np.arange(first, first + 64)[world_size - 1 :: world_size]
        found, positions, blocks = ahead.find(*plan.draws(indices))
        expected = plan.locate(indices)
        assert positions is None
        assert blocks is None
        for name, column in vars(expected).items():
            assert np.array_equal(getattr(found, name), column), name


def test_rows_survive_a_change_of_the_mix():
    plan = changing_plan(60, 50)
    ahead = RowsAhead(plan, None)
    for first in range(0, 3000, 50):
        ahead.find(*plan.draws(np.arange(first, first + 64)))
    assert plan.asked <= 10


@pytest.mark.parametrize("world_size", [1, 8])
def test_runs_that_were_in_use_are_not_kept(world_size):
    """With eight ranks, each run is looked up on its own."""
    plan = changing_plan(1, 1)
    ahead = RowsAhead(plan, None, first_blocks)
    for first in range(0, 100_000, 1000):
        ahead.begin(ahead.find(*plan.draws(np.arange(first, first + 1000)[::world_size])).located)
    assert len(ahead._begun) < 50


def test_a_run_that_goes_back_finds_its_rows():
    plan = changing_plan(20, 50)
    ahead = RowsAhead(plan, None)
    for first in (0, 500, 100, 900, 0):
        indices = np.arange(first, first + 40)
        found = ahead.find(*plan.draws(indices))
        assert np.array_equal(found.located.row, plan.locate(indices).row)


def first_blocks(domain, shard, row):
    """Blocks of ten rows, and none for a local domain."""
    keys = np.where(domain == 3, -1, domain << 16 | shard << 8 | row // 10)
    return keys, keys


def two_blocks(domain, shard, row):
    """Rows of which some reach into the next block."""
    first, _ = first_blocks(domain, shard, row)
    return first, np.where(first < 0, -1, first + row % 2)


@pytest.mark.parametrize("blocks_of", [first_blocks, two_blocks])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_blocks_are_those_of_the_rows_while_runs_are_planned_ahead_and_dropped(world_size, blocks_of):
    """Each mix comes when one run of five is used up: the others are planned anew from there on."""
    plan = changing_plan(0, 1)
    generator, ahead = np.random.default_rng(1), RowsAhead(plan, None, blocks_of)
    for start in range(0, 4000, 40):
        mix = generator.dirichlet(np.full(DOMAINS, 0.5))
        plan.append(LedgerEntry(start=start, mix=tuple(mix), decided_by="test", decided_at=start))
        runs = []
        for first in range(start, start + 250, 50):
            indices = np.arange(first, first + 50)[world_size - 1 :: world_size]
            runs.append(ahead.find(*plan.draws(indices)))
            expected = plan.locate(indices)
            assert np.array_equal(runs[-1].located.row, expected.row)
            keys = blocks_of(expected.domain, expected.shard, expected.row)
            for numbers, column in zip(runs[-1].blocks.numbers, keys, strict=blocks_of is two_blocks):
                assert np.array_equal(runs[-1].blocks.keys[numbers], column)
        ahead.begin(runs[0].located)


def test_rows_that_are_planned_ahead_survive_a_change_of_the_mix():
    """All of the rows that a new mix takes from the plan of the old one are known."""
    plan = changing_plan(0, 1)
    generator, ahead = np.random.default_rng(1), RowsAhead(plan, None, first_blocks)
    for start in range(0, 4000, 40):
        mix = generator.dirichlet(np.full(DOMAINS, 5.0))
        plan.append(LedgerEntry(start=start, mix=tuple(mix), decided_by="test", decided_at=start))
        runs = [ahead.find(*plan.draws(np.arange(first, first + 50))) for first in range(start, start + 1000, 50)]
        ahead.begin(runs[0].located)
    assert plan.asked <= 15


def test_rows_and_blocks_of_the_past_are_forgotten(monkeypatch):
    monkeypatch.setattr(rows_ahead, "_MOST_AHEAD", 100)
    plan = changing_plan(1, 1)
    ahead = RowsAhead(plan, None, first_blocks)
    for first in range(0, 5000, 50):
        ahead.begin(ahead.find(*plan.draws(np.arange(first, first + 50))).located)
        assert len(ahead._table) <= 50 + 50 + 100 + 100 + 2 * DOMAINS
        assert len(ahead._keys) <= len(ahead._table)


def test_rows_of_domains_that_are_not_drawn_from_do_not_pile_up(monkeypatch):
    """Mixes that take turns among a thousand domains would otherwise keep thousands of rows of each."""
    monkeypatch.setattr(rows_ahead, "_MOST_KNOWN", 600)
    plan = changing_plan(0, 1)
    ahead = RowsAhead(plan, None, first_blocks)
    for turn in range(40):
        start, mix = 50 * turn, np.eye(DOMAINS)[turn % DOMAINS]
        plan.append(LedgerEntry(start=start, mix=tuple(mix), decided_by="test", decided_at=start))
        indices = np.arange(start, start + 200)
        found = ahead.find(*plan.draws(indices))
        assert np.array_equal(found.located.row, plan.locate(indices).row)
        ahead.begin(found.located)
        assert len(ahead._table) <= 600 + 200 + rows_ahead._MOST_AHEAD
    assert np.count_nonzero(ahead._length) < DOMAINS
