"""Domains, spaces and the map to the canonical space."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from dmagent_loader.errors import DomainError, MixError
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, Domain, DomainMap, DomainSpace, nearest_topic

TWO = DomainSpace.from_names(["source/web", "target/math"])


def test_the_canonical_space_is_26_topics_in_two_fields_in_the_papers_order() -> None:
    """The order is part of every checkpoint: a changed one would read old weights wrongly and silently."""
    space = DomainSpace.canonical()
    assert len(space) == 52
    assert space.fields == ("source", "target")
    assert space.names[:2] == ("source/Adult", "source/Arts_and_Entertainment")
    assert space.names[21] == "source/Science"
    assert space.names[26] == "target/Adult"
    assert space.names[51] == "target/Travel_and_Transportation"
    assert list(CANONICAL_TOPICS) == sorted(CANONICAL_TOPICS)
    assert len(set(space.names)) == 52


def test_the_field_comes_from_the_name_or_from_fields() -> None:
    space = DomainSpace.from_names(["source/web", "proofs"], fields={"proofs": "target"})
    assert [d.field for d in space.domains] == ["source", "target"]
    assert space.members("target") == (1,)
    assert space.index("proofs") == 1


def test_a_given_field_wins_over_the_name() -> None:
    assert DomainSpace.from_names(["source/a"], fields={"source/a": "target"}).fields == ("target",)


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["web"], {}, r"'web' belongs to no field.*'source/web' or 'target/web'"),
        (["sources/web"], {}, r"belongs to no field.*is 'source/web' meant\?"),
        (["source/a", "source/a"], {}, "listed twice"),
        ([], {}, "at least one domain"),
        (["source/a"], {"fields": {"b": "target"}}, r"fields names \['b'\]"),
        (["source/a"], {"compositions": {"b": {"Science": 1.0}}}, r"compositions names \['b'\]"),
    ],
)
def test_spaces_that_make_no_sense_are_refused(names: list[str], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DomainError, match=message):
        DomainSpace.from_names(names, **settings)


def test_unknown_domains_and_fields_are_named() -> None:
    with pytest.raises(DomainError, match="unknown domain 'source/wev'"):
        TWO.index("source/wev")
    with pytest.raises(DomainError, match="no domain belongs to field 'law'"):
        TWO.members("law")


def test_mixes_go_in_and_out_by_name() -> None:
    mix = TWO.mix({"target/math": 0.75, "source/web": 0.25})
    assert TWO.as_dict(mix) == {"source/web": 0.25, "target/math": 0.75}
    assert TWO.field_mass(mix) == {"source": 0.25, "target": 0.75}


def test_topics_come_from_the_composition_the_name_or_nothing() -> None:
    science = CANONICAL_TOPICS.index("Science")
    named = Domain(name="target/arxiv/Science", field="target")
    assert named.topic == "Science"
    assert named.topic_distribution()[science] == 1.0
    given = Domain(name="target/Science", field="target", composition={"Health": 0.25, "News": 0.75})
    assert given.topic_distribution()[science] == 0.0
    assert given.topic_distribution()[CANONICAL_TOPICS.index("News")] == 0.75
    np.testing.assert_allclose(Domain(name="target/x", field="target").topic_distribution(), 1 / 26)


def test_wrong_compositions_are_refused() -> None:
    with pytest.raises(DomainError, match=r"unknown topics \['Maths'\]"):
        Domain(name="a", field="source", composition={"Maths": 1.0}).topic_distribution()
    with pytest.raises(
        DomainError, match=r"\['computers', 'web'\] \(is 'computers' for 'Computers_and_Electronics' meant\?"
    ):
        Domain(name="a", field="source", composition={"web": 1, "computers": 1}).topic_distribution()
    for composition, message in (
        ({"Science": 0.5}, r"sums to 0\.5"),
        ({"Science": 3, "News": 0.5}, r"sums to 3\.5"),
        ({"Science": 3, "News": -1}, "negative"),
        ({"Science": 0}, "weights are 0"),
        ({"Science": float("inf")}, "not finite"),
    ):
        with pytest.raises(MixError, match=f"domain 'a' is neither a distribution nor counts: .*{message}"):
            Domain(name="a", field="source", composition=composition).topic_distribution()


def test_a_composition_may_count_documents() -> None:
    counted = Domain(name="a", field="source", composition=Counter(Health=1, News=3)).topic_distribution()
    shares = Domain(name="a", field="source", composition={"Health": 0.25, "News": 0.75}).topic_distribution()
    np.testing.assert_array_equal(counted, shares)


@pytest.mark.parametrize(
    ("name", "topic"),
    [
        ("science", "Science"),
        ("scince", "Science"),
        ("Law & Government", "Law_and_Government"),
        ("travel-blogs", "Travel_and_Transportation"),
        ("web", None),
        ("and", None),
        ("", None),
    ],
)
def test_the_nearest_topic_is_that_of_the_name_or_of_a_word_in_it(name: str, topic: str | None) -> None:
    assert nearest_topic(name) == topic


def test_a_map_needs_both_fields() -> None:
    with pytest.raises(DomainError, match="both fields"):
        DomainMap(DomainSpace.from_names(["source/a"]))
    with pytest.raises(DomainError, match="both fields"):
        DomainMap(DomainSpace.from_names(["source/a", "target/b", "c"], fields={"c": "law"}))


@pytest.mark.parametrize("natural", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], [1.0, -1.0]])
def test_natural_shares_that_do_not_fit_are_refused(natural: list[float]) -> None:
    """Three shares for two domains used to be indexed without complaint."""
    with pytest.raises(MixError, match="natural shares must be 2 finite numbers"):
        DomainMap(TWO, natural=np.array(natural))


def test_a_projection_without_iterations_is_refused() -> None:
    with pytest.raises(DomainError, match="0 iterations"):
        DomainMap(TWO, iterations=0)


def test_uncovered_mass_is_reported_stays_in_its_field_and_is_no_misfit() -> None:
    """Science alone can be expressed exactly, so the divergence is 0 whatever the other topics weigh."""
    space = DomainSpace.from_names(["source/Science", "target/math"])
    canonical = np.zeros(52)
    canonical[21], canonical[0] = 0.25, 0.25
    canonical[26:] = 0.5 / 26
    projection = DomainMap(space).to_user(canonical)
    np.testing.assert_allclose(projection.mix, [0.5, 0.5])
    assert projection.uncovered == pytest.approx(0.25)
    assert projection.kl == pytest.approx(0.0, abs=1e-12)


def test_a_field_of_which_nothing_is_covered_is_split_by_natural_shares() -> None:
    space = DomainSpace.from_names(["source/Science", "source/Health", "target/math"])
    canonical = np.zeros(52)
    canonical[0], canonical[26:] = 0.4, 0.6 / 26
    projection = DomainMap(space, natural=np.array([3.0, 1.0, 1.0])).to_user(canonical)
    np.testing.assert_allclose(projection.mix, [0.3, 0.1, 0.6])
    assert projection.uncovered == pytest.approx(0.4)


def test_what_cannot_be_expressed_shows_in_the_divergence() -> None:
    space = DomainSpace.from_names(
        ["source/a", "target/b"], compositions={"source/a": {"Science": 0.5, "Health": 0.5}, "target/b": {"News": 1.0}}
    )
    canonical = np.zeros(52)
    canonical[21], canonical[26 + CANONICAL_TOPICS.index("News")] = 0.6, 0.4
    projection = DomainMap(space).to_user(canonical)
    assert projection.uncovered == pytest.approx(0.0)
    assert projection.kl == pytest.approx(0.6 * np.log(2))


def test_a_field_of_weight_zero_gets_nothing() -> None:
    canonical = np.zeros(52)
    canonical[26:] = 1 / 26
    assert DomainMap(TWO).to_user(canonical).mix.tolist() == [0.0, 1.0]


def test_a_domain_of_natural_share_zero_gets_nothing() -> None:
    """It has no rows to give; its field's weight goes to the others."""
    space = DomainSpace.from_names(["source/a", "source/b", "target/c"])
    mix = DomainMap(space, natural=np.array([1.0, 0.0, 1.0])).to_user(np.full(52, 1 / 52)).mix
    np.testing.assert_allclose(mix, [0.5, 0.0, 0.5])
