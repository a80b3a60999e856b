"""Laws of the map between a user's domains and the canonical ones, of rounding, and of standardising."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dmagent_loader.mixture.domains import CANONICAL_TOPICS, Domain, DomainMap, DomainSpace
from dmagent_loader.mixture.history import FeedbackStatistics, standardize
from dmagent_loader.mixture.simplex import (
    FloatArray,
    js_divergence,
    kl_divergence,
    largest_remainder,
    total_variation,
    validate_mix,
)

weights = st.one_of(st.just(0.0), st.floats(1e-6, 1.0))


@st.composite
def mixes(draw: st.DrawFn, size: int) -> FloatArray:
    """Mixes with many zeros and weights over six orders of magnitude."""
    raw = draw(hnp.arrays(np.float64, size, elements=weights))
    assume(raw.sum() > 0)
    return np.asarray(raw / raw.sum())


@st.composite
def spaces(draw: st.DrawFn) -> DomainSpace:
    """One to five domains in each field, with sparse or missing compositions."""
    domains = []
    for field in ("source", "target"):
        for number in range(draw(st.integers(1, 5))):
            composition = None
            if draw(st.booleans()):
                mix = draw(mixes(26))
                composition = {topic: float(x) for topic, x in zip(CANONICAL_TOPICS, mix, strict=True) if x > 0}
            domains.append(Domain(name=f"{field}/{number}", field=field, composition=composition))
    return DomainSpace(tuple(draw(st.permutations(domains))))


@given(space=spaces(), data=st.data())
def test_mass_is_conserved_on_the_way_to_the_agent(space: DomainSpace, data: st.DataObject) -> None:
    mix = data.draw(mixes(len(space)))
    canonical = DomainMap(space).to_canonical(mix)
    assert canonical.min() >= 0
    assert canonical.sum() == pytest.approx(1.0, abs=1e-9)
    for field, part in (("source", canonical[:26]), ("target", canonical[26:])):
        assert part.sum() == pytest.approx(space.field_mass(mix)[field], abs=1e-9)


@given(space=spaces(), canonical=mixes(52), data=st.data())
def test_mass_is_conserved_on_the_way_back_and_stays_in_its_field(
    space: DomainSpace, canonical: FloatArray, data: st.DataObject
) -> None:
    """Normalising over both fields at once would move what is uncovered in one field into the other."""
    natural = data.draw(st.one_of(st.none(), mixes(len(space))))
    projection = DomainMap(space, natural=natural).to_user(canonical)
    assert projection.mix.min() >= 0
    assert projection.mix.sum() == pytest.approx(1.0, abs=1e-9)
    masses = space.field_mass(projection.mix)
    assert masses["source"] == pytest.approx(canonical[:26].sum(), abs=1e-9)
    assert masses["target"] == pytest.approx(canonical[26:].sum(), abs=1e-9)
    assert 0.0 <= projection.uncovered <= 1.0
    assert projection.kl >= 0.0


@given(canonical=mixes(52), natural=mixes(2))
def test_one_domain_per_field_gets_the_papers_sum(canonical: FloatArray, natural: FloatArray) -> None:
    space = DomainSpace.from_names(["source/web", "target/math"])
    mix = DomainMap(space, natural=natural).to_user(canonical).mix
    np.testing.assert_allclose(mix, [canonical[:26].sum(), canonical[26:].sum()], atol=1e-12)


@given(canonical=mixes(52), order=st.permutations(range(52)))
def test_the_canonical_domains_in_any_order_give_the_agents_mix_back(canonical: FloatArray, order: list[int]) -> None:
    space = DomainSpace(tuple(DomainSpace.canonical().domains[i] for i in order))
    mapping = DomainMap(space)
    projection = mapping.to_user(canonical)
    np.testing.assert_allclose(projection.mix, canonical[order], atol=1e-12)
    np.testing.assert_allclose(mapping.to_canonical(projection.mix), canonical, atol=1e-12)
    assert projection.uncovered == pytest.approx(0.0, abs=1e-12)
    assert projection.kl == pytest.approx(0.0, abs=1e-9)


@given(space=spaces(), canonical=mixes(52), data=st.data())
def test_one_iteration_is_the_bayes_split_inside_each_field(
    space: DomainSpace, canonical: FloatArray, data: st.DataObject
) -> None:
    """P(u | c) proportional to p_u C_uc, applied to the covered weight and scaled to the field's mass."""
    natural = data.draw(hnp.arrays(np.float64, len(space), elements=st.floats(0.01, 1.0)))
    mapping = DomainMap(space, natural=natural, iterations=1)
    expected = np.zeros(len(space))
    for field, topics in (("source", slice(0, 26)), ("target", slice(26, 52))):
        members = list(space.members(field))
        joint = natural[members, None] * mapping.composition[members, topics]
        evidence = joint.sum(axis=0)
        split = np.divide(joint, evidence, out=np.zeros_like(joint), where=evidence > 0) @ canonical[topics]
        assume(split.sum() > 1e-9 or canonical[topics].sum() == 0)
        if split.sum() > 0:
            expected[members] = split / split.sum() * canonical[topics].sum()
    np.testing.assert_allclose(mapping.to_user(canonical).mix, expected, atol=1e-9)


