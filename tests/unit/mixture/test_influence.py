"""Errors of influence: over rows, over questions, and of comparisons."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError, InfluenceError, StateError
from dmagent_loader.mixture.influence import Influence, estimate, grouped, scores_from

FIELDS = ("general", "math")


def drawn(rng, *, rows=16, shared=0.0, domains=tuple("abcdef")):
    """A measurement of pure noise; all domains share the effects of the questions as far as `shared` says."""
    common = rng.normal(size=(2, 4, 1))
    samples = []
    for _ in domains:
        own = rng.normal(size=(2, 4, 1))
        questions = np.sqrt(shared) * common + np.sqrt(1 - shared) * own
        samples.append(questions + rng.normal(size=(2, 1, rows)))
    values, errors, by_group = estimate(samples, [np.full(4, 0.25)] * 2)
    return Influence(
        scores=scores_from(FIELDS, domains, values, errors), way="gradient", by_questions=grouped(FIELDS, by_group)
    )


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_errors_of_comparisons_are_those_over_many_measurements(shared):
    rng = np.random.default_rng(3)
    found = [drawn(rng, shared=shared).contrasts() for _ in range(800)]
    differences = np.stack([values for values, _ in found])
    errors = np.stack([error for _, error in found])
    # Deviations from the mean of 6 domains have 5/6 of the variance of independent ones.
    true = differences.std(axis=0) * np.sqrt(6 / 5)
    assert np.allclose(np.sqrt((errors**2).mean(axis=0)) / true, 1.0, atol=0.12)


def test_comparisons_can_be_made_among_some_domains():
    rng = np.random.default_rng(4)
    measured = drawn(rng)
    differences, errors = measured.contrasts(["d", "a"])
    values = measured.values(["d", "a"])
    assert np.allclose(differences, values - values.mean(axis=1, keepdims=True))
    assert errors.shape == (2, 2)
    assert measured.contrasts(["a"])[0].tolist() == [[0.0], [0.0]]


def test_without_groups_of_questions_the_errors_are_those_of_single_scores():
    values, errors = np.arange(6.0).reshape(2, 3), np.full((2, 3), 0.5)
    measured = Influence(scores=scores_from(FIELDS, "abc", values, errors), way="gradient")
    assert np.array_equal(measured.contrasts()[1], errors)


def test_questions_that_are_read_again_do_not_average_out():
    rng = np.random.default_rng(5)
    samples = [rng.normal(size=(2, 4, 1)) + 0.1 * rng.normal(size=(2, 4, 16)) for _ in range(6)]
    values, errors, by_group = estimate(samples, [np.full(4, 0.25)] * 2)
    measured = Influence(
        scores=scores_from(FIELDS, "abcdef", values, errors), way="gradient", by_questions=grouped(FIELDS, by_group)
    )
    again = measured.averaged([measured] * 3)
    assert np.allclose(again.values(), measured.values())
    assert (again.errors() > 0.9 * measured.errors()).all()
    assert np.allclose(again.contrasts()[0], measured.contrasts()[0])


def test_a_measurement_survives_json():
    measured = drawn(np.random.default_rng(6))
    again = Influence.from_json(json.loads(json.dumps(measured.to_json())))
    assert again == measured
    assert all(np.array_equal(*pair) for pair in zip(again.contrasts(), measured.contrasts(), strict=True))


def test_a_measurement_survives_json_with_sorted_keys():
    """The Trainer sorts them; the influence on each group of questions would then be that on another domain."""
    values, errors, by_group = estimate(
        [np.random.default_rng(8).normal(size=(2, 4, 6)) * scale for scale in (5.0, 5.0, 0.1, 0.1)],
        [np.full(4, 0.25)] * 2,
    )
    domains = ("target/b", "target/a", "source/d", "source/c")
    scores = scores_from(("math", "general"), domains, values, errors)
    measured = Influence(scores=scores, way="gradient", by_questions=grouped(("math", "general"), by_group))
    again = Influence.from_json(json.loads(json.dumps(measured.to_json(), sort_keys=True)))
    assert (again.fields, again.domains) == (measured.fields, measured.domains)
    for some in (domains[:2], domains[2:]):
        np.testing.assert_array_equal(again.contrasts(some), measured.contrasts(some))


def test_groups_of_another_shape_are_refused():
    scores = scores_from(FIELDS, "abc", np.zeros((2, 3)), np.ones((2, 3)))
    with pytest.raises(ConfigurationError, match="by_questions has the shapes"):
        Influence(scores=scores, way="gradient", by_questions={name: [[0.0, 1.0]] for name in FIELDS})
    with pytest.raises(ConfigurationError, match="by_questions has the shapes"):
        Influence(scores=scores, way="gradient", by_questions={"general": [[0.0, 1.0, 2.0]]})


@pytest.mark.parametrize("entry", [{"general": [["x"]]}, {"general": 3}, [1], {"general": [[float("nan")] * 6] * 4}])
def test_damaged_groups_are_refused(entry):
    value = drawn(np.random.default_rng(7)).to_json()
    value["by_questions"] = entry
    with pytest.raises(StateError):
        Influence.from_json(value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(bad):
    """A measurement of one's own may return them: a policy would take them for noise, and no state could be saved."""
    values, errors = np.zeros((2, 3)), np.ones((2, 3))
    groups = {name: np.zeros((4, 3)).tolist() for name in ("a", "b")}
    groups["b"][1][2] = bad
    worse = values.copy()
    worse[1, 2] = bad
    for scores, by_questions in (
        (scores_from(("a", "b"), "xyz", worse, errors), {}),
        (scores_from(("a", "b"), "xyz", values, np.abs(worse) - 1), {}),
        (scores_from(("a", "b"), "xyz", values, errors), groups),
    ):
        with pytest.raises(InfluenceError, match="scores are not finite or have a negative error"):
            Influence(scores=scores, way="mine", by_questions=by_questions)
