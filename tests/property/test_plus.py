"""Laws of `dmagent-plus` on any run: reordering, renaming, splitting and merging domains."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dmagent_loader.agent.plus.network import PlusNetwork
from dmagent_loader.agent.plus.observation import Facts, Moment
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.influence import Influence, scores_from
from dmagent_loader.mixture.length import RunLength
from dmagent_loader.policies import PlusPolicy

FIELDS = ("keep", "acquire")
BY_DOMAIN = ("prior", "natural", "fields", "influence", "error", "topics", "exposure", "passes", "final_passes")
BY_DOMAIN += ("rows_left",)
SHARED = ("prior", "natural", "exposure")
"""Values of a domain that its parts share out; all others are those of each part."""


def network(seed: int) -> PlusNetwork:
    plain = PlusNetwork.untrained(seed)
    return plain.with_vector(plain.vector() + 0.4 * np.random.default_rng(seed).normal(size=len(plain.vector())))


@st.composite
def runs(draw: st.DrawFn) -> tuple[PlusNetwork, Facts, Moment]:
    """Any network and observation with 1 to 3 fields of the data."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    num_fields = draw(st.integers(1, 3))
    domains = draw(st.integers(num_fields, 12))
    owner = np.concatenate([np.arange(num_fields), rng.integers(num_fields, size=domains - num_fields)])
    zeros = rng.random(domains) < 0.2 * draw(st.booleans())
    zeros[:num_fields] = False
    natural = np.where(zeros, 0.0, rng.dirichlet(np.ones(domains)))
    prior = np.where(zeros, 0.0, rng.dirichlet(np.ones(domains)))
    facts = Facts(
        prior=prior / prior.sum(),
        natural=natural / natural.sum(),
        fields=(owner == np.arange(num_fields)[:, None]).astype(float),
        acquires=(np.arange(num_fields) == num_fields - 1).astype(float),
        influence=rng.normal(size=(2, domains)),
        error=rng.random((2, domains)),
        across=rng.normal(size=(2, num_fields)),
        reliability=rng.random(2),
        measured=np.array(1.0),
        topics=rng.normal(size=domains),
        topics_known=np.array(1.0),
    )
    moment = Moment(
        exposure=rng.dirichlet(np.ones(domains)) * draw(st.sampled_from([0.0, 1.0])),
        gains=rng.normal(size=(3, 2)) * 0.2,
        progress=rng.random(),
        progress_known=np.array(1.0),
        age=rng.random(),
        passes=rng.random(domains) * 5,
        final_passes=rng.random(domains) * 5,
        rows_left=rng.random(domains),
        learning_rate=rng.random(),
        learning_rate_known=np.array(1.0),
        balance=rng.random(),
    )
    return network(draw(st.integers(0, 5))), facts, moment


def chosen(value, index, divisor=None):
    """An observation with the domains of `index`, some of whose shares are divided."""
    changes = {}
    for entry in fields(value):
        if entry.name in BY_DOMAIN:
            found = getattr(value, entry.name)[..., index]
            changes[entry.name] = found / divisor if divisor is not None and entry.name in SHARED else found
    return replace(value, **changes)


@given(run=runs(), seed=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_reordering_the_domains_reorders_the_mix(run, seed: int) -> None:
    net, facts, moment = run
    order = np.random.default_rng(seed).permutation(len(facts.prior))
    mix = net.mix(chosen(facts, order), chosen(moment, order))
    assert np.allclose(mix, net.mix(facts, moment)[order], atol=1e-12)


@given(run=runs(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_parts_of_a_split_domain_share_its_weight_and_no_other_weight_moves(run, data) -> None:
    """Read backwards it is the law of merging: parts that look alike may be merged without effect."""
    net, facts, moment = run
    counts = np.array(data.draw(st.lists(st.integers(1, 4), min_size=len(facts.prior), max_size=len(facts.prior))))
    index = np.repeat(np.arange(len(counts)), counts)
    mix = net.mix(chosen(facts, index, counts[index]), chosen(moment, index, counts[index]))
    merged = np.bincount(index, weights=mix, minlength=len(counts))
    assert np.allclose(merged, net.mix(facts, moment), atol=1e-9)


@given(run=runs())
@settings(max_examples=200, deadline=None)
def test_the_mix_is_a_mix_and_no_weight_moves_further_than_the_limits(run) -> None:
    net, facts, moment = run
    mix = net.mix(facts, moment)
    assert np.isfinite(mix).all()
    assert (mix >= 0).all()
    assert abs(mix.sum() - 1) < 1e-9
    assert (mix[facts.prior == 0] == 0).all()
    plain = PlusNetwork.untrained(0).mix(facts, replace(moment, balance=np.array(0.5)))
    assert plain.tolist() == facts.prior.tolist()


@given(seed=st.integers(0, 10_000), domains=st.integers(2, 30))
@settings(max_examples=60, deadline=None)
def test_names_and_order_have_no_effect_on_the_policy(seed: int, domains: int) -> None:
    """The whole policy, with its influence policy, on domains without topics."""
    rng = np.random.default_rng(seed)
    targets = 1 + rng.integers(domains - 1)
    owner = ["source"] * (domains - targets) + ["target"] * targets
    natural, values = rng.dirichlet(np.ones(domains)), rng.normal(size=(2, domains))
    errors, mixes = rng.random((2, domains)), rng.dirichlet(np.ones(domains), 6)
    feedback, rows = rng.normal(size=(6, 2)), rng.integers(1, 1000, domains)

    def proposed(order: np.ndarray, prefix: str) -> np.ndarray:
        names = [f"{prefix}{i}" for i in range(domains)]
        space = DomainSpace.from_names(names, fields={n: owner[o] for n, o in zip(names, order, strict=True)})
        policy = PlusPolicy(network(seed % 7), space, natural[order])
        policy.needed(0)
        scores = scores_from(FIELDS, names, values[:, order], errors[:, order])
        policy.inform("influence", Influence(scores=scores, way="gradient"))
        run = RunLength(rows=rows[order], repeats=np.full(domains, True), limit=5000, ending=(), interval=100)
        policy.inform("length", run)
        past = History(domains=tuple(names), fields=FIELDS, mixes=mixes[:, order], feedback=feedback)
        return policy.propose(past)

    order = rng.permutation(domains)
    assert np.allclose(proposed(np.arange(domains), "d")[order], proposed(order, "other name "), atol=1e-6)
