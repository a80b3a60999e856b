"""What is odd about the rows of a domain, as sentences: said when shards are opened, before a run trips over it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dmagent_loader.shards.index.catalogue import Catalogue
from dmagent_loader.shards.index.inventory import Inventory, RowKind, parse_inventory
from dmagent_loader.shards.sources.urls import display_url

_NEARLY_ALL = 0.8
"""Share of the rows of a domain with an extension from which on the others are odd."""


def oddities(catalogue: Catalogue) -> Iterator[str]:
    """Sentences about rows unlike nearly all rows of their domain, rows made of many files, and hidden files."""
    inventories = [parse_inventory(text) for text in catalogue.inventories]
    are_odd = np.array([_is_odd(inventory) for inventory in inventories], bool)
    starts = [first for first, _ in catalogue.spans]
    lowest, highest = (ufunc.reduceat(catalogue.inventory, starts) for ufunc in (np.minimum, np.maximum))
    suspect = np.logical_or.reduceat(are_odd[catalogue.inventory], starts) | (lowest != highest)
    for number in np.flatnonzero(suspect).tolist():
        domain, (first, end) = catalogue.domains[number], catalogue.spans[number]
        shards, rows = catalogue.inventory[first:end], catalogue.rows[first:end]
        rows_of = np.bincount(shards, weights=rows)
        found: list[_Rows] = []
        hidden: list[tuple[int, int, int]] = []
        for inventory, where, count in zip(*np.unique(shards, return_index=True, return_counts=True), strict=True):
            shard = first + int(where)
            for kind in inventories[inventory].kinds:
                in_all = int(rows_of[inventory]) if kind.rows is None else kind.rows * int(count)
                found.append(_Rows(kind, in_all, _place(catalogue, kind, shard)))
            if inventories[inventory].hidden:
                hidden.append((shard, int(count), inventories[inventory].hidden * int(count)))
        yield from _odd_rows(domain, int(rows.sum()), [kind for kind in found if kind.count])
        if hidden:
            yield (
                f"domain {domain!r}: {sum(files for _, _, files in hidden)} hidden files, whose names begin with a dot "
                f"(.DS_Store, ._name, .gitkeep), are left out of {sum(count for _, count, _ in hidden)} of its shards "
                f"(first: {display_url(catalogue.url(min(hidden)[0]))})"
            )


@dataclass(frozen=True)
class _Rows:
    """Rows of one kind in a domain, and where the first of them is."""

    kind: RowKind
    count: int
    place: str


def _odd_rows(domain: str, total: int, found: Sequence[_Rows]) -> Iterator[str]:
    """Sentences about the rows of one domain, which has `total` of them."""
    collapsed = [rows for rows in found if rows.kind.is_collapsed]
    if collapsed:
        count = sum(rows.count for rows in collapsed)
        yield (
            f"domain {domain!r}: {count} of {total} rows {'is' if count == 1 else 'are'} made of a dozen files or more "
            f"of one kind, {', '.join(collapsed[0].kind.extensions)} (first: {collapsed[0].place}), because the key of "
            "a row ends at the first dot of a file name; if each file is a row, and the names have dots in them, pass "
            "reading=ReadingConfig(key_ends_at='last-dot') (--key-ends-at last-dot)"
        )
    having: Counter[str] = Counter()
    for rows in found:
        having.update(dict.fromkeys(rows.kind.extensions, rows.count))
    for extension, count in having.items():
        lacking = [rows for rows in found if extension not in rows.kind.extensions]
        if count >= _NEARLY_ALL * total and lacking:
            missing = sum(rows.count for rows in lacking)
            yield (
                f"domain {domain!r}: {missing} of {total} rows {'has' if missing == 1 else 'have'} no {extension!r}, "
                f"which nearly all have (first: {lacking[0].place}, with {', '.join(lacking[0].kind.extensions)}): "
                "whatever needs it fails there; leave such files out when the shards are written, or pass "
                "on_bad_row='skip'"
            )


def _place(catalogue: Catalogue, kind: RowKind, shard: int) -> str:
    key = "every row" if kind.key is None else f"row {kind.key!r}"
    return f"{key} of {display_url(catalogue.url(shard))}"


def _is_odd(inventory: Inventory) -> bool:
    return bool(inventory.hidden) or len(inventory.kinds) > 1 or inventory.kinds[0].is_collapsed
