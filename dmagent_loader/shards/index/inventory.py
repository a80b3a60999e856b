"""The inventory of a shard: the kinds of its rows, by the extensions of their members, and its hidden files.

A start needs it for every shard, to name rows that are unlike all others. It is kept as a short text, which is the same
for most shards of a domain.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import numpy as np

from dmagent_loader.shards.index.shard_index import ShardIndex

COLLAPSED = "*."
"""Beginning of the name that stands for all members of a row with `_COLLAPSED_MEMBERS` or more of one last suffix."""

_COLLAPSED_MEMBERS = 12
_LISTED_KINDS = 16
_LISTED_EXTENSIONS = 16
_SHOWN = 100


@dataclass(frozen=True, kw_only=True)
class RowKind:
    """Rows of one shard whose members have the same extensions.

    Attributes:
        extensions: Sorted extensions; ``*.txt`` for many members whose names end so.
        rows: Number of rows; None: all of the shard.
        key: Key of the first of them; None if they are all rows of the shard.
    """

    extensions: tuple[str, ...]
    rows: int | None = None
    key: str | None = None

    @property
    def is_collapsed(self) -> bool:
        """Whether each row is made of a dozen members or more with one last suffix."""
        return any(name.startswith(COLLAPSED) for name in self.extensions)


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The contents of a shard.

    Attributes:
        kinds: The most frequent kinds of rows, at most `_LISTED_KINDS`.
        hidden: Number of hidden files, which belong to no row.
    """

    kinds: tuple[RowKind, ...]
    hidden: int


def inventory_text(index: ShardIndex) -> str:
    """The inventory of a shard as text."""
    kinds = _kinds(index)
    return json.dumps([kinds, index.hidden] if index.hidden else [kinds])


def parse_inventory(text: str) -> Inventory:
    """The inventory in a text of `inventory_text`.

    Raises:
        Exception: Of any kind, if it is no such text.
    """
    listed, *hidden = json.loads(text)
    if listed and isinstance(listed[0], list):
        kinds = [RowKind(extensions=tuple(names), rows=int(rows), key=str(key)) for names, rows, key in listed]
    else:
        kinds = [RowKind(extensions=tuple(listed))]
    if not all(isinstance(name, str) for kind in kinds for name in kind.extensions):
        raise ValueError("its extensions are no text")
    return Inventory(kinds=tuple(kinds), hidden=int(hidden[0]) if hidden else 0)


def _kinds(index: ShardIndex) -> list[str] | list[tuple[list[str], int, str]]:
    """The extensions of all rows; where they differ, those of each kind, with the number and first key of its rows."""
    first, extension, rows = index.row_first, index.extension, index.num_rows
    if not rows:
        return []
    in_row, more = divmod(index.num_members, rows)
    # No row has an extension twice, so a sequence that repeats after `in_row` members has rows of that length.
    if not more and bool((extension.reshape(rows, in_row) == extension[:in_row]).all()):
        return _extensions(index, 0)
    # Rows are of one kind if they have the same set of extensions: equal sums of random numbers, one per extension.
    numbers = np.random.default_rng(0).integers(1 << 63, size=len(index.extensions), dtype=np.uint64)
    sums = np.add.reduceat(numbers[extension], first[:-1])
    _, where, counts = np.unique(sums, return_index=True, return_counts=True)
    kinds: dict[tuple[str, ...], list[int]] = {}
    for position in np.lexsort((where, -counts)).tolist():
        row, count = int(where[position]), int(counts[position])
        names = tuple(_extensions(index, row))
        if names in kinds:
            kinds[names] = [kinds[names][0] + count, min(row, kinds[names][1])]
        elif len(kinds) < _LISTED_KINDS:
            kinds[names] = [count, row]
    if len(kinds) == 1:
        return list(*kinds)
    return [(list(names), count, index.key(row)[:_SHOWN]) for names, (count, row) in kinds.items()]


def _extensions(index: ShardIndex, row: int) -> list[str]:
    """Sorted extensions of a row; of very many, the last suffix that most of them have, or the first few."""
    start, end = index.row_first.item(row), index.row_first.item(row + 1)
    names = sorted({index.extensions[number] for number in index.extension[start:end].tolist()})
    if len(names) >= _COLLAPSED_MEMBERS:
        ((suffix, count),) = Counter(name.rpartition(".")[2] for name in names).most_common(1)
        if count >= _COLLAPSED_MEMBERS:
            return [COLLAPSED + suffix]
    return [name[:_SHOWN] for name in names[:_LISTED_EXTENSIONS]]
