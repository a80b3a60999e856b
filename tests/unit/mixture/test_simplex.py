"""Arithmetic on distributions."""

from __future__ import annotations

import numpy as np
import pytest

from dmagent_loader.errors import DomainError, MixError
from dmagent_loader.mixture.simplex import (
    effective_domains,
    em_projection,
    js_divergence,
    kl_divergence,
    largest_remainder,
    total_variation,
    validate_mix,
)

NAMES = ("source/web", "source/books", "target/math")


def test_a_mapping_follows_the_order_of_the_names_and_fills_with_zero() -> None:
    assert validate_mix({"target/math": 0.75, "source/web": 0.25}, NAMES).tolist() == [0.25, 0.0, 0.75]


def test_rounding_is_divided_away_and_the_argument_is_not_changed() -> None:
    weights = np.array([0.5, 0.25, 0.2500001])
    mix = validate_mix(weights, NAMES)
    assert abs(mix.sum() - 1.0) < 1e-15
    assert weights[2] == 0.2500001


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"source/wev": 1.0}, DomainError, "unknown domains 'source/wev'"),
        ([0.5, 0.5], MixError, r"shape \(2,\), but there are 3"),
        ([0.5, 0.5, float("nan")], MixError, "not finite on 'target/math=nan'"),
        ([0.5, float("inf"), 0.5], MixError, "not finite on 'source/books=inf'"),
        ([1.5, -0.5, 0.0], MixError, "negative on 'source/books=-0.5'"),
        ([0.0, 0.0, 0.0], MixError, "all 3 weights are 0"),
        ([0.5, 0.2, 0.2], MixError, r"sums to 0\.9 over 3 domains"),
        ([0.5, 0.3, 0.2001], MixError, r"sums to 1\.0001"),
    ],
)
def test_what_is_no_mix_is_named(weights: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        validate_mix(weights, NAMES)  # type: ignore[arg-type]


def test_counts_and_huge_weights_can_be_renormalised() -> None:
    assert validate_mix([30, 10, 0], NAMES, renormalize=True).tolist() == [0.75, 0.25, 0.0]
    np.testing.assert_allclose(validate_mix([1e308, 1e308, 1e308], NAMES, renormalize=True), 1 / 3)


def test_largest_remainder_by_hand() -> None:
    """Rounding each alone gives 3 + 3 + 3 = 9."""
    assert largest_remainder(np.array([1 / 3, 1 / 3, 1 / 3]), 10).tolist() == [4, 3, 3]
    assert largest_remainder(np.array([0.55, 0.45, 0.0]), 10).tolist() in ([6, 4, 0], [5, 5, 0])
    assert largest_remainder(np.array([0.62, 0.28, 0.10]), 10).tolist() == [6, 3, 1]


def test_a_rare_domain_gets_one_and_an_absent_one_none() -> None:
    assert largest_remainder(np.array([0.9999, 0.0001, 0.0]), 100).tolist() == [99, 1, 0]


def test_divergences_by_hand() -> None:
    p, q = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    assert kl_divergence(p, q) == pytest.approx(np.log(2))
    assert kl_divergence(q, p) == float("inf")
    assert kl_divergence(p, p) == 0.0
    assert js_divergence(p, np.array([0.0, 1.0])) == pytest.approx(np.log(2))
    assert js_divergence(p, q) == pytest.approx(0.5 * np.log(4 / 3) + 0.5 * (0.5 * np.log(2 / 3) + 0.5 * np.log(2)))
    assert total_variation(p, q) == 0.5


def test_divergences_broadcast_over_candidates() -> None:
    candidates = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    assert total_variation(candidates, np.array([0.0, 1.0])).tolist() == [1.0, 0.5, 0.0]
    assert js_divergence(candidates, np.array([0.0, 1.0])).shape == (3,)


def test_effective_domains_counts_equal_weights() -> None:
    assert effective_domains(np.array([0.25] * 4 + [0.0] * 48)) == pytest.approx(4.0)
    assert effective_domains(np.array([1.0, 0.0])) == 1.0


def test_one_iteration_is_the_bayes_split() -> None:
    """P(u | c) is proportional to p_u C_uc; each canonical weight is split by it."""
    composition = np.array([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    target, natural = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.4])
    first = 0.2 + 0.5 * (0.6 * 0.5) / (0.6 * 0.5 + 0.4 * 0.25)
    np.testing.assert_allclose(em_projection(composition, target, natural, 1), [first, 1.0 - first])


def test_many_iterations_find_a_mixture_that_the_bayes_split_misses() -> None:
    composition = np.array([[0.6, 0.3, 0.1], [0.2, 0.4, 0.4], [0.1, 0.1, 0.8]])
    truth = np.array([0.05, 0.15, 0.8])
    target, start = truth @ composition, np.ones(3) / 3
    assert total_variation(em_projection(composition, target, start, 1), truth) > 0.1
    np.testing.assert_allclose(em_projection(composition, target, start, 3000), truth, atol=1e-4)


@pytest.mark.parametrize("kind", ["a topic each", "several of one topic", "mixed"])
def test_the_projection_is_that_of_all_steps_to_the_last_bit(kind: str) -> None:
    """It ends early where nothing changes any more. Catches a tolerance, under which slow steps would be left out."""
    rng = np.random.default_rng(0)
    composition = {"a topic each": np.eye(26), "several of one topic": np.repeat(np.eye(26), 3, axis=0)}.get(
        kind, rng.dirichlet(np.full(26, 0.2), 12)
    )
    target = rng.multinomial(2**20, rng.dirichlet(np.ones(26))) / 2**20  # sums to 1 exactly
    mix = np.full(len(composition), 1 / len(composition))
    for _ in range(50):
        mix = mix * (composition @ (target / (mix @ composition)))
        mix = mix / mix.sum()

    np.testing.assert_array_equal(em_projection(composition, target, np.ones(len(composition))), mix)


def test_uncovered_mass_is_left_out_and_no_cover_at_all_is_an_error() -> None:
    composition = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    start = np.array([0.5, 0.5])
    np.testing.assert_allclose(em_projection(composition, np.array([0.3, 0.1, 0.6]), start), [0.75, 0.25])
    with pytest.raises(MixError, match="no user domain covers"):
        em_projection(composition, np.array([0.0, 0.0, 1.0]), start)
