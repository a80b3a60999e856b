"""The plan: the pure function (seed, ledger, global sample index) -> (domain, row of the domain).

A *segment* is a stretch with a constant effective mix. It ends where a new mix starts or a domain runs out. Each
segment holds an order of domains with random access (`domain_order`) and the number of samples drawn from each domain
before it, so any sample is found without visiting the earlier ones.

Shapes: D domains, n samples.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from dmagent_loader._validation import shown
from dmagent_loader.errors import ConfigurationError, EmptyShardError, ExhaustedError
from dmagent_loader.mixture.domain_order import RESOLUTION, DomainOrder, in_quanta
from dmagent_loader.mixture.domains import SOURCE, DomainSpace
from dmagent_loader.mixture.hashing import stream_key
from dmagent_loader.mixture.ledger import Ledger, LedgerEntry
from dmagent_loader.mixture.length import RunLength
from dmagent_loader.mixture.row_order import DEFAULT_WINDOW, RowOrders
from dmagent_loader.mixture.simplex import FloatArray, IntArray

ExhaustionRule = Literal["repeat", "stop", "redistribute", "error"]
_OFF_BY = 4
"""More samples than a domain can be off its share, including the debt of the last mix."""

_WINDOW = 1 << 14
"""Samples examined one by one to find where a domain runs out; a wider range is bisected instead."""

_NEVER = float(1 << 60)

_KEPT_ORDERS = 16
"""Segments whose order stays in memory, at about 100 bytes per domain: a run may have thousands of mixes."""

EXHAUSTION_RULES: tuple[ExhaustionRule, ...] = get_args(ExhaustionRule)


def exhaustion_rules(
    space: DomainSpace, exhausted: str | Mapping[str, str] | None = None
) -> tuple[ExhaustionRule, ...]:
    """The rule of each domain of a space for when all its rows are used up.

    - ``repeat``: the rows are read again in a new order (default for the source field).
    - ``stop``: the weight of the domain moves to the rest of its field, and the run ends when the field is used up, as
      in the paper (default for every other field).
    - ``redistribute``: as ``stop``, but the run continues: when the field is used up, its weight moves to the other
      fields.
    - ``error``: `ExhaustedError`.

    The weight moves to those domains of the field that have weight, in proportion to it. Domains of weight 0 take over,
    in proportion to their rows, only when no domain with weight is left.

    Args:
        space: The domains.
        exhausted: One rule for all domains, or a mapping from field or domain name to rule (the rule of a domain takes
            precedence).

    Raises:
        ConfigurationError: A rule is unknown, or a name is neither a field nor a domain.
    """
    chosen: dict[str, str] = {}
    if isinstance(exhausted, str):
        chosen = dict.fromkeys(space.fields, exhausted)
    elif isinstance(exhausted, Mapping):
        chosen = dict(exhausted)
    elif exhausted is not None:
        raise ConfigurationError(
            f"exhausted is {shown(exhausted)}; pass one rule for all, or a mapping from field or domain to rule"
        )
    unknown = sorted(set(chosen) - set(space.fields) - set(space.names))
    if unknown:
        raise ConfigurationError(
            f"exhausted names {unknown}, which are neither fields {space.fields} nor domains: check the spelling"
        )
    rules = []
    for domain in space.domains:
        default = "repeat" if domain.field == SOURCE else "stop"
        rule = chosen.get(domain.name, chosen.get(domain.field, default))
        if rule not in EXHAUSTION_RULES:
            raise ConfigurationError(
                f"exhaustion rule {rule!r} of domain {domain.name!r} is unknown; choose one of {list(EXHAUSTION_RULES)}"
            )
        rules.append(rule)
    return tuple(rules)


@dataclass(frozen=True)
class Located:
    """Location of a batch of samples; all arrays are (n,) int64.

    Attributes:
        domain: Domain number.
        draw: Number of samples drawn from that domain before this one.
        shard: Shard number within the domain.
        row: Row within the shard.
    """

    domain: IntArray
    draw: IntArray
    shard: IntArray
    row: IntArray


@dataclass(frozen=True)
class _Segment:
    """A stretch with one effective mix.

    It lasts at least up to the index `safe`. Its `stop` is known once it is `settled`; None: it never ends by itself.
    """

    start: int
    quanta: IntArray | None
    """(D,) int32: the mix in force (`dmagent_loader.mixture.domain_order.in_quanta`); None: the plan ends here."""
    base: IntArray
    """(D,) samples drawn from each domain before `start`."""
    carry: IntArray | None = None
    safe: int = 0
    used_up: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()
    stop: int | None = None
    settled: bool = False


class Plan:
    """The order of all samples of a run.

    Args:
        space: The domains.
        shard_rows: For each domain, the rows of each of its shards.
        seed: Seed of the sample order.
        exhausted: See `exhaustion_rules`.
        window: Rows per shuffle window.

    Raises:
        EmptyShardError: A domain has no rows.
    """

    def __init__(
        self,
        space: DomainSpace,
        shard_rows: Sequence[IntArray],
        *,
        seed: int,
        exhausted: str | Mapping[str, str] | None = None,
        window: int = DEFAULT_WINDOW,
    ) -> None:
        self.space, self.seed, self.window = space, seed, window
        self.rules = exhaustion_rules(space, exhausted)
        self._shard_rows = shard_rows
        if len(shard_rows) != len(space):
            raise ValueError(f"rows of {len(shard_rows)} domains for a space of {len(space)}")
        self._rows = RowOrders(seed, space.names, shard_rows, window)
        self.num_rows: IntArray = self._rows.num_rows
        empty = [name for name, rows in zip(space.names, self.num_rows, strict=True) if rows == 0]
        if empty:
            raise EmptyShardError(f"domains {empty} have no rows: add shards to them, or leave them out")
        self._limited = np.array([rule != "repeat" for rule in self.rules])
        self._segments: list[_Segment] = []
        self._starts: list[int] = []
        self._orders: dict[int, DomainOrder] = {}
        self.ledger = Ledger(space.names)

    def empty_copy(self) -> Plan:
        """A plan of the same run with an empty ledger."""
        exhausted = dict(zip(self.space.names, self.rules, strict=True))
        return Plan(self.space, self._shard_rows, seed=self.seed, exhausted=exhausted, window=self.window)

    @property
    def natural_mix(self) -> FloatArray:
        """(D,) share of all rows of each domain, sums to 1."""
        return np.asarray(self.num_rows / self.num_rows.sum(), dtype=np.float64)

    def run_length(self, limit: int | None) -> RunLength:
        """The facts that bound the length of the run.

        Args:
            limit: Samples at which the trainer stops; None: no limit is known.
        """
        fields = [self.space.members(name) for name in self.space.fields]
        ending = tuple(m for m in fields if self._limited[list(m)].all() and any(self.rules[i] == "stop" for i in m))
        return RunLength(rows=self.num_rows, repeats=~self._limited, limit=limit, ending=ending)

    def append(self, entry: LedgerEntry) -> None:
        """Puts a new mix into force from ``entry.start`` on; earlier samples do not change.

        Raises:
            StateError: The entry would change the past of the ledger.
        """
        if self._segments:
            self._extend(entry.start)
        self.ledger.append(entry)
        # Segments from entry.start on were derived from the mix that this entry replaces.
        while self._segments and self._segments[-1].start >= entry.start:
            self._segments.pop()
            self._orders.pop(self._starts.pop(), None)
        base = np.zeros(len(self.space), dtype=np.int64)
        owed = np.zeros(len(self.space), dtype=np.int64)
        if self._segments:
            last = self._segments[-1]
            if last.quanta is None:
                return
            base, owed = self._order(last).counts_and_owed(entry.start - last.start)
            base += last.base
            self._segments[-1] = replace(last, stop=entry.start, settled=True)
        self._segments.append(self._segment(entry.start, base, owed))
        self._starts.append(entry.start)

    def _segment(self, start: int, base: IntArray, owed: IntArray, drawn: np.ndarray | None = None) -> _Segment:
        """The segment that begins at `start`, under the newest mix.

        Args:
            start: Global index.
            base: (D,) samples drawn from each domain before `start`.
            owed: (D,) debt to each domain (`DomainOrder.counts_and_owed`).
            drawn: (D,) whether each domain was drawn from in the previous segment of the same mix; None: whether it has
                weight in the mix.
        """
        mix = self.ledger.last.weights()
        used_up = self._limited & (base >= self.num_rows)
        weights = self._effective(mix, used_up)
        members = tuple(int(i) for i in np.flatnonzero(used_up))
        drawn = mix > 0 if drawn is None else drawn
        # A used-up domain that the mix does not draw from is not a failure.
        failed = tuple(i for i in members if self.rules[i] == "error" and drawn[i])
        if weights is None or failed:
            return _Segment(start, None, base, safe=start, used_up=members, failed=failed)
        quanta = in_quanta(weights)
        safe = start + self._safe_length(quanta, base)
        return _Segment(start, quanta.astype(np.int32), base, owed, safe, members)

    def _order(self, segment: _Segment) -> DomainOrder:
        """The order of domains in a segment, rebuilt if it is no longer in memory."""
        order = self._orders.get(segment.start)
        if order is None:
            assert segment.quanta is not None
            order = DomainOrder(segment.quanta, stream_key(self.seed, "order", segment.start), segment.carry)
            if len(self._orders) >= _KEPT_ORDERS:
                del self._orders[next(iter(self._orders))]
            self._orders[segment.start] = order
        return order

    def _extend(self, index: int | None) -> None:
        """Adds segments until one holds the sample `index`; None: until no domain runs out any more."""
        while (last := self._segments[-1]).quanta is not None:
            if not last.settled:
                # Finding the exact stop is costly, so it waits until `index` comes near it.
                if index is not None and index < last.safe:
                    return
                length = self._until_used_up(self._order(last), last.base)
                last = replace(last, stop=None if length is None else last.start + length, settled=True)
                self._segments[-1] = last
            if last.stop is None or (index is not None and index < last.stop):
                return
            assert last.quanta is not None
            counts, owed = self._order(last).counts_and_owed(last.stop - last.start)
            self._segments.append(self._segment(last.stop, last.base + counts, owed, last.quanta > 0))
            self._starts.append(last.stop)

    def _effective(self, mix: FloatArray, used_up: np.ndarray) -> FloatArray | None:
        """The mix after the weights of used-up domains moved to others; None: the run ends here."""
        if not used_up.any():
            return mix
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

    def _safe_length(self, quanta: IntArray, base: IntArray) -> int:
        """Lower bound on `_until_used_up`: cheap, and a few samples below it."""
        waiting = self._limited & (quanta > 0)
        if not waiting.any():
            return int(_NEVER)
        share = quanta[waiting] / RESOLUTION
        soonest = float((((self.num_rows - base)[waiting] - _OFF_BY) / share).min())
        return max(0, int(min(soonest, _NEVER)))

    def _until_used_up(self, order: DomainOrder, base: IntArray) -> int | None:
        """Samples until the first limited domain with weight is used up; None: never."""
        waiting = self._limited & (order.quanta > 0)
        if not waiting.any():
            return None
        left = (self.num_rows - base)[waiting]
        share = order.quanta[waiting] / RESOLUTION
        latest = float(((left + _OFF_BY) / share).min())
        if latest > _NEVER:
            return None
        low, high = self._safe_length(order.quanta, base), int(np.ceil(latest))

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
        last = self._segments[-1]
        return (last.start, tuple(self.space.names[i] for i in last.failed)) if last.failed else None

    def _ended(self) -> int | None:
        last = self._segments[-1]
        return last.start if last.quanta is None and not last.failed else None

    def locate(self, indices: IntArray) -> Located:
        """Domain, draw, shard and row of samples.

        Args:
            indices: (n,) global sample indices, each below `end`.

        Raises:
            ExhaustedError: A domain with rule ``error`` was used up before one of the indices, or the plan has ended.
        """
        indices = np.asarray(indices, dtype=np.int64)
        domain, draw = np.empty_like(indices), np.empty_like(indices)
        if not len(indices):
            return Located(indices, indices, indices, indices)
        self._extend(int(indices.max()))
        first, last = (bisect_right(self._starts, int(end)) - 1 for end in (indices.min(), indices.max()))
        segment_of = first + np.searchsorted(self._starts[first + 1 : last + 1], indices, side="right")
        for number in np.unique(segment_of):
            segment = self._segments[int(number)]
            self._refuse(segment)
            chosen = segment_of == number
            domain[chosen], draw[chosen] = self._order(segment).locate(indices[chosen] - segment.start)
            draw[chosen] += segment.base[domain[chosen]]
        shard, row = self._rows.locate(domain, draw)
        return Located(domain, draw, shard, row)

    def replacement(self, index: int, domain: int, attempt: int) -> tuple[int, int]:
        """Shard and row of its domain that stand in for a row that cannot be used: any row, equally likely.

        Args:
            index: Global sample index.
            domain: Domain number of the sample.
            attempt: Number of the row in the sequence of candidates, from 1.
        """
        key = stream_key(self.seed, "replacement", self.space.names[domain], index, attempt)
        position = key % int(self.num_rows[domain])
        ends = np.cumsum(self._shard_rows[domain])
        shard = int(np.searchsorted(ends, position, side="right"))
        return shard, position - int(ends[shard] - self._shard_rows[domain][shard])

    def _refuse(self, segment: _Segment) -> None:
        if segment.failed:
            names = [self.space.names[i] for i in segment.failed]
            raise ExhaustedError(
                f"domains {names} were used up at sample {segment.start} and their rule is 'error': add shards, lower "
                "their weight, or choose exhausted='repeat', 'stop' or 'redistribute'"
            )
        if segment.quanta is None:
            names = [self.space.names[i] for i in segment.used_up]
            raise ExhaustedError(f"the plan ends at sample {segment.start}: {names} are used up")

    def counts(self, index: int) -> IntArray:
        """Samples drawn from each domain before a global index: (D,) int64, sums to the index."""
        segment = self._at(index)
        if segment.quanta is None or index == segment.start:
            return segment.base.copy()
        return segment.base + self._order(segment).counts(index - segment.start)

    def mix_at(self, index: int) -> FloatArray:
        """The effective mix at a global index, without used-up domains: (D,)."""
        segment = self._at(index)
        if segment.quanta is None:
            return np.zeros(len(self.space))
        return np.asarray(segment.quanta / RESOLUTION, dtype=np.float64)

    def used_up_at(self, index: int) -> tuple[str, ...]:
        """Names of the domains that have run out before a global index."""
        segment = self._at(index)
        return tuple(self.space.names[i] for i in segment.used_up)

    def changes(self) -> list[tuple[int, tuple[str, ...]]]:
        """Every index at which domains run out, under the present ledger: (index, names used up from there on)."""
        self._extend(None)
        changes: list[tuple[int, tuple[str, ...]]] = []
        for segment in self._segments:
            names = tuple(self.space.names[i] for i in segment.used_up)
            if names and (not changes or changes[-1][1] != names):
                changes.append((segment.start, names))
        return changes

    def _at(self, index: int) -> _Segment:
        self._extend(index)
        return self._segments[bisect_right(self._starts, index) - 1]