@given(space=spaces(), canonical=mixes(52), iterations=st.integers(1, 60))
@settings(max_examples=50)
def test_every_iteration_comes_closer_to_the_agents_mix(
    space: DomainSpace, canonical: FloatArray, iterations: int
) -> None:
    """Expectation maximisation never raises KL(a || wC)."""
    before = DomainMap(space, iterations=iterations).to_user(canonical).kl
    after = DomainMap(space, iterations=iterations + 1).to_user(canonical).kl
    assert after <= before + 1e-9


@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_a_mix_that_the_users_domains_can_express_is_found(seed: int) -> None:
    """If a = w0 C, many iterations find w0. The Bayes split (one iteration) does not."""
    rng = np.random.default_rng(seed)
    names = [f"{field}/{i}" for field in ("source", "target") for i in range(3)]
    compositions: dict[str, Any] = {
        name: dict(zip(CANONICAL_TOPICS, rng.dirichlet(np.full(26, 0.2)), strict=True)) for name in names
    }
    space = DomainSpace.from_names(names, compositions=compositions)
    truth = rng.dirichlet(np.ones(6))
    mapping = DomainMap(space, iterations=3000)
    projection = mapping.to_user(mapping.to_canonical(truth))
    assert projection.kl < 1e-6
    assert total_variation(projection.mix, truth) < 2e-3


@given(data=st.data(), size=st.integers(1, 60))
def test_integer_shares_sum_exactly_and_are_off_by_about_one(data: st.DataObject, size: int) -> None:
    mix = data.draw(mixes(size))
    total = data.draw(st.integers(size, 100_000))
    counts = largest_remainder(mix, total)
    assert counts.sum() == total
    assert ((counts > 0) == (mix > 0)).all()
    starved = int(((mix > 0) & (mix * total < 1)).sum())
    assert (np.abs(counts - mix * total) < 1 + starved + 1e-6).all()


@given(p=mixes(7), q=mixes(7))
def test_divergences_keep_their_order(p: FloatArray, q: FloatArray) -> None:
    """0 <= JS <= log 2, symmetric; TV^2 <= KL / 2 (Pinsker)."""
    js = float(js_divergence(p, q))
    assert -1e-12 <= js <= np.log(2) + 1e-12
    assert js == pytest.approx(float(js_divergence(q, p)), abs=1e-12)
    assert kl_divergence(p, q) >= 2 * float(total_variation(p, q)) ** 2 - 1e-9


@given(weights=hnp.arrays(np.float64, 9, elements=st.floats(0, 1e300)))
def test_any_weights_can_be_renormalised(weights: FloatArray) -> None:
    assume(weights.max() > 1e-290)
    assert validate_mix(weights, [str(i) for i in range(9)], renormalize=True).sum() == pytest.approx(1.0)


feedback = hnp.arrays(np.float64, st.tuples(st.integers(2, 30), st.just(2)), elements=st.floats(-12, 0, width=32))
modes = st.sampled_from(["frozen", "running", "anchored"])


@given(feedback=feedback, mode=modes, cut=st.integers(1, 30))
def test_what_the_agent_saw_at_a_step_does_not_change_later(feedback: FloatArray, mode: Any, cut: int) -> None:
    """Fails if a row uses the mean or the spread of the whole run."""
    statistics = FeedbackStatistics(mean=(-5.0, -4.0), std=(0.1, 0.5), count=10)
    whole = standardize(feedback, statistics, mode)
    np.testing.assert_allclose(standardize(feedback[:cut], statistics, mode), whole[:cut], atol=1e-9)


@given(feedback=feedback, mode=st.sampled_from(["running", "anchored"]), shift=st.floats(-20, 20))
def test_the_level_of_another_model_does_not_matter_but_for_frozen(
    feedback: FloatArray, mode: Any, shift: float
) -> None:
    statistics = FeedbackStatistics(mean=(-5.0, -4.0), std=(0.1, 0.5), count=10)
    got, moved = standardize(feedback, statistics, mode), standardize(feedback + shift, statistics, mode)
    np.testing.assert_allclose(got, moved, atol=1e-6)
