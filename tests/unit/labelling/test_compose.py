"""Compositions: the sample is as large as it needs to be, and its error is what is promised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from dmagent_loader.errors import ConfigurationError, ShardError
from dmagent_loader.labelling.compose import (
    FIRST_DOCUMENTS,
    SampleConfig,
    compose,
    expected_error,
    needed_sample,
    wilson,
)
from dmagent_loader.labelling.labels import Labeller
from dmagent_loader.mixture.domains import CANONICAL_TOPICS
from dmagent_loader.shards.inputs.documents import Document


class Exact:
    """Knows the topic that a text names; it is unsure of all other texts."""

    name, labels = "exact", CANONICAL_TOPICS

    def probabilities(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        result = np.full((len(texts), 26), 1 / 26)
        for row, text in zip(result, texts, strict=True):
            if text in self.labels:
                row[:] = np.eye(26)[self.labels.index(text)]
        return result


class Texts(list[str]):
    """Texts that are read by position; `read` counts them."""

    read = 0

    @property
    def size(self) -> int:
        return len(self)

    def rows(self, positions: Iterable[int]) -> Iterator[Document]:
        for position in positions:
            self.read += 1
            yield Document(self[position], {}, "")


def drawn(shares: dict[str, float], size: int, seed: int = 0) -> Texts:
    return Texts(np.random.default_rng(seed).choice(list(shares), size, p=list(shares.values())).tolist())


FOUR = {"News": 0.4, "Science": 0.3, "Games": 0.2, "Health": 0.1}


@pytest.mark.parametrize("size", [1500, 200_000])
def test_the_expected_error_is_that_of_repeated_samples(size: int) -> None:
    """Against draws without replacement; a formula that forgets the finite size is off by a quarter at 1,500."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(size, rng.dirichlet(np.ones(26)))
    samples = rng.multivariate_hypergeometric(counts, 500, 4000) / 500
    measured = np.abs(samples - counts / size).sum(axis=1).mean() / 2
    assert expected_error(counts / size, 500, size) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("size", [1500, 200_000])
def test_the_needed_sample_has_the_wanted_error(size: int) -> None:
    shares = np.random.default_rng(1).dirichlet(np.ones(26))
    assert expected_error(shares, needed_sample(shares, size, 0.05), size) == pytest.approx(0.05)


def test_the_sample_grows_until_its_error_is_small_enough() -> None:
    texts = drawn(FOUR, 50_000)
    coarse = compose("source/web", texts, Labeller(Exact()), SampleConfig(max_error=0.04), progress=False)
    assert texts.read == coarse.documents == FIRST_DOCUMENTS
    fine = compose("source/web", texts, Labeller(Exact()), SampleConfig(max_error=0.01), progress=False)
    assert FIRST_DOCUMENTS < fine.documents < 5000
    assert fine.error <= 0.0101
    assert fine.documents >= fine.documents_needed
    assert sum(abs(fine.shares.get(topic, 0) - share) for topic, share in FOUR.items()) / 2 < 0.03


def test_the_intervals_hold_the_share_in_19_of_20_samples() -> None:
    held = 0
    for seed in range(200):
        counts = np.random.default_rng(seed).multinomial(400, list(FOUR.values()))
        low, high = wilson(counts / 400, 400)
        held += int((low[3] <= 0.1) & (high[3] >= 0.1))
    assert 183 <= held <= 197


def test_unsure_documents_are_left_out_and_make_the_sample_larger() -> None:
    half = {**{topic: share / 2 for topic, share in FOUR.items()}, "?": 0.5}
    sure = compose("a", drawn(FOUR, 50_000), Labeller(Exact()), SampleConfig(max_error=0.01), progress=False)
    found = compose("a", drawn(half, 50_000), Labeller(Exact()), SampleConfig(max_error=0.01), progress=False)
    assert found.documents == pytest.approx(2 * sure.documents, rel=0.1)
    assert found.unsure == pytest.approx(found.documents / 2, rel=0.1)
    assert sum(found.counts.values()) == found.documents - found.unsure


def test_a_small_domain_is_read_whole_and_has_no_error() -> None:
    found = compose(
        "a", Texts(["News"] * 30 + ["Games"] * 10), Labeller(Exact()), SampleConfig(max_error=0.01), progress=False
    )
    assert found.counts == {"News": 30, "Games": 10}
    assert (found.documents, found.error) == (40, 0.0)
    assert found.intervals == {"News": (0.75, 0.75), "Games": (0.25, 0.25)}


def test_a_sample_of_one_topic_has_an_error() -> None:
    texts = Texts(["News"] * 1000)
    one, many = (
        compose("a", texts, Labeller(Exact()), SampleConfig(most_documents=most), progress=False) for most in (1, 900)
    )
    assert one.error > 0.3 > 0.01 > many.error > 0
    assert one.intervals["News"][0] < 0.25
    assert many.intervals["News"][0] > 0.99


def test_the_sample_does_not_follow_the_order_of_the_rows() -> None:
    """Shards are often sorted by topic: the first rows are not a sample."""
    found = compose(
        "a", Texts(sorted(drawn(FOUR, 20_000))), Labeller(Exact()), SampleConfig(most_documents=400), progress=False
    )
    assert found.documents == 400
    assert found.shares["Games"] == pytest.approx(0.2, abs=0.06)


def test_a_domain_without_any_topic_and_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ShardError, match=r"none of 50 documents has a topic with confidence 0\.6"):
        compose("target/math", Texts(["?"] * 50), Labeller(Exact()), progress=False)
    with pytest.raises(ShardError, match="'target/math' holds no documents"):
        compose("target/math", Texts(), Labeller(Exact()), progress=False)
    with pytest.raises(ConfigurationError, match="max_error is 0"):
        SampleConfig(max_error=0)
    with pytest.raises(ConfigurationError, match="most_documents is 0"):
        SampleConfig(most_documents=0)


def test_a_billion_rows_cost_no_more_than_the_sample() -> None:
    """A permutation of all rows would take 8 GB."""

    class Endless:
        size = 10**9

        def rows(self, positions: Sequence[int]) -> Iterator[Document]:
            assert list(positions) == sorted(set(positions))
            return (Document("News" if position % 4 else "Games", {}, "") for position in positions)

    found = compose("a", Endless(), Labeller(Exact()), SampleConfig(max_error=0.01), progress=False)
    assert found.shares["News"] == pytest.approx(0.75, abs=0.03)
