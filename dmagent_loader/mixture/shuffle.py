"""The shuffle of one pass over a domain: lanes of shards that are read in parallel, computed by position.

The shards of a domain, in a random order, form one sequence of rows. It is cut into *lanes* of equally many rows, and a
lane into *tiles* of neighbouring rows. Draw k of a pass takes a row of lane ``(k * stride + shift) mod lanes``, with a
shift drawn anew for each turn of all lanes: every lane gives one row in each turn. A lane reads forward and uses up one
tile after the other, whose rows are shuffled; in each pass it begins at another row.

    3 lanes of 12 rows   |aaaa|aaaa|aaaa|bbbb|bbbb|bbbb|cccc|cccc|cccc|      in tiles of 4 rows
    first 12 draws        aaaa                bb   bb            cccc        shuffled
    next 12 draws              aaaa        bb        bb               cccc
    last 12 draws                   aaaa     bb   bb        cccc

So a pass reads forward in as many places as there are lanes, in pieces of neighbouring rows, and a lane reads the same
shards in every pass. Fewer rows than there are lanes remain; they are drawn last.

Shapes: D domains, n draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.hashing import UIntArray, random_bits, scatter
from dmagent_loader.mixture.simplex import IntArray

_HALF = np.uint64(32)
_TILES, _FIRST_ROWS = 1 << 61, 1 << 62
"""Counters of a pass's random stream from which on it shuffles tiles, and chooses the first row of each lane."""
_LEAST_WINDOW = 8192
"""Rows of a domain that `shared_shuffle` shuffles at least."""


@dataclass(frozen=True)
class Shuffle:
    """Settings of the shuffle.

    Args:
        window: Rows of a domain that are shuffled together: one tile of each lane. 1 does not shuffle at all.
        shards: Lanes: shards of a domain that are in use at a time.

    Raises:
        ConfigurationError: Either is below 1.
    """

    window: int = 65_536
    shards: int = 64

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigurationError(f"shuffle window is {self.window}; it must be at least 1 row")
        if self.shards < 1:
            raise ConfigurationError(f"the shuffle has {self.shards} shards; it must have at least 1")

    @property
    def lanes(self) -> int:
        """Number of lanes: not more than the rows of a window."""
        return min(self.shards, self.window)


