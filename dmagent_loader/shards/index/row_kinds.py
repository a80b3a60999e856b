"""The kinds of rows of a shard: which extensions their members have, and how many rows have them.

A start needs them for every shard, to name rows that are unlike all others. They are kept as a short text beside the
facts of the shard, which most shards share.
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


def describe_kinds(index: ShardIndex) -> str:
    """The kinds of rows of a shard as text: the most frequent ones, and at most `_LISTED_KINDS`."""
    if not index.num_rows:
        return "[]"
    first, extension, rows = index.row_first, index.extension, index.num_rows
    in_row, more = divmod(index.num_members, rows)
    # No row has an extension twice, so a sequence that repeats after `in_row` members has rows of that length.
    if not more and bool((extension.reshape(rows, in_row) == extension[:in_row]).all()):
        return json.dumps(_extensions(index, 0))
    # Rows are of one kind if they have the same set of extensions: equal sums of random numbers, one per extension.
    numbers = np.random.default_rng(0).integers(1 << 63, size=len(index.extensions), dtype=np.uint64)
    sums = np.add.reduceat(numbers[extension], first[:-1])
    _, where, counts = np.unique(sums, return_index=True, return_counts=True)
    kinds: dict[tuple[str, ...], list[int]] = {}
    for position in np.lexsort((where, -counts)).tolist():
        row, count = int(where[position]), int(counts[position])
        name = tuple(_extensions(index, row))
        if name in kinds:
            kinds[name][0] += count
            kinds[name][1] = min(row, kinds[name][1])
        elif len(kinds) < _LISTED_KINDS:
            kinds[name] = [count, row]
    if len(kinds) == 1:
        return json.dumps(*kinds)
    return json.dumps([[list(name), count, index.key(row)[:_SHOWN]] for name, (count, row) in kinds.items()])


def parse_kinds(text: str) -> list[RowKind]:
    """The kinds in a text of `describe_kinds`.

    Raises:
        Exception: Of any kind, if it is no such text.
    """
    values = json.loads(text)
    if values and isinstance(values[0], list):
        return [RowKind(extensions=tuple(names), rows=int(rows), key=str(key)) for names, rows, key in values]
    return [RowKind(extensions=tuple(values))]


def _extensions(index: ShardIndex, row: int) -> list[str]:
    """Sorted extensions of a row; of very many, the last suffix that most of them have, or the first few."""
    start, end = index.row_first.item(row), index.row_first.item(row + 1)
    names = sorted({index.extensions[number] for number in index.extension[start:end].tolist()})
    if len(names) >= _COLLAPSED_MEMBERS:
        ((suffix, count),) = Counter(name.rpartition(".")[2] for name in names).most_common(1)
        if count >= _COLLAPSED_MEMBERS:
            return [COLLAPSED + suffix]
    return [name[:_SHOWN] for name in names[:_LISTED_EXTENSIONS]]
