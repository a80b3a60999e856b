"""The page about data: its treemap has the areas of the data, and its table their numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dmagent_loader._report.data_page import DomainFacts, domain_table, write_data_page
from dmagent_loader._report.treemap import squarified
from dmagent_loader.mixture.domains import CANONICAL_TOPICS


def facts(name: str, topics: dict[str, float], **changed: Any) -> DomainFacts:
    counts = np.array([topics.get(topic, 0.0) for topic in CANONICAL_TOPICS])
    values: dict[str, Any] = {
        "name": name,
        "field": name.split("/")[0],
        "rows": 1000,
        "shards": 2,
        "bytes": 3_000_000,
        "tokens": None,
        "sampled": 100,
        "lengths": (10, 200, 3000),
        "topics": counts,
        "unsure": 100 - int(counts.sum()),
        "repeated": 3,
    }
    return DomainFacts(**{**values, **changed})


@pytest.mark.parametrize("seed", range(5))
def test_tiles_fill_the_box_in_proportion_and_do_not_overlap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = np.sort(rng.exponential(size=26))[::-1]
    tiles = np.array(squarified(sizes.tolist(), (1.0, 2.0, 10.0, 4.0)))
    np.testing.assert_allclose(tiles[:, 2] * tiles[:, 3], sizes / sizes.sum() * 40, rtol=1e-9)
    assert tiles[:, :2].min(axis=0).tolist() == [1.0, 2.0]
    np.testing.assert_allclose((tiles[:, :2] + tiles[:, 2:]).max(axis=0), [11.0, 6.0])
    points = rng.uniform((1, 2), (11, 6), (2000, 2))
    inside = ((points[:, None] > tiles[:, :2]) & (points[:, None] < tiles[:, :2] + tiles[:, 2:])).all(axis=2)
    assert (inside.sum(axis=1) == 1).all()


def test_tiles_are_near_squares() -> None:
    """Slices of equal width, the plain layout, have ratios of up to 26."""
    tiles = np.array(squarified([1.0] * 26, (0.0, 0.0, 1.0, 1.0)))
    assert (tiles[:, 2:].max(axis=1) / tiles[:, 2:].min(axis=1)).max() < 2


def test_nothing_has_no_tiles() -> None:
    assert squarified([], (0.0, 0.0, 1.0, 1.0)) == []


def test_the_table_has_the_numbers_of_each_domain() -> None:
    table = domain_table([facts("source/web", {"News": 60, "Law_and_Government": 20})])
    assert list(table.rows[0]) == [
        "source/web",
        "1,000",
        "2",
        "3.00",
        "10 / 200 / 3,000",
        "3.0%",
        "80%",
        "News 75%, Law & Government 25%",
    ]
    packed = domain_table([facts("source/web", {"News": 60}, tokens=2_500_000), facts("target/math", {})])
    assert [row[4] for row in packed.rows] == ["2.500", ""]


def test_the_page_weights_domains_by_their_rows() -> None:
    """900 rows of News at 50% known, and 100 of Games: 450 and 100 of 1,000."""
    pytest.importorskip("matplotlib")
    domains = [
        facts("source/a", {"News": 50}, rows=900),
        facts("source/b", {"Games": 100}, rows=100),
        facts("target/none", {}, rows=10),
    ]
    report = write_data_page(domains, title="What is <in>", classifier="linear (abc)")
    assert report.picture.startswith(b"\x89PNG")
    assert "What is &lt;in&gt;" in report.page
    for topic, share in (("News", "45.0%"), ("Games", "10.0%"), ("(no topic)", "100.0%")):
        assert f'<th scope="row">{topic}</th><td>{share}</td>' in report.page
    assert "1,010 rows in 3 domains." in report.page
    assert "topics by linear (abc)" in report.page


def test_no_share_is_negative_by_rounding() -> None:
    """The shares of these topics sum to a little more than 1."""
    pytest.importorskip("matplotlib")
    report = write_data_page(
        [facts("source/a", {"News": 11, "Games": 48}, sampled=59, unsure=0)], title="All known", classifier="linear"
    )
    assert '<th scope="row">(no topic)</th><td>0.0%</td>' in report.page
