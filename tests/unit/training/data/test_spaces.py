"""Domain spaces over the text of a corpus: the same natural mix in all of them, and the same rows first in a stream."""

from __future__ import annotations

import numpy as np
import pytest

from dmagent_loader.mixture.domains import NUM_CANONICAL, NUM_TOPICS, SOURCE, TARGET
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.data.spaces import ROW_TOKENS, Documents, Space, SpaceRows, merged

ROWS_PER_STEP = 16


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """A domain's tokens are its number plus 1; every 200th token ends a document. The last domain is empty."""
    lengths = np.full(NUM_CANONICAL, 10 * ROW_TOKENS + 1)
    lengths[-1] = 0
    tokens = np.repeat(np.arange(NUM_CANONICAL) + 1, lengths).astype(np.uint16)
    tokens[199::200] = 0
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    documents = np.arange(NUM_CANONICAL) % 7 + 1
    documents[-1] = 0
    none = np.zeros(0, dtype=np.uint16), np.zeros(NUM_CANONICAL + 1, dtype=np.int64)
    return Corpus(
        tokens=tokens,
        bounds=bounds,
        held_out=none[0],
        held_out_bounds=none[1],
        documents=documents,
        tokenizer_json="{}",
        facts={},
    )


def halves(corpus: Corpus) -> Space:
    return merged("4", corpus, np.arange(NUM_CANONICAL) // (NUM_TOPICS // 2))


def test_a_merged_domain_has_the_natural_weight_of_its_parts(corpus: Corpus) -> None:
    """Rows alone would weigh domains by their kept text, of which all have as much."""
    space = halves(corpus)
    assert space.fields == (SOURCE, SOURCE, TARGET, TARGET)
    assert space.names == ("source/000", "source/001", "target/002", "target/003")
    each = 0.7 * corpus.start_state + 0.3 * corpus.target_distribution
    np.testing.assert_allclose(space.natural(0.3), each.reshape(4, -1).sum(axis=1))


def test_rows_come_as_often_as_the_natural_mix_has_them(corpus: Corpus) -> None:
    space = halves(corpus)
    drawn = [SpaceRows(space, number).next(np.eye(4)[0])[0] for number in range(600)]
    counts = np.bincount([int(np.bincount(row).argmax()) - 1 for row in drawn], minlength=13)
    expected = corpus.start_state[:13] / corpus.start_state[:13].sum()
    assert np.abs(counts / 600 - expected).max() < 0.06


def test_runs_of_one_stream_read_the_same_rows_of_a_domain_first(corpus: Corpus) -> None:
    space = halves(corpus)
    one, other = SpaceRows(space, 5).next(np.eye(4)[1]), SpaceRows(space, 5)
    mixed = other.next(np.full(4, 0.25))
    assert mixed.shape == (ROWS_PER_STEP, ROW_TOKENS + 1)
    first = {row.tobytes() for row in one}
    of_domain = [row for row in mixed if 13 <= int(np.bincount(row).argmax()) - 1 < 26]
    assert len(of_domain) == ROWS_PER_STEP // 4
    assert all(row.tobytes() in first for row in of_domain)


def test_split_documents_keep_their_field_and_the_natural_mix(corpus: Corpus) -> None:
    documents = Documents.of(corpus)
    assert (documents.bounds[1:, 0] == documents.bounds[:-1, 1]).all()
    assert documents.bounds[-1, 1] == len(corpus.tokens)
    space = documents.space("halves", documents.canonical * 2 + np.arange(len(documents.canonical)) % 2)
    assert len(space.fields) == 2 * (NUM_CANONICAL - 1)
    natural = space.natural(0.3)
    assert natural.sum() == pytest.approx(1)
    assert natural[[field == TARGET for field in space.fields]].sum() == pytest.approx(0.3)
    each = 0.7 * corpus.start_state + 0.3 * corpus.target_distribution
    np.testing.assert_allclose(natural.reshape(-1, 2).sum(axis=1), each[:-1])


def test_a_small_domain_gives_a_probe_all_its_rows_once(corpus: Corpus) -> None:
    space = merged("52", corpus, np.arange(NUM_CANONICAL))
    assert len(space.fields) == NUM_CANONICAL - 1  # the empty one is left out
    rows = space.rows(3, 32, 0)
    assert rows.shape == (10, ROW_TOKENS + 1)
    assert len({row.tobytes() for row in space.rows(3, 4, 0)} - {row.tobytes() for row in rows}) == 0
