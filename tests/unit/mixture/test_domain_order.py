"""The order of domains under one mix: its shares at every moment, random access, and claims that are carried on."""

from __future__ import annotations

import numpy as np
import pytest

from dmagent_loader.mixture.domain_order import DomainOrder, in_quanta
from dmagent_loader.mixture.mix_tree import DISCREPANCY, RESOLUTION

MIX = np.array([0.6, 0.0, 0.3, 0.1])


def test_weights_in_quanta_sum_exactly_and_are_off_by_less_than_one():
    for mix in (MIX, np.full(7, 1 / 7), np.array([1.0 - 1e-12, 1e-12]), np.array([1.0])):
        quanta = in_quanta(mix)
        assert quanta.sum() == RESOLUTION
        assert np.abs(quanta - mix * RESOLUTION).max() < 1


def test_every_moment_has_the_shares_of_the_mix():
    """Catches independent draws, which are off by the square root of their number."""
    domains, _ = DomainOrder(in_quanta(MIX), key=1).locate(np.arange(2000))
    counts = np.cumsum(domains[:, None] == np.arange(len(MIX)), axis=0)
    off = np.abs(counts - np.arange(1, 2001)[:, None] * MIX)
    assert off.max() <= DISCREPANCY + 0.25


def test_the_order_and_the_counts_agree():
    order = DomainOrder(in_quanta(MIX), key=1)
    domains, before = order.locate(np.arange(300))
    for number in (0, 1, 2, 17, 299):
        counts = order.counts(number)
        assert counts.tolist() == np.bincount(domains[:number], minlength=4).tolist()
        assert before[number] == counts[domains[number]]


def test_samples_are_found_far_out_and_in_any_order():
    order = DomainOrder(in_quanta(MIX), key=1)
    far = 10**12
    samples = np.array([far + 2, 5, far, far + 1])
    domains, before = order.locate(samples)
    for sample, domain, rank in zip(samples.tolist(), domains, before, strict=True):
        assert order.counts(sample)[domain] == rank
        assert order.counts(sample + 1)[domain] == rank + 1


@pytest.mark.parametrize(("domains", "debt"), [(40, 1), (40, 300), (700, 1)])
def test_a_range_has_the_samples_that_are_found_one_by_one(domains, debt):
    """With large debts, a domain gets many more samples in a range than its share."""
    generator = np.random.default_rng(0)
    owed = generator.integers(-debt * RESOLUTION, debt * RESOLUTION, domains)
    quanta = in_quanta(generator.dirichlet(np.ones(domains)))
    order = DomainOrder(quanta, key=1, carry=owed - int(owed.mean()))
    for first in (0, 400, 10**6):
        samples = np.arange(first, first + 400)
        far_apart = DomainOrder(quanta, key=1, carry=owed - int(owed.mean())).locate(np.append(samples, 10**12))
        for found, expected in zip(order.locate(samples), far_apart, strict=True):
            assert found.tolist() == expected[:-1].tolist()


def test_counts_are_the_callers_to_change():
    order = DomainOrder(in_quanta(MIX), key=1)
    order.counts(100)[:] = 0
    assert order.counts(100).sum() == 100


@pytest.mark.parametrize("mix", [[1.0], [0.0, 1.0, 0.0]])
def test_one_domain_with_weight_gives_every_sample(mix):
    order = DomainOrder(in_quanta(np.array(mix)), key=1)
    domains, before = order.locate(np.arange(5, 9))
    assert set(domains.tolist()) == {mix.index(1.0)}
    assert before.tolist() == [5, 6, 7, 8]
    assert order.counts(9)[mix.index(1.0)] == order.counts(9).sum() == 9


def test_another_key_gives_another_order_with_the_same_shares():
    """Catches a fixed pattern: an even mix of two domains on two ranks would give each rank one of them."""
    quanta = in_quanta(np.array([0.5, 0.5]))
    orders = [DomainOrder(quanta, key).locate(np.arange(64))[0] for key in range(8)]
    assert len({tuple(order.tolist()) for order in orders}) == 8
    for order in orders:
        assert 0 < order[::2].sum() < 32


def test_what_is_owed_is_share_times_samples_less_what_was_given():
    quanta = in_quanta(MIX)
    order = DomainOrder(quanta, key=1)
    for number in (0, 1, 7, 1000, 3 * RESOLUTION + 5):
        counts, owed = order.counts_and_owed(number)
        assert [int(o) for o in owed] == [
            number * int(q) - int(c) * RESOLUTION for q, c in zip(quanta, counts, strict=True)
        ]
        assert owed.sum() == 0


def test_a_domain_that_is_owed_a_sample_gets_it_first():
    """Catches an order that begins anew at each change of the mix: a rare domain would never get a sample."""
    rare = in_quanta(np.array([0.99, 0.01]))
    first = [
        int(np.flatnonzero(DomainOrder(rare, key, carry).locate(np.arange(400))[0] == 1)[0])
        for key in range(5)
        for carry in (None, np.array([-1, 1]) * (RESOLUTION * 9 // 10))
    ]
    without, owed = first[::2], first[1::2]
    assert all(with_claim <= none for with_claim, none in zip(owed, without, strict=True))
    assert max(owed) < 10 < max(without)


def test_a_domain_without_weight_keeps_its_claim_and_gets_nothing():
    carry = np.array([0, RESOLUTION // 2, 0, -(RESOLUTION // 2)])
    order = DomainOrder(in_quanta(MIX), key=1, carry=carry)
    counts, owed = order.counts_and_owed(1000)
    assert counts[1] == 0
    assert owed[1] == RESOLUTION // 2
    assert owed.sum() == 0