def shared_shuffle(shard_rows: Sequence[IntArray], window: int | None = None, shards: int | None = None) -> Shuffle:
    """The default shuffle, shared out among the domains, so that rows are read quickly.

    The position of a row, its table and its file come from the caches of the processor only if few of them are in use.
    A domain has about ``shards + window / rows of a shard`` shards in use. All domains together have as many as a
    single one has by default, but at least those of windows of 8,192 rows.

    Args:
        shard_rows: For each domain, the rows of each of its shards.
        window: Chosen window; None: to be derived.
        shards: Chosen number of shards; None: to be derived.
    """
    whole, num_domains = Shuffle(), len(shard_rows)
    num_rows, num_shards = (sum(map(count, shard_rows)) for count in (np.sum, np.count_nonzero))
    mean = max(1, int(num_rows) // max(1, int(num_shards)))
    if window is None:
        window = max(_LEAST_WINDOW, min(whole.window, whole.shards * mean) // num_domains)
    if shards is None:
        shards = max(1, whole.shards // num_domains - window // mean)
    return Shuffle(window=window, shards=shards)


class Lanes:
    """The lanes of every domain.

    Args:
        shuffle: Settings.
        num_rows: (D,) rows of each domain.
    """

    def __init__(self, shuffle: Shuffle, num_rows: IntArray) -> None:
        self._lanes, self._num_rows = shuffle.lanes, num_rows
        self._length: IntArray = num_rows // self._lanes
        """(D,) rows of a lane."""
        self._tile = shuffle.window // self._lanes
        """Rows of a tile; the last tile of a lane may have fewer."""
        # The golden ratio spreads consecutive draws most evenly over the lanes.
        near = round(self._lanes * (math.sqrt(5) - 1) / 2)
        self._stride = next(n for n in range(max(1, near), 2 * self._lanes) if math.gcd(n, self._lanes) == 1)
        self.settings: IntArray = np.array([self._lanes, self._tile, self._stride])
        """(3,) number of lanes, rows of a tile, and stride."""

    def lane(self, key: UIntArray, position: IntArray) -> IntArray:
        """The lane of each draw: (n,).

        Args:
            key: (n,) keys of the passes.
            position: (n,) positions in the pass.
        """
        turn = position // self._lanes
        shift = (random_bits(key, turn) >> _HALF).view(np.int64)
        return np.asarray(((position - turn * self._lanes) * self._stride + shift) % self._lanes)

    def locate(self, domain: IntArray, key: UIntArray, position: IntArray) -> IntArray:
        """The row of each draw, in the sequence of shards: (n,).

        Args:
            domain: (n,) domain numbers.
            key: (n,) keys of the passes.
            position: (n,) positions in the pass.
        """
        turn, length = position // self._lanes, self._length[domain]
        row = self._in_lane(domain, key, self.lane(key, position), turn)
        if len(rest := np.flatnonzero(turn >= length)):
            first = length[rest] * self._lanes
            number = self._num_rows[domain[rest]] - first
            row[rest] = first + scatter(random_bits(key[rest], first - _FIRST_ROWS), position[rest] - first, number)
        return row

    def _in_lane(self, domain: IntArray, key: UIntArray, lane: IntArray, draw: IntArray) -> IntArray:
        """The row of each draw from a lane, in the sequence of shards: (n,)."""
        length = np.maximum(self._length[domain], 1)
        place = (draw + self._first_row(key, lane)) % length
        begin = place // self._tile * self._tile
        first = lane * length + begin
        size = np.minimum(length - begin, self._tile)
        return np.asarray(first + scatter(random_bits(key, _TILES + first), place - begin, size))

    @staticmethod
    def _first_row(key: UIntArray, lane: IntArray) -> IntArray:
        """The row with which a pass begins in each lane, modulo the rows of the lane; the first lane begins with 0."""
        return np.where(lane > 0, (random_bits(key, _FIRST_ROWS + lane) >> _HALF).view(np.int64), 0)

    def drawn(self, domain: int, key: UIntArray, count: int) -> IntArray:
        """The rows of the first draws of a pass, in the sequence of shards.

        Args:
            domain: Domain number.
            key: (1,) key of the pass.
            count: Draws.

        Returns:
            (n, 2), first row and row after the last of each run.
        """
        length, tile, lanes = int(self._length[domain]), self._tile, np.arange(self._lanes)
        whole = min(count // self._lanes, length)  # draws that every lane has given
        single = np.arange(whole * self._lanes, count)
        rows = [self.locate(np.full(len(single), domain), key.repeat(len(single)), single)]
        runs = np.empty((0, 2), dtype=np.int64)
        if whole == length:
            runs = np.array([[0, length * self._lanes]])
        elif whole:
            # In each lane the drawn places are a range, which continues at the beginning of the lane: whole tiles, and
            # parts of the tiles with the first and the last of them.
            begin = self._first_row(key.repeat(self._lanes), lanes) % length
            first = np.stack([begin, np.zeros_like(begin)])
            last = np.stack([np.minimum(begin + whole, length), np.maximum(begin + whole - length, 0)])
            ends_lane = last == length
            first, last = -(-first // tile) * tile, np.where(ends_lane, length, last // tile * tile)
            some = first < last
            runs = (lanes * length + np.stack([first, last]))[:, some].T
            # Only the first draws, as many as a tile has, and the last are in other tiles than whole ones.
            draws = np.concatenate([np.arange(min(tile, whole)), np.arange(max(tile, whole - tile), whole)])
            places = (draws + begin[:, None]) % length
            first = places // tile * tile
            size = np.minimum(length - first, tile)
            lane, chosen = np.nonzero((first - begin[:, None]) % length + size > whole)
            shape = np.full(len(lane), domain)
            rows.append(self._in_lane(shape, key.repeat(len(lane)), lane, draws[chosen]))
        single = np.concatenate(rows)
        runs = np.concatenate([runs, np.column_stack([single, single + 1])])
        return np.asarray(runs[np.argsort(runs[:, 0])])
