"""The differences between the data of a saved run and those of a new one, in words."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

from dmagent_loader._run.segments import RunData
from dmagent_loader.mixture.hashing import UIntArray
from dmagent_loader.mixture.rest_of_pass import partners
from dmagent_loader.mixture.simplex import IntArray

_LISTED = 5
"""Shards that a line names, and lines in a summary."""


@dataclass(frozen=True)
class Shards:
    """Some shards of a domain.

    Attributes:
        num_shards: Number of shards.
        num_rows: Their rows.
        names: File names, as far as they are known.
    """

    num_shards: int
    num_rows: int
    names: Sequence[str] = ()

    def __str__(self) -> str:
        more = len(self.names) - _LISTED
        listed = ", ".join(self.names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
        named = f" ({listed})" if listed else ""
        return f"{self.num_shards} shard{'s' * (self.num_shards != 1)}{named} with {self.num_rows:,} rows"


@dataclass(frozen=True)
class DomainDifference:
    """The shards of one domain that differ.

    Attributes:
        name: Name of the domain.
        kind: ``"kept"``, ``"new"`` or ``"removed"``.
        unchanged: Shards with the same content, under any name.
        changed: Shards of the same file name and other content, as they are now.
        new: Shards that were not there.
        lost: Shards that are gone.
    """

    name: str
    kind: str
    unchanged: Shards
    changed: Shards
    new: Shards
    lost: Shards

    @property
    def is_same(self) -> bool:
        """Whether the domain has the same shards, in any order and under any name."""
        return self.kind == "kept" and not (self.changed.num_shards or self.new.num_shards or self.lost.num_shards)

    def __str__(self) -> str:
        if self.kind == "new":
            return f"domain {self.name!r} is new: {self.new}"
        if self.kind == "removed":
            return f"domain {self.name!r} is gone: {self.lost}"
        kinds = ((self.changed, "changed"), (self.new, "new"), (self.lost, "lost"))
        parts = [f"{words} {shards}" for shards, words in kinds if shards.num_shards]
        return f"domain {self.name!r}: {', '.join(parts)}; unchanged {self.unchanged}"


@dataclass(frozen=True)
class Differences:
    """All differences between two sets of data.

    Attributes:
        domains: Every domain of either, those in use first.
        settings: Settings that differ, each in words.
    """

    domains: list[DomainDifference]
    settings: list[str]

    @property
    def replaced(self) -> list[str]:
        """Domains of both, none of whose rows was kept: another domain under the old name."""
        return [domain.name for domain in self.domains if domain.kind == "kept" and not domain.unchanged.num_rows]

    def lines(self) -> list[str]:
        """One line for each difference."""
        lines = [str(domain) for domain in self.domains if not domain.is_same]
        return [*lines, *self.settings] or ["only the names or the order of shards differ"]

    def summary(self) -> str:
        """The first differences, in one line."""
        lines = self.lines()
        more = f"; {len(lines) - _LISTED} more differences" if len(lines) > _LISTED else ""
        return "; ".join(lines[:_LISTED]) + more


def differences(saved: RunData, present: RunData) -> Differences:
    """Compares the data of a saved run with those of a new one."""
    now = {name: number for number, name in enumerate(present.space.names)}
    before = {name: number for number, name in enumerate(saved.space.names)}
    names = list(dict.fromkeys([*now, *before]))
    domains = [
        _domain(name, _Columns.of(saved, before.get(name)), _Columns.of(present, now.get(name))) for name in names
    ]
    kept = [name for name in before if name in now]
    settings = []
    if kept != [name for name in now if name in before]:
        settings.append("the domains come in another order")
    for name in kept:
        old, new = saved.rules[before[name]], present.rules[now[name]]
        if old != new:
            settings.append(f"the exhaustion rule of {name!r} was {old!r} and is {new!r}")
    for setting in ("window", "shards"):
        old_value, new_value = getattr(saved.shuffle, setting), getattr(present.shuffle, setting)
        if old_value != new_value:
            settings.append(f"shuffle_{setting} was {old_value} and is {new_value}")
    return Differences(domains, settings)


@dataclass(frozen=True)
class _Columns:
    """The shards of a domain, S of them; none where there is no such domain."""

    contents: UIntArray
    rows: IntArray
    names: Sequence[str] | None
    is_there: bool

    @classmethod
    def of(cls, data: RunData, domain: int | None) -> _Columns:
        if domain is None:
            return cls(np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64), None, is_there=False)
        names = None if data.names is None else data.names[domain]
        return cls(data.shards.contents[domain], data.shards.rows[domain], names, is_there=True)

    def names_of(self, numbers: IntArray) -> list[str]:
        return [] if self.names is None else [self.names[number] for number in numbers.tolist()]

    def chosen(self, numbers: IntArray, files: Set[str], *, among: bool) -> Shards:
        """Those of some shards whose file names are, or are not, among others."""
        if files:
            names = self.names_of(numbers)
            numbers = numbers[[(name in files) == among for name in names]]
        elif among:
            numbers = numbers[:0]
        return Shards(len(numbers), int(self.rows[numbers].sum()), self.names_of(numbers))


def _domain(name: str, before: _Columns, now: _Columns) -> DomainDifference:
    partner = partners(now.contents, now.rows, before.contents, before.rows)
    is_same = partner >= 0
    is_gone = np.ones(len(before.rows), dtype=bool)
    is_gone[partner[is_same]] = False
    added, gone = np.flatnonzero(~is_same), np.flatnonzero(is_gone)
    replaced = set(now.names_of(added)) & set(before.names_of(gone))
    return DomainDifference(
        name=name,
        kind="new" if not before.is_there else "removed" if not now.is_there else "kept",
        unchanged=Shards(int(is_same.sum()), int(now.rows[is_same].sum())),
        changed=now.chosen(added, replaced, among=True),
        new=now.chosen(added, replaced, among=False),
        lost=before.chosen(gone, replaced, among=False),
    )
