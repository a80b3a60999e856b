"""The plan: the pure function (seed, shard sets, ledger, global sample index) -> (domain, row of the domain).

A plan is a list of *segments*. Most runs have one. Where a run continues with other data, a new segment begins: it has
its own shards, domains and settings, and takes over from the one before the mix, the debts to the domains, and the rows
that the present passes have left. All of it follows from the parameters of the segments: no list of drawn rows is kept.

Shapes: D domains of the newest segment, U domains of all segments, n samples.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from dmagent_loader.errors import StateError
from dmagent_loader.mixture.domains import Domain, DomainSpace
from dmagent_loader.mixture.exhaustion import ExhaustionRule, exhaustion_rules
from dmagent_loader.mixture.ledger import CHANGED_DATA, Ledger, LedgerEntry
from dmagent_loader.mixture.length import RunLength
from dmagent_loader.mixture.rest_of_pass import ShardSet
from dmagent_loader.mixture.row_order import DEFAULT_SHUFFLE
from dmagent_loader.mixture.segment import Located, Segment
from dmagent_loader.mixture.shuffle import Shuffle
from dmagent_loader.mixture.simplex import FloatArray, IntArray


class Plan:
    """The order of all samples of a run.

    Args:
        space: The domains.
        shard_rows: For each domain, the rows of each of its shards; or the shards with their contents.
        seed: Seed of the sample order.
        exhausted: See `mixture.exhaustion.exhaustion_rules`.
        shuffle: Settings of the shuffle.

    Raises:
        EmptyShardError: A domain has no rows.

    Attributes:
        segments: All segments; the last one is in force.
        ledger: All mixes, over the domains in force. Mixes of earlier segments are mapped to them (`carried_mix`).
    """

    def __init__(
        self,
        space: DomainSpace,
        shard_rows: Sequence[IntArray] | ShardSet,
        *,
        seed: int,
        exhausted: str | Mapping[str, str] | None = None,
        shuffle: Shuffle = DEFAULT_SHUFFLE,
    ) -> None:
        shards = shard_rows if isinstance(shard_rows, ShardSet) else ShardSet.numbered(shard_rows)
        segment = Segment(space, shards, seed=seed, rules=exhaustion_rules(space, exhausted), shuffle=shuffle)
        self._join(None, [segment], segment.ledger, [{}])

    def _join(self, before: Plan | None, segments: list[Segment], ledger: Ledger, drawn: list[dict[str, int]]) -> None:
        self._before = before
        """The plan without the newest segment."""
        self.segments, self.ledger = segments, ledger
        self._last = segments[-1]
        self._begins = [segment.begin for segment in segments]
        self._drawn = drawn
        """For each segment, domain -> samples drawn before it."""

    # Settings in force

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self._last.seed

    @property
    def begin(self) -> int:
        """Global index at which the segment in force began."""
        return self._last.begin

    @property
    def space(self) -> DomainSpace:
        """The domains in force."""
        return self._last.space

    @property
    def shards(self) -> ShardSet:
        """The shards in force."""
        return self._last.shards

    @property
    def shuffle(self) -> Shuffle:
        """Settings of the shuffle."""
        return self._last.shuffle

    @property
    def num_lanes(self) -> int:
        """Number of lanes of each domain."""
        return self._last.num_lanes

    @property
    def rules(self) -> tuple[ExhaustionRule, ...]:
        """(D,) exhaustion rules."""
        return self._last.rules

    @property
    def num_rows(self) -> IntArray:
        """(D,) rows of each domain."""
        return self._last.num_rows

    @property
    def natural_mix(self) -> FloatArray:
        """(D,) share of all rows of each domain, sums to 1."""
        return np.asarray(self.num_rows / self.num_rows.sum(), dtype=np.float64)

    def run_length(self, limit: int | None) -> RunLength:
        """The facts that bound the length of the run.

        Args:
            limit: Samples at which the trainer stops; None: no limit is known.
        """
        limited = np.array([rule != "repeat" for rule in self.rules])
        fields = [self.space.members(name) for name in self.space.fields]
        ending = tuple(m for m in fields if limited[list(m)].all() and any(self.rules[i] == "stop" for i in m))
        return RunLength(rows=self.num_rows, repeats=~limited, limit=limit, ending=ending)

    # Changes

    def append(self, entry: LedgerEntry) -> None:
        """Puts a new mix into force from ``entry.start`` on; earlier samples do not change.

        Raises:
            StateError: The entry would change the past of the ledger.
        """
        self._last.append(entry)
        if self.ledger is not self._last.ledger:
            self.ledger.append(entry)

    def extend(self, entries: Iterable[LedgerEntry]) -> None:
        """`append` for many mixes, several times as fast.

        Raises:
            StateError: An entry would change the past of the ledger.
        """
        entries = list(entries)
        self._last.extend(entries)
        if self.ledger is not self._last.ledger:
            for entry in entries:
                self.ledger.append(entry)

    def changed(
        self,
        index: int,
        space: DomainSpace,
        shards: ShardSet,
        *,
        rules: Sequence[ExhaustionRule],
        shuffle: Shuffle,
        entries: Iterable[LedgerEntry] | None = None,
    ) -> Plan:
        """A plan with the same samples before a global index, and other data from there on.

        Args:
            index: Global index, not before `begin`.
            space: The domains from there on.
            shards: Their shards.
            rules: (D,) their exhaustion rules.
            shuffle: Settings of the shuffle.
            entries: The mixes from there on; None: those of this plan, mapped to the domains (`carried_mix`).

        Raises:
            StateError: `index` is before `begin`, or the entries do not form a ledger.
            EmptyShardError: A domain has no rows.
        """
        if index < self.begin:
            raise StateError(f"sample {index} is before sample {self.begin}, from which the present data are in use")
        if entries is None:
            entries = self._entries_from(index, space, shards)
        if index == self.begin:  # nothing was drawn from the newest segment: it is replaced
            if self._before is not None:
                return self._before.changed(index, space, shards, rules=rules, shuffle=shuffle, entries=entries)
            exhausted = dict(zip(space.names, rules, strict=True))
            plan = Plan(space, shards, seed=self.seed, exhausted=exhausted, shuffle=shuffle)
        else:
            plan = self._with_segment(index, space, shards, rules, shuffle)
        plan.extend(entries)
        return plan

    def _with_segment(
        self, index: int, space: DomainSpace, shards: ShardSet, rules: Sequence[ExhaustionRule], shuffle: Shuffle
    ) -> Plan:
        """A plan with another segment, which has no mix yet."""
        last = self._last
        owed = dict(zip(last.space.names, last.owed(index).tolist(), strict=True))
        segment = Segment(
            space,
            shards,
            seed=self.seed,
            rules=rules,
            shuffle=shuffle,
            begin=index,
            owed=np.array([owed.get(name, 0) for name in space.names], dtype=np.int64),
            left=last.left(index),
        )
        ledger = Ledger(space.names)
        for entry in self._mapped(self.ledger, space, segment.num_rows):
            if entry.start < index:
                ledger.append(entry)
        plan = Plan.__new__(Plan)
        plan._join(self, [*self.segments, segment], ledger, [*self._drawn, self.drawn(index)])
        return plan

    def _entries_from(self, index: int, space: DomainSpace, shards: ShardSet) -> list[LedgerEntry]:
        """The mixes from a global index on, mapped to other domains."""
        in_force = self.ledger.in_force(index)
        later = [entry for entry in self.ledger if entry.start > index]
        first, *rest = self._mapped([in_force, *later], space, np.array([rows.sum() for rows in shards.rows]))
        if in_force.start < index:
            first = replace(first, start=index, decided_by=CHANGED_DATA, decided_at=index, feedback=None, note="")
        return [first, *rest]

    def _mapped(self, entries: Iterable[LedgerEntry], space: DomainSpace, num_rows: IntArray) -> list[LedgerEntry]:
        if space.names == self.space.names:
            return list(entries)
        return [
            replace(entry, mix=tuple(carried_mix(entry.weights(), self.space.domains, space, num_rows).tolist()))
            for entry in entries
        ]

    # Samples

    @property
    def end(self) -> int | None:
        """Global index at which the data are used up and the run ends, under the present ledger; None: never."""
        return self._last.end

    def ends_by(self, index: int) -> int | None:
        """`end` if it is at or before a global index, else None; cheaper than `end` if many domains run out."""
        return self._last.ends_by(index)

    @property
    def failure(self) -> tuple[int, tuple[str, ...]] | None:
        """Global index at which domains with rule ``error`` run out, and their names; None: none does."""
        return self._last.failure

    def locate(self, indices: IntArray) -> Located:
        """Domain, draw, shard and row of samples.

        Args:
            indices: (n,) global sample indices, each from `begin` on and below `end`.

        Raises:
            StateError: An index is before `begin`: the run read other data there (`segment_at`).
            ExhaustedError: A domain with rule ``error`` was used up before one of the indices, or the plan has ended.
        """
        domain, draw = self.draws(indices)
        return Located(domain, draw, *self.rows(domain, draw))

    def draws(self, indices: IntArray) -> tuple[IntArray, IntArray]:
        """Domain and draw of each sample: (n,), (n,). For the arguments and errors see `locate`."""
        self._refuse_earlier(indices)
        return self._last.draws(np.asarray(indices, dtype=np.int64))

    def rows(self, domain: IntArray, draw: IntArray) -> tuple[IntArray, IntArray]:
        """Shard and row of draws of the segment in force, which do not depend on its mixes.

        Args:
            domain: (n,) domain numbers.
            draw: (n,) number of samples that the segment drew from the domain before.

        Returns:
            Shard numbers within the domain (n,) and row numbers (n,).
        """
        return self._last.rows.locate(domain, draw)

    def lanes(self, indices: IntArray) -> IntArray:
        """Lane of each sample (`shuffle`): (n,). For the arguments and errors see `locate`."""
        self._refuse_earlier(indices)
        return self._last.lanes(indices)

    def _refuse_earlier(self, indices: IntArray) -> None:
        if self.begin and len(indices) and np.min(indices) < self.begin:
            raise StateError(
                f"sample {np.min(indices)} was read before the data changed at sample {self.begin}: "
                "`dmagent replay` lists such samples"
            )

    def segment_at(self, index: int) -> Segment:
        """The segment of a global index."""
        return self.segments[bisect_right(self._begins, index) - 1]

    def replacement(self, index: int, domain: int, attempt: int) -> tuple[int, int]:
        """See `mixture.segment.Segment.replacement`."""
        return self._last.replacement(index, domain, attempt)

    def mix_at(self, index: int) -> FloatArray:
        """The effective mix at a global index, without used-up domains: (D,)."""
        segment = self.segment_at(index)
        mix = segment.mix_at(index)
        if segment is self._last:
            return mix
        if not mix.any():  # that segment had ended
            return np.zeros(len(self.space))
        return carried_mix(mix, segment.space.domains, self.space, self.num_rows)

    def used_up_at(self, index: int) -> tuple[str, ...]:
        """Names of the domains that have run out before a global index from `begin` on."""
        return self._last.used_up_at(index)

    def changes(self) -> list[tuple[int, tuple[str, ...]]]:
        """Every index from `begin` on at which domains run out: (index, names used up from there on)."""
        return self._last.changes()

    # Counts

    def counts(self, index: int) -> IntArray:
        """Samples drawn from each domain before a global index: (D,) int64. Removed domains are left out."""
        if len(self.segments) == 1:
            return self._last.counts(index)
        drawn = self.drawn(index)
        return np.array([drawn.get(name, 0) for name in self.space.names], dtype=np.int64)

    def drawn(self, index: int) -> dict[str, int]:
        """Domain -> samples drawn before a global index; removed domains come last. The counts sum to the index."""
        number = bisect_right(self._begins, index) - 1
        segment, before = self.segments[number], self._drawn[number]
        here = dict(zip(segment.space.names, segment.counts(index).tolist(), strict=True))
        names = [*self.space.names, *(domain.name for domain in self.removed)]
        return {name: before.get(name, 0) + here.get(name, 0) for name in names}

    @cached_property
    def removed(self) -> tuple[Domain, ...]:
        """Domains of earlier segments that are not in force."""
        present = set(self.space.names)
        earlier = {domain.name: domain for segment in self.segments[:-1] for domain in segment.space.domains}
        return tuple(domain for name, domain in earlier.items() if name not in present)

    def rows_left(self, index: int) -> IntArray:
        """Rows that the present pass of each domain in force has not drawn before a global index: (D,)."""
        return self._last.rows_left(index)

    def counts_of_all(self, index: int) -> IntArray:
        """Samples drawn from each domain of all segments before a global index: (U,) int64, sums to the index.

        The domains in force come first.
        """
        if not self.removed:
            return self.counts(index)
        return np.array(list(self.drawn(index).values()), dtype=np.int64)

    def carried(self, mix: FloatArray) -> FloatArray:
        """A mix over the domains of all segments, (U,), mapped to those in force: (D,)."""
        if not self.removed:
            return mix
        return carried_mix(mix, (*self.space.domains, *self.removed), self.space, self.num_rows)


def carried_mix(mix: FloatArray, domains: Sequence[Domain], space: DomainSpace, num_rows: IntArray) -> FloatArray:
    """A mix over other domains, mapped to a space.

    Domains of the same name keep their weight, and new ones get none. The weight of a domain that is gone moves to the
    domains of its field, in proportion to their weights; if these are all 0, in proportion to the rows of those that
    stay, or else of all in the field. The weight of a field that is gone moves to the other fields in the same way.

    Args:
        mix: (U,) weights, sum to 1.
        domains: (U,) their domains.
        space: Domains of the result.
        num_rows: (D,) rows of each of them.

    Returns:
        (D,), sums to 1.
    """
    position = {name: number for number, name in enumerate(space.names)}
    weights, lost = np.zeros(len(space)), dict[str, float]()
    stays = np.zeros(len(space), dtype=bool)
    for domain, weight in zip(domains, mix.tolist(), strict=True):
        number = position.get(domain.name)
        if number is not None:
            weights[number] = weight
            stays[number] = True
        elif weight > 0:
            lost[domain.field] = lost.get(domain.field, 0.0) + weight
    for field_name, weight in lost.items():
        members = [number for number, domain in enumerate(space.domains) if domain.field == field_name]
        _spread(weights, weight, np.array(members or range(len(space)), dtype=np.int64), stays, num_rows)
    return weights / weights.sum() if lost else weights


def _spread(weights: FloatArray, weight: float, members: IntArray, stays: np.ndarray, num_rows: IntArray) -> None:
    """Adds a weight to those of some domains."""
    if (total := float(weights[members].sum())) > 0:
        weights[members] *= (total + weight) / total
        return
    chosen = members[stays[members]] if stays[members].any() else members
    weights[chosen] += weight * num_rows[chosen] / num_rows[chosen].sum()
