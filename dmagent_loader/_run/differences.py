"""The differences between the data of a saved run and those of a new one, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dmagent_loader._run.segments import RunData

_LISTED = 5
"""Shards that a line names, and lines in a summary."""


@dataclass(frozen=True)
class Shards:
    """Some shards of a domain.

    Attributes:
        names: File names, as far as they are known.
        rows: Rows of each.
    """

    names: list[str]
    rows: list[int]

    def __str__(self) -> str:
        count, more = len(self.rows), len(self.names) - _LISTED
        listed = ", ".join(self.names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
        named = f" ({listed})" if listed else ""
        return f"{count} shard{'s' * (count != 1)}{named} with {sum(self.rows):,} rows"


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
        return self.kind == "kept" and not (self.changed.rows or self.new.rows or self.lost.rows)

    def __str__(self) -> str:
        if self.kind == "new":
            return f"domain {self.name!r} is new: {self.new}"
        if self.kind == "removed":
            return f"domain {self.name!r} is gone: {self.lost}"
        kinds = ((self.changed, "changed"), (self.new, "new"), (self.lost, "lost"))
        parts = [f"{words} {shards}" for shards, words in kinds if shards.rows]
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
    domains = [_domain(name, _shards(saved, before.get(name)), _shards(present, now.get(name))) for name in names]
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


_Shard = tuple[tuple[int, int], str | None]
"""(content, rows) of a shard, and its file name if it is known."""


def _domain(name: str, before: list[_Shard] | None, now: list[_Shard] | None) -> DomainDifference:
    added, gone = _without(now or [], before or []), _without(before or [], now or [])
    files_added = {file for _, file in added} - {None}
    replaced = files_added & {file for _, file in gone}
    unchanged = _without(now or [], added)
    return DomainDifference(
        name=name,
        kind="new" if before is None else "removed" if now is None else "kept",
        unchanged=Shards([], [rows for (_, rows), _ in unchanged]),
        changed=_some(one for one in added if one[1] in replaced),
        new=_some(one for one in added if one[1] not in replaced),
        lost=_some(one for one in gone if one[1] not in replaced),
    )


def _without(shards: list[_Shard], others: list[_Shard]) -> list[_Shard]:
    """The shards whose contents are not among the others, as often as these have them."""
    left = Counter(key for key, _ in others)
    kept = []
    for key, file in shards:
        if left[key] > 0:
            left[key] -= 1
        else:
            kept.append((key, file))
    return kept


def _shards(data: RunData, domain: int | None) -> list[_Shard] | None:
    if domain is None:
        return None
    contents, rows = data.shards.contents[domain].tolist(), data.shards.rows[domain].tolist()
    names: Sequence[str | None] = [None] * len(rows) if data.names is None else data.names[domain]
    return list(zip(zip(contents, rows, strict=True), names, strict=True))


def _some(shards: Iterable[_Shard]) -> Shards:
    listed = list(shards)
    return Shards([name for _, name in listed if name is not None], [rows for (_, rows), _ in listed])
