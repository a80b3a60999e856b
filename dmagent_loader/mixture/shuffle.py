"""The shuffle of one pass over a domain: windows of rows drawn from several shards at a time, computed by position.

The shards of a pass, in their random order, form one sequence of rows. It is cut into *ranges* of about as many rows as
`Shuffle.shards` shards have, and a range into *tiles* of neighbouring rows. Of the n windows of a range, window t
consists of the tiles t, t + n, t + 2 n, ...: one tile from each shard of the range. The windows follow one another, and
the rows of a window are shuffled.

    range, 3 shards   |aaaaaaaaaaaa|bbbbbbbbbbbb|cccccccccccc|        (3 tiles of 4 rows in a shard)
    window 0           aaaa         bbbb         cccc                 shuffled
    window 1               aaaa         bbbb         cccc             shuffled
    window 2                   aaaa         bbbb         cccc         shuffled

So a pass reads forward through a few shards in parallel, in pieces of neighbouring rows. Only the last range has
another length, and so windows of two lengths and a shorter last tile.

Shapes: D domains, n positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.simplex import IntArray


@dataclass(frozen=True)
class Shuffle:
    """Settings of the shuffle.

    Args:
        window: Rows of a domain that are shuffled together; 1 does not shuffle the rows of a shard.
        shards: Shards of a domain from which the rows of a window come.

    Raises:
        ConfigurationError: Either is below 1.
    """

    window: int = 32_768
    shards: int = 16

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigurationError(f"shuffle window is {self.window}; it must be at least 1 row")
        if self.shards < 1:
            raise ConfigurationError(f"the shuffle has {self.shards} shards; it must have at least 1")


@dataclass(frozen=True)
class Windows:
    """The windows of some positions; all arrays are (n,) int64.

    Attributes:
        begin: First position of the window in the pass.
        size: Rows of the window.
        first_row: Row in the sequence of shards with which the range of the window begins.
        number: Number of the window in its range.
        count: Windows of the range.
    """

    begin: IntArray
    size: IntArray
    first_row: IntArray
    number: IntArray
    count: IntArray


class WindowShuffle:
    """The windows of the passes over every domain.

    Args:
        shuffle: Settings.
        num_rows: (D,) rows of each domain.
        num_shards: (D,) shards of each domain that have rows.
    """

    def __init__(self, shuffle: Shuffle, num_rows: IntArray, num_shards: IntArray) -> None:
        self.tile = max(1, shuffle.window // shuffle.shards)
        """Rows of a tile."""
        tiles_per_window = shuffle.window // self.tile
        self._window = tiles_per_window * self.tile
        self._windows: IntArray = np.maximum(1, shuffle.shards * num_rows // (np.maximum(1, num_shards) * self._window))
        self._range: IntArray = self._windows * self._window
        self._last_range: IntArray = np.maximum(1, num_rows // self._range) - 1
        # The first windows of the last range have one tile more than the others, and end at `border`. The last tile,
        # which may lack rows, is in the last of them, or in the last window if all have as many tiles.
        self._last_rows: IntArray = num_rows - self._last_range * self._range
        tiles = -(-self._last_rows // self.tile)
        self._last_windows: IntArray = np.maximum(1, -(-tiles // tiles_per_window))
        self._fewest: IntArray = np.maximum(1, tiles // self._last_windows)
        self._longer: IntArray = np.maximum(0, tiles - self._fewest * self._last_windows)
        lacking = tiles * self.tile - self._last_rows
        self._border: IntArray = np.where(self._longer > 0, self._longer * (self._fewest + 1) * self.tile - lacking, 0)

    def windows(self, domain: IntArray, position: IntArray) -> Windows:
        """The windows of positions in a pass.

        Args:
            domain: (n,) domain numbers.
            position: (n,) positions.
        """
        length, last = self._range[domain], self._last_range[domain]
        number = np.minimum(position // length, last)
        first_row = number * length
        window = (position - first_row) // self._window
        found = Windows(
            begin=first_row + window * self._window,
            size=np.full(len(position), self._window),
            first_row=first_row,
            number=window,
            count=self._windows[domain],
        )
        if len(chosen := np.flatnonzero(number == last)):
            self._correct(found, chosen, domain[chosen], position[chosen])
        return found

    def _correct(self, windows: Windows, chosen: IntArray, domain: IntArray, position: IntArray) -> None:
        """Puts the windows of the last range in place of those that an ordinary range would have."""
        first_row, border = windows.first_row[chosen], self._border[domain]
        within = position - first_row
        is_longer = within < border
        size = (self._fewest[domain] + is_longer) * self.tile
        begin = np.where(is_longer, 0, border)
        number = (within - begin) // size
        begin += number * size
        windows.begin[chosen] = first_row + begin
        windows.size[chosen] = np.minimum(size, np.where(is_longer, border, self._last_rows[domain]) - begin)
        windows.number[chosen] = number + np.where(is_longer, 0, self._longer[domain])
        windows.count[chosen] = self._last_windows[domain]

    def rows(self, windows: Windows, place: IntArray) -> IntArray:
        """Rows in the sequence of shards: (n,).

        Args:
            windows: Their windows.
            place: (n,) number of each row among those of its window.
        """
        tile = place // self.tile
        return np.asarray(windows.first_row + place + (tile * (windows.count - 1) + windows.number) * self.tile)

    def drawn(self, domain: int, windows: Windows) -> IntArray:
        """The rows of a range that come in the windows before one: (n, 2), first row and the row after the last.

        Args:
            domain: Domain number.
            windows: One window.
        """
        count, number, first_row = (int(x[0]) for x in (windows.count, windows.number, windows.first_row))
        is_last = first_row == self._last_range[domain] * self._range[domain]
        end = first_row + int((self._last_rows if is_last else self._range)[domain])
        begin = np.arange(first_row, end if number else first_row, count * self.tile)
        return np.column_stack([begin, np.minimum(begin + number * self.tile, end)])
