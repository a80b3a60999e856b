"""Rows that are looked up ahead are those that the plan names, whatever mixes and ranks read them."""

from __future__ import annotations

import numpy as np
import pytest

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
        found, positions = ahead.find(*plan.draws(indices))
        expected = plan.locate(indices)
        assert positions is None
        for name, column in vars(expected).items():
            assert np.array_equal(getattr(found, name), column), name


def test_rows_survive_a_change_of_the_mix():
    plan = changing_plan(60, 50)
    ahead = RowsAhead(plan, None)
    for first in range(0, 3000, 50):
        ahead.find(*plan.draws(np.arange(first, first + 64)))
    assert plan.asked <= 10


def test_a_run_that_goes_back_finds_its_rows():
    plan = changing_plan(20, 50)
    ahead = RowsAhead(plan, None)
    for first in (0, 500, 100, 900, 0):
        indices = np.arange(first, first + 40)
        found, _ = ahead.find(*plan.draws(indices))
        assert np.array_equal(found.row, plan.locate(indices).row)
