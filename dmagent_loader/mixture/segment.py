"""One segment of the order of samples: a pure function of (seed, shard set, ledger, global sample index).

Each *stretch* of a segment has a constant effective mix. It ends where a new mix starts or a domain runs out. A stretch
holds an order of domains with random access (`domain_order`) and the number of samples drawn from each domain before
it, so any sample is found without visiting the earlier ones.

Shapes: D domains, n samples.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from dmagent_loader.errors import HOW_TO_RESUME, EmptyShardError, ExhaustedError
from dmagent_loader.mixture.domain_order import DomainOrder, in_quanta
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.exhaustion import ExhaustionRule
from dmagent_loader.mixture.hashing import stream_key
from dmagent_loader.mixture.ledger import Ledger, LedgerEntry
from dmagent_loader.mixture.mix_tree import RESOLUTION, MixTree, grow
from dmagent_loader.mixture.rest_of_pass import ShardSet, ShardsLeft
from dmagent_loader.mixture.segment_rows import SegmentRows
from dmagent_loader.mixture.shuffle import Shuffle
from dmagent_loader.mixture.simplex import FloatArray, IntArray

_OFF_BY = 4
"""More samples than a domain can be off its share, besides its debt."""

_WINDOW = 1 << 14
"""Samples examined one by one to find where a domain runs out; a wider range is bisected instead."""

_NEVER = float(1 << 60)

_GROWN_TOGETHER = 32
"""Mixes whose trees grow together: few enough for the caches of a core."""

_KEPT_ORDERS = 16
"""Stretches whose order stays in memory, at about 100 bytes per domain: a run may have thousands of mixes."""


@dataclass(frozen=True)
class Located:
    """Location of a batch of samples; all arrays are (n,) int64.

    Attributes:
        domain: Domain number.
        draw: Number of samples that the segment drew from that domain before this one.
        shard: Shard number within the domain.
        row: Row within the shard.
    """

    domain: IntArray
    draw: IntArray
    shard: IntArray
    row: IntArray

    def chosen(self, which: np.ndarray) -> Located:
        """Some of the samples, by a mask or by their numbers."""
        return Located(self.domain[which], self.draw[which], self.shard[which], self.row[which])


@dataclass
class _Stretch:
    """A stretch with one effective mix.

    It lasts at least up to the index `safe`. Its `stop` is known once it is `settled`; None: it never ends by itself.
    """

    start: int
    quanta: IntArray | None
    """(D,) int32: the mix in force (`dmagent_loader.mixture.domain_order.in_quanta`); None: the plan ends here."""
    base: IntArray
    """(D,) samples that the segment drew from each domain before `start`."""
    carry: IntArray | None = None
    safe: int = 0
    used_up: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()
    stop: int | None = None
    settled: bool = False


class Segment:
    """The order of samples from a global index on, with one set of shards and settings.

    Args:
        space: The domains.
        shards: Their shards.
        seed: Seed of the run.
        rules: (D,) exhaustion rules.
        shuffle: Settings of the shuffle.
        begin: Global index of its first sample.
        owed: (D,) debt to each domain from the segment before (`DomainOrder.counts_and_owed`).
        left: What the present pass of each domain has left of shards from which it has drawn; None: no pass has begun.

    Raises:
        EmptyShardError: A domain has no rows.
    """

    def __init__(
        self,
        space: DomainSpace,
        shards: ShardSet,
        *,
        seed: int,
        rules: Sequence[ExhaustionRule],
        shuffle: Shuffle,
        begin: int = 0,
        owed: IntArray | None = None,
        left: Mapping[str, ShardsLeft] | None = None,
    ) -> None:
        if not len(shards.rows) == len(shards.contents) == len(rules) == len(space):
            raise ValueError(f"shards of {len(shards.rows)} and rules of {len(rules)} domains for {len(space)} domains")
        self.space, self.shards, self.seed, self.shuffle, self.begin = space, shards, seed, shuffle, begin
        self.rules = tuple(rules)
        self.num_rows: IntArray = np.array([rows.sum() for rows in shards.rows], dtype=np.int64)
        empty = [name for name, rows in zip(space.names, self.num_rows, strict=True) if rows == 0]
        if empty:
            raise EmptyShardError(
                f"domains {empty} have no rows: add shards to them, or leave them out; {HOW_TO_RESUME}"
            )
        self.rows = SegmentRows(space.names, shards, seed=seed, shuffle=shuffle, begin=begin, left=left)
        self.first_pass = self.rows.first_pass
        """(D,) rows of the pass with which the segment begins, which may be the rest of one."""
        self._owed = np.zeros(len(space), dtype=np.int64) if owed is None else owed
        self._limited = np.array([rule != "repeat" for rule in self.rules])
        self._stretches: list[_Stretch] = []
        self._starts: list[int] = []
        self._orders: dict[int, DomainOrder] = {}
        self.ledger = Ledger(space.names, begin)

    def append(self, entry: LedgerEntry) -> None:
        """Puts a new mix into force from ``entry.start`` on; earlier samples do not change.

        Raises:
            StateError: The entry would change the past of the ledger.
        """
        self._append(entry, None)

    def _append(self, entry: LedgerEntry, tree: MixTree | None) -> None:
        if self._stretches:
            self._extend(entry.start)
        self.ledger.append(entry)
        # Stretches from entry.start on were derived from the mix that this entry replaces.
        while self._stretches and self._stretches[-1].start >= entry.start:
            self._stretches.pop()
            self._orders.pop(self._starts.pop(), None)
        if self._stretches:
            last = self._stretches[-1]
            if last.quanta is None:
                return
            counts, owed = self._order(last).counts_and_owed(entry.start - last.start)
            base = last.base + counts
            last.stop, last.settled = entry.start, True
        else:
            base, owed = np.zeros(len(self.space), dtype=np.int64), self._owed
        stretch = self._stretch(entry.start, base, owed, tree=tree)
        self._stretches.append(stretch)
        self._starts.append(entry.start)
        if tree is not None and not stretch.used_up:
            self._order(stretch, tree)

    def extend(self, entries: Iterable[LedgerEntry]) -> None:
        """`append` for many mixes: their trees grow together, several times as fast.

        Raises:
            StateError: An entry would change the past of the ledger.
        """
        remaining = iter(entries)
        while some := list(islice(remaining, _GROWN_TOGETHER)):
            for entry, tree in zip(some, grow([in_quanta(entry.weights()) for entry in some]), strict=True):
                self._append(entry, tree)

    def _stretch(
        self,
        start: int,
        base: IntArray,
        owed: IntArray,
        drawn: np.ndarray | None = None,
        tree: MixTree | None = None,
    ) -> _Stretch:
        """The stretch that begins at `start`, under the newest mix.

        Args:
            start: Global index.
            base: (D,) samples that the segment drew from each domain before `start`.
            owed: (D,) debt to each domain (`DomainOrder.counts_and_owed`).
            drawn: (D,) whether each domain was drawn from in the previous stretch of the same mix; None: whether it has
                weight in the mix.
            tree: The tree of the mix, if it was grown before.
        """
        mix = self.ledger.last.weights()
        used_up = self._limited & (base >= self.first_pass)
        members = tuple(used_up.nonzero()[0].tolist())
        weights = self._effective(mix, used_up) if members else mix
        # A used-up domain that the mix does not draw from is not a failure.
        failed = tuple(i for i in members if self.rules[i] == "error" and (mix > 0 if drawn is None else drawn)[i])
        if weights is None or failed:
            return _Stretch(start, None, base, safe=start, used_up=members, failed=failed)
        quanta = in_quanta(weights) if tree is None or members else tree.quanta
        safe = start + self._safe_length(quanta, base, owed)
        return _Stretch(start, quanta.astype(np.int32), base, owed, safe, members)

    def _order(self, stretch: _Stretch, tree: MixTree | None = None) -> DomainOrder:
        """The order of domains in a stretch, rebuilt if it is no longer in memory."""
        order = self._orders.get(stretch.start)
        if order is None:
            assert stretch.quanta is not None
            order = DomainOrder(stretch.quanta, stream_key(self.seed, "order", stretch.start), stretch.carry, tree)
            if len(self._orders) >= _KEPT_ORDERS:
                del self._orders[next(iter(self._orders))]
            self._orders[stretch.start] = order
        return order

    def _extend(self, index: int | None) -> None:
        """Adds stretches until one holds the sample `index`; None: until no domain runs out any more."""
        while (last := self._stretches[-1]).quanta is not None:
            if not last.settled:
                # Finding the exact stop is costly, so it waits until `index` comes near it.
                if index is not None and index < last.safe:
                    return
                assert last.carry is not None
                length = self._until_used_up(self._order(last), last.base, last.carry)
                last.stop, last.settled = None if length is None else last.start + length, True
            if last.stop is None or (index is not None and index < last.stop):
                return
            assert last.quanta is not None
            counts, owed = self._order(last).counts_and_owed(last.stop - last.start)
            self._stretches.append(self._stretch(last.stop, last.base + counts, owed, last.quanta > 0))
            self._starts.append(last.stop)

    def _effective(self, mix: FloatArray, used_up: np.ndarray) -> FloatArray | None:
        """The mix after the weights of used-up domains moved to others; None: the run ends here."""
        weights = np.where(used_up, 0.0, mix)
        for field_name in self.space.fields:
            members = list(self.space.members(field_name))
            lost, left = float(mix[members][used_up[members]].sum()), float(weights[members].sum())
            spare = [i for i in members if not used_up[i]]
            if left > 0:
                weights[members] *= (left + lost) / left
            elif spare:
                weights[spare] = lost * self.num_rows[spare] / self.num_rows[spare].sum()
            elif any(self.rules[i] == "stop" for i in members):
                return None
        if weights.sum() <= 0:
            weights = np.where(used_up, 0.0, self.num_rows.astype(np.float64))
        total = float(weights.sum())
        return None if total <= 0 else weights / total

    def _safe_length(self, quanta: IntArray, base: IntArray, owed: IntArray) -> int:
        """Lower bound on `_until_used_up`: cheap, and a few samples below it."""
        waiting = self._limited & (quanta > 0)
        if not np.count_nonzero(waiting):
            return int(_NEVER)
        share = quanta[waiting] / RESOLUTION
        # A debt is paid at once, as far as it is larger than the share of the debts to all domains with weight. Those
        # of a ledger with very different mixes can be larger than `_OFF_BY`.
        claim = owed[waiting] / RESOLUTION - share * (float(owed[quanta > 0].sum()) / RESOLUTION)
        left = (self.first_pass - base)[waiting] - np.maximum(claim, 0)
        soonest = float(((left - _OFF_BY) / share).min())
        return max(0, int(min(soonest, _NEVER)))

    def _until_used_up(self, order: DomainOrder, base: IntArray, owed: IntArray) -> int | None:
        """Samples until the first limited domain with weight is used up; None: never."""
        waiting = self._limited & (order.quanta > 0)
        if not waiting.any():
            return None
        left = (self.first_pass - base)[waiting]
        share = order.quanta[waiting] / RESOLUTION
        latest = float(((left + _OFF_BY) / share).min())
        if latest > _NEVER:
            return None
        low, high = self._safe_length(order.quanta, base, owed), int(np.ceil(latest))

        def reached(length: int) -> bool:
            return bool((order.counts(length)[waiting] >= left).any())

        if high - low <= _WINDOW:
            domain, rank = order.locate(np.arange(low, high))
            last = np.full(len(self.space), -1, dtype=np.int64)
            last[waiting] = left - 1
            last_rows = np.flatnonzero(rank == last[domain])
            if len(last_rows):
                return low + int(last_rows[0]) + 1
        # Both bounds are estimates: make sure that `low` is not reached and `high` is, then bisect.
        low = low if low and not reached(low) else 0
        while not reached(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        return high

    @property
    def end(self) -> int | None:
        """Global index at which the data are used up and the run ends, under the present ledger; None: never."""
        self._extend(None)
        return self._ended()

    def ends_by(self, index: int) -> int | None:
        """`end` if it is at or before a global index, else None; cheaper than `end` if many domains run out."""
        self._extend(index)
        end = self._ended()
        return end if end is not None and end <= index else None

    @property
    def failure(self) -> tuple[int, tuple[str, ...]] | None:
        """Global index at which domains with rule ``error`` run out, and their names; None: none does."""
        self._extend(None)
        last = self._stretches[-1]
        return (last.start, tuple(self.space.names[i] for i in last.failed)) if last.failed else None

    def _ended(self) -> int | None:
        last = self._stretches[-1]
        return last.start if last.quanta is None and not last.failed else None

    def locate(self, indices: IntArray) -> Located:
        """Domain, draw, shard and row of samples.

        Args:
            indices: (n,) global sample indices, each from `begin` on and below `end`.

        Raises:
            ExhaustedError: A domain with rule ``error`` was used up before one of the indices, or the plan has ended.
        """
        domain, draw = self.draws(np.asarray(indices, dtype=np.int64))
        shard, row = self.rows.locate(domain, draw)
        return Located(domain, draw, shard, row)

    @property
    def num_lanes(self) -> int:
        """Number of lanes of each domain."""
        return self.shuffle.lanes

    def lanes(self, indices: IntArray) -> IntArray:
        """Lane of each sample (`shuffle`): (n,). For the arguments and errors see `locate`."""
        return self.rows.lane(*self.draws(np.asarray(indices, dtype=np.int64)))

    def draws(self, indices: IntArray) -> tuple[IntArray, IntArray]:
        """Domain and draw of samples."""
        if not len(indices):
            return indices.copy(), indices.copy()
        low, high = int(indices.min()), int(indices.max())
        self._extend(high)
        first, last = bisect_right(self._starts, low) - 1, bisect_right(self._starts, high) - 1
        if first == last:
            return self._draws_in(self._stretches[first], indices, (low, high))
        domain, draw = np.empty_like(indices), np.empty_like(indices)
        stretch_of = first + np.searchsorted(self._starts[first + 1 : last + 1], indices, side="right")
        for number in np.unique(stretch_of).tolist():
            chosen = stretch_of == number
            domain[chosen], draw[chosen] = self._draws_in(self._stretches[number], indices[chosen])
        return domain, draw

    def _draws_in(
        self, stretch: _Stretch, indices: IntArray, span: tuple[int, int] | None = None
    ) -> tuple[IntArray, IntArray]:
        """`draws` of samples of one stretch; `span` is the least and the largest of them, if they are known."""
        self._refuse(stretch)
        if span is not None:
            span = span[0] - stretch.start, span[1] - stretch.start
        domain, rank = self._order(stretch).locate(indices - stretch.start, span)
        return domain, stretch.base[domain] + rank

    def left(self, index: int) -> dict[str, ShardsLeft]:
        """Domain -> what its present pass has left of the shards from which it has drawn, before a global index."""
        return self.rows.left(self.counts(index))

    def rows_left(self, index: int) -> IntArray:
        """Rows that the present pass of each domain has not drawn before a global index: (D,)."""
        return self.rows.num_left(self.counts(index))

    def replacement(self, index: int, domain: int, attempt: int) -> tuple[int, int]:
        """Shard and row of its domain that stand in for a row that cannot be used: any row, equally likely.

        Args:
            index: Global sample index.
            domain: Domain number of the sample.
            attempt: Number of the row in the sequence of candidates, from 1.
        """
        key = stream_key(self.seed, "replacement", self.space.names[domain], index, attempt)
        return self.rows.at(domain, key % int(self.num_rows[domain]))

    def _refuse(self, stretch: _Stretch) -> None:
        if stretch.failed:
            names = [self.space.names[i] for i in stretch.failed]
            raise ExhaustedError(
                f"domains {names} were used up at sample {stretch.start} and their rule is 'error': add shards, lower "
                f"their weight, or choose exhausted='repeat', 'stop' or 'redistribute'; {HOW_TO_RESUME}"
            )
        if stretch.quanta is None:
            names = [self.space.names[i] for i in stretch.used_up]
            raise ExhaustedError(f"the plan ends at sample {stretch.start}: {names} are used up")

    def counts(self, index: int) -> IntArray:
        """Samples that the segment drew from each domain before a global index: (D,) int64."""
        stretch = self._at(index)
        if stretch.quanta is None or index == stretch.start:
            return stretch.base.copy()
        return stretch.base + self._order(stretch).counts(index - stretch.start)

    def owed(self, index: int) -> IntArray:
        """Debt to each domain before a global index: (D,) int64 (`DomainOrder.counts_and_owed`)."""
        stretch = self._at(index)
        if stretch.quanta is None:
            return np.zeros(len(self.space), dtype=np.int64)
        return self._order(stretch).counts_and_owed(index - stretch.start)[1]

    def mix_at(self, index: int) -> FloatArray:
        """The effective mix at a global index, without used-up domains: (D,)."""
        stretch = self._at(index)
        if stretch.quanta is None:
            return np.zeros(len(self.space))
        return np.asarray(stretch.quanta / RESOLUTION, dtype=np.float64)

    def used_up_at(self, index: int) -> tuple[str, ...]:
        """Names of the domains that have run out before a global index."""
        stretch = self._at(index)
        return tuple(self.space.names[i] for i in stretch.used_up)

    def changes(self) -> list[tuple[int, tuple[str, ...]]]:
        """Every index at which domains run out, under the present ledger: (index, names used up from there on)."""
        self._extend(None)
        changes: list[tuple[int, tuple[str, ...]]] = []
        for stretch in self._stretches:
            names = tuple(self.space.names[i] for i in stretch.used_up)
            if names and (not changes or changes[-1][1] != names):
                changes.append((stretch.start, names))
        return changes

    def _at(self, index: int) -> _Stretch:
        self._extend(index)
        return self._stretches[bisect_right(self._starts, index) - 1]
