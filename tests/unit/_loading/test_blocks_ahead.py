"""Blocks are asked for in the order of need, once, and kept until their domain has passed them under any mix."""

from __future__ import annotations

import numpy as np
import pytest

from dmagent_loader._loading.blocks_ahead import BlocksAhead, BlocksOfRows

DOMAIN = np.array([0, 1, 0, 1, 0, 0, 1, 0])
DRAW = np.array([5, 2, 6, 3, 7, 8, 4, 9])
FIRST = np.array([10, 20, 11, 20, 10, 11, -1, 12])
LAST = np.array([10, 20, 12, 21, 10, 11, -1, 12])


class Fetcher:
    """Records what is asked for."""

    waits, mean_row_bytes = 0, 1.0

    def __init__(self):
        self.wanted, self.released, self.absent = [], [], set()

    def want(self, keys):
        self.wanted.extend(keys)

    def release(self, key):
        self.released.append(key)

    def cancel(self, key):
        return False

    def comes(self, key):
        return key not in self.absent and key in dict(self.wanted)


def asked(cuts):
    """Blocks ahead that were asked for samples in one request for each part, with a run for each number in it."""
    fetcher = Fetcher()
    ahead, blocks, begin = BlocksAhead(2, fetcher), BlocksOfRows.of(FIRST, LAST), 0
    for ends in cuts:
        part = slice(begin, ends[-1])
        ahead.request(DOMAIN[part], DRAW[part], blocks.chosen(part), 100 + begin, [end - begin for end in ends])
        begin = ends[-1]
    return ahead, fetcher


@pytest.mark.parametrize("cuts", [[[3, 6, 8]], [[3], [6, 8]], [[3], [6], [8]]])
def test_runs_that_are_planned_together_are_asked_for_as_those_planned_one_by_one(cuts):
    ahead, fetcher = asked(cuts)
    assert sorted(fetcher.wanted) == [(10, 100), (11, 102), (12, 102), (20, 101), (21, 103)]
    for _ in range(3):
        ahead.advance()
    assert not fetcher.released, "the samples of the run before may be lazy"
    assert ahead._last_use == {10: (0, 7), 11: (0, 8), 12: (0, 9), 20: (1, 3), 21: (1, 3)}
    assert len(ahead._planned) == 0


def test_blocks_are_released_once_their_domain_has_passed_them():
    ahead, fetcher = asked([[3, 6, 8]])
    far = BlocksOfRows.of(*2 * (np.array([13, 13]),))
    for begin in (10, 12, 14):
        ahead.request(np.array([0, 0]), np.array([begin, begin + 1]), far, 100 + begin, [2])
    for expected in ([], [], [], [10, 11, 20, 21], [10, 11, 12, 20, 21]):
        ahead.advance()
        assert sorted(fetcher.released) == expected


def test_samples_are_read_one_by_one_if_either_block_cannot_be_had():
    """Blocks of other rows do not matter, and rows of local shards have none."""
    ahead, fetcher = asked([[8]])
    assert ahead.all_come()
    fetcher.absent = {12, 21}
    assert not ahead.all_come()
    blocks = BlocksOfRows.of(FIRST, LAST)
    assert ahead.unavailable(blocks).tolist() == [False, False, True, True, False, False, False, True]
    assert ahead.unavailable(blocks.chosen(slice(4, 7))).tolist() == [False] * 3


def test_one_column_stands_for_both_blocks_if_they_are_the_same():
    blocks = BlocksOfRows.of(FIRST, FIRST)
    assert len(blocks.numbers) == 1
    assert np.array_equal(blocks.keys[blocks.numbers[0]], FIRST)


def test_blocks_that_could_not_be_asked_for_are_not_released():
    """Their index could not be read, say; the finalizer of the iterator releases the others."""
    ahead, fetcher = asked([[3]])
    fetcher.want = lambda keys: 1 / 0
    with pytest.raises(ZeroDivisionError):
        ahead.request(DOMAIN, DRAW, BlocksOfRows.of(FIRST, LAST), 103, [8])
    ahead.close()
    assert sorted(fetcher.released) == sorted(key for key, _ in fetcher.wanted)
